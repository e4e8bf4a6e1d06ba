"""Paths, masks by pattern, and splitting a tree into what is trained and what is not.

The path of a leaf is its keys joined by slashes, ``params/layers_0_30/mlp/up_proj/
kernel``: the one idiom by which weights are trained, decayed, sharded and adapted.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax

from jaxalign.errors import UserError, did_you_mean


__all__ = [
    "by_path",
    "combine",
    "map_with_paths",
    "mask_from_patterns",
    "node_at",
    "num_bytes",
    "num_params",
    "partition",
    "path_string",
    "paths",
]


def path_string(key_path: Sequence[Any]) -> str:
    """Join a JAX key path with slashes.

    >>> (path, leaf), *_ = jax.tree_util.tree_leaves_with_path({"mlp": {"up": 1}})
    >>> path_string(path)
    'mlp/up'
    """
    return "/".join(
        str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k))))
        for k in key_path
    )


def paths(tree: Any) -> list[str]:
    """Return the path of every leaf, in the order of ``jax.tree.leaves``.

    >>> paths({"mlp": {"up": 1, "down": 2}})
    ['mlp/down', 'mlp/up']
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [path_string(key_path) for key_path, _ in leaves]


def by_path(tree: Any) -> dict[str, Any]:
    """Return the leaves by their paths, in the order of ``jax.tree.leaves``.

    >>> by_path({"mlp": {"up": 1, "down": 2}})
    {'mlp/down': 2, 'mlp/up': 1}
    """
    return dict(zip(paths(tree), jax.tree.leaves(tree), strict=True))


def map_with_paths(fn: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """Map ``fn(path, leaf, *leaves)`` over a tree.

    >>> map_with_paths(lambda path, leaf: f"{path}={leaf}", {"mlp": {"up": 1}})
    {'mlp': {'up': 'mlp/up=1'}}
    """
    return jax.tree_util.tree_map_with_path(
        lambda key_path, *leaves: fn(path_string(key_path), *leaves), tree, *rest
    )


def node_at(tree: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Return the subtree of a nested dict under these keys, made where it is missing.

    >>> tree = {}
    >>> node_at(tree, ["mlp", "up"])["a"] = 1
    >>> tree
    {'mlp': {'up': {'a': 1}}}
    """
    for name in names:
        tree = tree.setdefault(name, {})
    return tree


def mask_from_patterns(tree: Any, patterns: Sequence[str]) -> Any:
    """Mark the leaves whose path matches any of the patterns in full.

    Args:
      tree: nested dict of arrays or shapes.
      patterns: regular expressions for whole paths, ``lora/.*/[ab]``.
    Returns:
      A tree of bools of the same structure.
    Raises:
      UserError: a pattern is no regular expression, or matches no leaf.
    Example:
      >>> mask_from_patterns({"norm": 1, "head": 2}, ["h.*"])
      {'head': True, 'norm': False}
    """
    names = paths(tree)
    compiled = []
    for pattern in patterns:
        try:
            compiled.append(re.compile(pattern))
        except re.error as error:
            raise UserError(
                f"the pattern {pattern!r} is not a regular expression: {error}. "
                "Mend it, or escape its special characters with a backslash."
            ) from None
    for pattern, regex in zip(patterns, compiled, strict=True):
        if not any(regex.fullmatch(name) for name in names):
            raise UserError(
                f"the pattern {pattern!r} matches no weight: it must match a whole "
                f"path such as {names[0] if names else '(the tree is empty)'!r}. "
                f"{_collection_hint(pattern, names)}{did_you_mean(pattern, names)}"
            )
    return map_with_paths(
        lambda name, _: any(regex.fullmatch(name) for regex in compiled), tree
    )


def _collection_hint(pattern: str, names: Sequence[str]) -> str:
    """Say where a pattern is for parameters and the tree is variables, or otherwise."""
    if pattern.startswith("params/"):
        inside = re.compile(pattern.removeprefix("params/"))
        if any(inside.fullmatch(name) for name in names):
            return "The tree is parameters alone: take params/ off, or give variables. "
    elif any(re.fullmatch(f"params/(?:{pattern})", name) for name in names):
        return "The tree is variables: put params/ in front, or give its parameters. "
    return ""


def partition(tree: Any, mask: Any) -> tuple[Any, Any]:
    """Split a tree in two of the same structure, with None in the holes.

    >>> partition({"a": 1, "b": 2}, {"a": True, "b": False})
    ({'a': 1, 'b': None}, {'a': None, 'b': 2})

    Raises:
      UserError: the mask is one of another tree, such as of parameters for variables.
    """
    try:
        selected = jax.tree.map(lambda keep, leaf: leaf if keep else None, mask, tree)
    except ValueError:
        _refuse_mask(tree, mask)
        raise
    rest = jax.tree.map(lambda keep, leaf: None if keep else leaf, mask, tree)
    return selected, rest


def _refuse_mask(tree: Any, mask: Any) -> None:
    """Say what keeps a mask from fitting, by the paths of both trees."""
    mine, others = set(paths(tree)), set(paths(mask))
    lacks, more = sorted(mine - others), sorted(others - mine)
    if not lacks and not more:
        return  # other containers with the same leaves: JAX says which
    told = f"the mask lacks {lacks[0]!r}" if lacks else f"the mask has {more[0]!r} more"
    cure = "Make it of the tree that is split"
    if {name.removeprefix("params/") for name in mine} & others - mine:
        cure = (
            'It is a mask of parameters: give variables["params"], or {"params": mask}'
        )
    if {name.removeprefix("params/") for name in others} & mine - others:
        cure = 'It is a mask of variables: give {"params": params}, or mask["params"]'
    raise UserError(f"partition: {told}: expected one bool for each leaf. {cure}")


def combine(*trees: Any) -> Any:
    """Fill the None holes of the first tree from the next ones.

    >>> combine({"a": 1, "b": None}, {"a": None, "b": 2})
    {'a': 1, 'b': 2}
    """

    def first(*leaves: Any) -> Any:
        return next((leaf for leaf in leaves if leaf is not None), None)

    return jax.tree.map(first, *trees, is_leaf=lambda leaf: leaf is None)


def num_params(tree: Any) -> int:
    """Count the numbers in a tree.

    >>> import jax.numpy as jnp
    >>> num_params({"kernel": jnp.zeros((2, 3)), "bias": jnp.zeros(3)})
    9
    """
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def num_bytes(tree: Any) -> int:
    """Count the bytes of a tree.

    >>> import jax.numpy as jnp
    >>> num_bytes({"kernel": jnp.zeros((2, 3), jnp.bfloat16)})
    12
    """
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
