"""Weights that an adapter has in the place of base weights: heads, norms, biases, rows.

The collection ``saved`` mirrors ``params``, and a layer that finds a leaf there uses it
instead of its own: PEFT's ``modules_to_save`` and the biases that it trains in place.
Embeddings and head may have single rows instead, those of a few tokens (PEFT's
``trainable_token_indices``): ``rows`` [n, width] and, not trained, ``indices`` [n].

Where the head is tied to the embeddings it goes on reading the base's, unless the
collection has a ``lm_head/kernel`` [width, vocabulary] for it; rows of the embeddings
are the head's too, unless it has rows of its own. So it is in PEFT.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxalign import products, stacks, trees
from jaxalign.adapters import selection
from jaxalign.errors import UserError, did_you_mean


__all__ = ["COLLECTION", "ROWS", "init", "put_logits", "put_rows"]

COLLECTION = "saved"

ROWS = ("rows", "indices")
"""Leaves of embeddings or head that stand for some of its rows."""


def put_rows(
    x: Float[Array, "*n d"],
    tokens: Int[Array, "*n"],
    leaves: Mapping[str, Array],
    vocab_size: int,
) -> Float[Array, "*n d"]:
    """Return embeddings with those of the saved tokens in their places.

    >>> leaves = {ROWS[0]: jnp.ones((1, 2)), ROWS[1]: jnp.array([3])}
    >>> put_rows(jnp.zeros((2, 2)), jnp.array([3, 4]), leaves, vocab_size=8).tolist()
    [[1.0, 1.0], [0.0, 0.0]]
    """
    rows, indices = (leaves[name] for name in ROWS)
    slots = jnp.full(vocab_size, -1, jnp.int32)
    slot = slots.at[indices].set(jnp.arange(len(indices), dtype=jnp.int32))[tokens]
    own = rows[jnp.maximum(slot, 0)].astype(x.dtype)
    return jnp.where((slot >= 0)[..., None], own, x)


def put_logits(
    logits: Float[Array, "*n v"],
    hidden: Float[Array, "*n d"],
    leaves: Mapping[str, Array],
) -> Float[Array, "*n v"]:
    """Return logits with those of the saved tokens in their places.

    >>> leaves = {ROWS[0]: jnp.ones((1, 2)), ROWS[1]: jnp.array([1])}
    >>> put_logits(jnp.zeros((1, 3)), jnp.ones((1, 2)), leaves).tolist()
    [[0.0, 2.0, 0.0]]
    """
    rows, indices = (leaves[name] for name in ROWS)
    own = products.einsum("...d,nd->...n", hidden, rows)
    return logits.at[..., indices].set(own.astype(logits.dtype))


def init(params: Any, modules: Sequence[str], adapted: Any) -> dict[str, Any]:
    """Return copies of whole modules, in float32, that are to be trained.

    Args:
      params: base weights, in any way held, or their shapes while tracing. A tied head
        is the embeddings' transpose, on its own from then on.
      modules: names, or regular expressions for a whole path inside a layer.
      adapted: the ``lora`` collection.
    Raises:
      UserError: a module that is not there, or that LoRA adapts.
    Example:
      >>> params = {"lm_head": {"kernel": jnp.ones((2, 5), jnp.bfloat16)}}
      >>> str(init(params, ["lm_head"], {})["lm_head"]["kernel"].dtype)
      'float32'
    """
    found = list(_weights(params))
    if "lm_head" not in params:
        found.append(("lm_head/kernel", params["embed_tokens"]["embedding"].T))
    paths = [path.rpartition("/")[0] for path, _ in found]
    inside = {path: stacks.split(f"{path}/x").rest.rpartition("/")[0] for path in paths}
    for name in modules:
        selection.check_regex("adapter.modules_to_save", name)
        if not any(_chooses(name, module) for module in inside.values()):
            known = dict.fromkeys(m.rpartition("/")[2] for m in inside.values())
            raise UserError(
                f"adapter.modules_to_save: {name!r} is no module of this model with "
                f"weights. {did_you_mean(name, known)}"
            )
    lora = {path.rpartition("/")[0] for path in trees.paths(adapted)}
    collection: dict[str, Any] = {}
    for (path, weight), module in zip(found, paths, strict=True):
        own = inside[module]
        if not any(_chooses(name, own) for name in modules):
            continue
        if module in lora:
            raise UserError(
                f"adapter.modules_to_save trains {own} whole, and adapter.targets "
                "adapts it: leave it out of one of the two"
            )
        node = trees.node_at(collection, module.split("/"))
        # A copy, which is trained and given away.
        node[path.rpartition("/")[2]] = jnp.array(weight.astype(jnp.float32))
    return collection


def _chooses(name: str, module: str) -> bool:
    return any(re.fullmatch(name, part) for part in (module, module.rpartition("/")[2]))


def _weights(params: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, child in params.items():
        if isinstance(child, dict):
            yield from _weights(child, f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}", child
