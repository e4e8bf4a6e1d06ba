"""Whether variables fit the checkpoint whose form an export takes.

Names, shapes and kinds are compared before anything is written; the numbers as they
pass on their way into the files, of which nothing is left when one is refused.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxalign import stacks, trees
from jaxalign.adapters import adapter, saved
from jaxalign.checkpoints.places import Stacks, stacks_of
from jaxalign.errors import UserError, did_you_mean
from jaxalign.models import decoder
from jaxalign.models.config import ModelConfig
from jaxalign.stacks import Group
from jaxalign.types import Variables


__all__ = ["check", "check_finite", "check_not_transposed"]

_MOST = 5
_SAMPLE = 256


def check(config: ModelConfig, path: Path, variables: Variables) -> Stacks:
    """Compare the names, shapes and kinds of variables with a checkpoint's.

    Args:
      config: of the checkpoint.
      path: its directory, for messages.
      variables: what is to be written.
    Returns:
      How the layers are stacked.
    Raises:
      UserError: a collection, a stack or a leaf that is unknown, missing, of another
        shape or not of floats, each by its path with what was got and expected.
    """
    known = ("params", *adapter.COLLECTIONS)
    for name in variables:
        if name not in known:
            raise UserError(
                f"save_hf: the collection {name!r} has no place in a checkpoint. "
                f"{did_you_mean(str(name), known)} Leave it out"
            )
    params = variables["params"]
    groups = _groups(params, config.text.num_layers, "params")
    vision_groups = None
    if config.vision is not None and isinstance(params.get("vision"), Mapping):
        layers = config.vision.num_layers
        vision_groups = _groups(params["vision"], layers, "params/vision")
    want = trees.by_path(decoder.param_shapes(config, groups, vision_groups))
    got = trees.by_path(params)
    problems = [
        *(f"params/{name} is unknown: {_of(got[name])}" for name in got.keys() - want),
        *(
            f"params/{name} is missing: expected {_of(want[name])}"
            for name in want.keys() - got
        ),
        *(
            f"params/{name}: got {_of(leaf)}, expected {_of(want[name])}"
            for name, leaf in got.items()
            if name in want and not _alike(leaf, want[name])
        ),
        *_lora_problems(variables.get("lora") or {}, want),
        *_saved_problems(variables.get(saved.COLLECTION) or {}, want),
    ]
    if problems:
        told = "; ".join(sorted(problems)[:_MOST])
        more = f"; and {len(problems) - _MOST} more" if len(problems) > _MOST else ""
        raise UserError(
            f"save_hf: the variables do not fit {path}: {told}{more}. Nothing is "
            "written. Give what was loaded from there, with other numbers at most"
        )
    return stacks_of(config, groups, vision_groups)


def _groups(
    params: Mapping[str, Any], num_layers: int, where: str
) -> tuple[Group, ...]:
    found = sorted(g for name in params if (g := stacks.group_of_name(name)))
    ends = [0, *(high for _, high in found)]
    begins = [*(low for low, _ in found), num_layers]
    if ends != begins:
        names = ", ".join(map(stacks.group_name, found)) or "none"
        raise UserError(
            f"save_hf: {where}: got the stacks {names}, expected such as hold each of "
            f"the {num_layers} layers once, as "
            f"{stacks.group_name((0, num_layers))} does"
        )
    return tuple(found)


def _of(leaf: Any) -> str:
    shape, dtype = getattr(leaf, "shape", None), getattr(leaf, "dtype", None)
    if shape is None or dtype is None:
        return type(leaf).__name__
    kind = "floats" if jnp.issubdtype(dtype, jnp.floating) else str(dtype)
    return f"{kind} {list(shape)}"


def _alike(leaf: Any, want: Any) -> bool:
    return _of(leaf) == _of(want)


def _lora_problems(adapters: Any, want: Mapping[str, Any]) -> list[str]:
    """Say which adapters no layer has, or have other sizes than their layer."""
    modules: dict[str, dict[str, Any]] = {}
    for path, leaf in trees.by_path(adapters).items():
        module, _, name = path.rpartition("/")
        modules.setdefault(module, {})[name] = leaf
    problems = []
    for module, leaves in modules.items():
        weight = want.get(f"{module}/kernel", want.get(f"{module}/embedding"))
        if weight is None:
            problems.append(f"lora/{module} is unknown: no layer reads it")
            continue
        for name in ("a", "b", "scale"):
            if name not in leaves:
                problems.append(f"lora/{module}/{name} is missing")
        *stack, width, out = weight.shape
        rank = getattr(leaves.get("a"), "shape", (0,))[-1]
        for name, shape in (("a", (*stack, width, rank)), ("b", (*stack, rank, out))):
            if name in leaves and getattr(leaves[name], "shape", None) != shape:
                problems.append(
                    f"lora/{module}/{name}: got {_of(leaves[name])}, expected floats "
                    f"{list(shape)}"
                )
    return problems


def _saved_problems(collection: Any, want: Mapping[str, Any]) -> list[str]:
    problems = []
    for path, leaf in trees.by_path(collection).items():
        name, place = f"{saved.COLLECTION}/{path}", want.get(path)
        if path.split("/")[-1] in saved.ROWS:
            continue
        if path == "lm_head/kernel" and place is None:
            continue  # the head of tied embeddings, which cannot be merged either
        if place is None:
            problems.append(f"{name} is unknown: no layer reads it")
        elif not _alike(leaf, place):
            problems.append(f"{name}: got {_of(leaf)}, expected {_of(place)}")
    return problems


def check_finite(
    name: str, tensor: np.ndarray, dtype: Any, source: np.ndarray | None
) -> None:
    """Refuse NaN and infinities that the checkpoint's own tensor does not have.

    Args:
      name: of the tensor.
      tensor: as it was held.
      dtype: in which it is stored, and may overflow.
      source: what the checkpoint has of it, if anything.
    Raises:
      UserError: with the first place and what made the number.
    """
    with np.errstate(over="ignore"):
        stored = tensor.astype(dtype, copy=False)
    wrong = ~np.isfinite(stored)
    if source is not None:
        # NaN is unequal to itself.
        wrong &= (source != stored) & ~(np.isnan(source) & np.isnan(stored))
    if not wrong.any():
        return
    at = tuple(map(int, np.argwhere(wrong)[0]))
    why = f"got {tensor[at]}"
    if np.isfinite(tensor[at]):
        why += f", which overflows {np.dtype(dtype)}, the checkpoint's kind,"
    raise UserError(
        f"save_hf: {name} has {int(wrong.sum())} number(s) that are not finite: {why} "
        f"at {list(at)}, expected finite numbers. Nothing is kept of the files. Where "
        "it is meant, give save_hf allow_nonfinite=True"
    )


def check_not_transposed(
    name: str, tensor: np.ndarray, source: np.ndarray | None
) -> None:
    """Refuse a square weight that is twice as near to the transpose of what it was.

    Its shape cannot tell. A weight that was trained on and then transposed is found
    too, while one of all new numbers is as far from the one as from the other. The
    first 256 rows are looked at.

    Raises:
      UserError: with its name and shape.
    """
    if source is None or source.shape != tensor.shape:
        return
    now, itself, turned = (
        part[:_SAMPLE].astype(np.float32) for part in (tensor, source, source.T)
    )
    with np.errstate(invalid="ignore", over="ignore"):
        far = np.square(now - itself).sum(dtype=np.float64)
        near = np.square(now - turned).sum(dtype=np.float64)
    if 4 * near < far:
        raise UserError(
            f"save_hf: {name} is transposed: got the checkpoint's numbers with rows "
            f"and columns exchanged, in a square of {list(tensor.shape)}. Nothing is "
            "kept of the files. Kernels in params are [in, out], as load_hf gives them"
        )
