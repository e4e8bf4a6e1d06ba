"""The collection ``saved`` as a PEFT adapter's tensors and config, and back.

See ``adapters.saved`` for what it is and ``adapters.peft_names`` for the names.
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxalign import stacks, trees
from jaxalign.adapters.peft_names import PREFIX, PeftTensors
from jaxalign.adapters.saved import ROWS
from jaxalign.errors import UserError


__all__ = [
    "Place",
    "SavedFiles",
    "TensorForm",
    "from_peft",
    "layer_choices",
    "to_peft",
]


class Place(NamedTuple):
    """Which weight a tensor is."""

    path: str
    """Of the parameter inside its stack, ``self_attn/q_proj/bias``."""
    at: tuple[int, ...]
    """Layer, and expert; empty for what is in no stack."""
    transpose: bool
    reshaped: bool = False
    """Whether the file has it in another shape, as a convolution's weight."""

    def from_file(self, value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """Return a tensor in the form of a weight of this shape, if it is one."""
        value = np.asarray(value, np.float32)
        if self.reshaped and value.size == math.prod(shape):
            value = value.reshape(shape[:: -1 if self.transpose else 1])
        return value.T if self.transpose else value


Locate = Callable[[str], Place | None]
"""Finds the place of a tensor by the model's own name of it."""

TensorForm = Callable[
    [str, tuple[int, ...]], tuple[str, Callable[[np.ndarray], np.ndarray]]
]
"""Gives for path and index of a weight the model's own name of it, and what brings it
into the form of the model's files."""


class SavedFiles(NamedTuple):
    """What of an adapter's files the collection becomes."""

    tensors: dict[str, np.ndarray]
    config: dict[str, Any]
    """Fields of adapter_config.json."""


def layer_choices(
    stored: PeftTensors, locate: Locate, scope: str = ""
) -> list[tuple[int, ...]]:
    """Return for each kind of saved weight the layers that have one.

    Raises:
      UserError: a tensor that is no weight of the model.
    """
    layers: dict[str, set[int]] = {}
    for path, index in _values(stored.saved, locate):
        if index and stacks.scope_of(path) == scope:
            layers.setdefault(path, set()).add(index[0])
    return [tuple(sorted(chosen)) for chosen in layers.values()]


def _values(
    tensors: Mapping[str, np.ndarray], locate: Locate
) -> dict[tuple[str, tuple[int, ...]], tuple[Place, np.ndarray]]:
    found = {}
    for name, value in tensors.items():
        place = locate(name)
        if place is None:
            raise UserError(
                f"the adapter's tensor {PREFIX}{name!s} is neither a LoRA factor nor "
                "a weight of this model: the adapter belongs to another model"
            )
        found[place.path, place.at] = place, value
    return found


def from_peft(
    stored: PeftTensors, config: Mapping[str, Any], *, params: Any, locate: Locate
) -> dict[str, Any]:
    """Return the collection of what an adapter has saved whole or by rows.

    Args:
      stored: its tensors.
      config: adapter_config.json.
      params: shapes of the weights that can be saved (a tied head's too), with groups
        cut by :func:`layer_choices`.
      locate: place of a tensor.
    Raises:
      UserError: a weight of another shape, of some experts only, or rows that the
        config does not name.
    """
    values = _values(stored.saved, locate)
    collection: dict[str, Any] = {}
    for path, leaf in trees.by_path(params).items():
        group, rest = stacks.split(path).group, stacks.unstacked(path)
        axes = {len(index) for name, index in values if name == rest}
        if not axes:
            continue
        keys = list(_keys(rest, group, leaf.shape[: axes.pop()]))
        there = [key for key in keys if key in values]
        if not there:
            continue
        if len(there) != len(keys):
            raise UserError(
                f"the adapter has {rest} saved for some experts or layers of a stack "
                f"only: got {len(there)} of {len(keys)}"
            )
        shape = leaf.shape[len(keys[0][1]) :]
        parts = [place.from_file(v, shape) for place, v in map(values.pop, keys)]
        for part in parts:
            if part.shape != shape:
                raise _resized(rest, part.shape, shape)
        *module, last = path.split("/")
        whole = np.stack(parts).reshape(leaf.shape)
        trees.node_at(collection, module)[last] = whole
    if values:
        raise UserError(
            f"the adapter has {next(iter(values))[0]} saved, of which this model has "
            "no weights"
        )
    for module, rows in stored.rows.items():
        path, leaves = _rows(module, rows, config, params=params, locate=locate)
        trees.node_at(collection, path.split("/")).update(leaves)
    return collection


def _keys(
    rest: str, group: stacks.Group | None, stack: tuple[int, ...]
) -> Iterator[tuple[str, tuple[int, ...]]]:
    if group is None:
        yield rest, ()
        return
    for i in np.ndindex(*stack):
        yield rest, (group[0] + i[0], *i[1:])


def _resized(path: str, got: tuple[int, ...], want: tuple[int, ...]) -> UserError:
    embeds = path.split("/")[0] in ("embed_tokens", "lm_head")
    why = (
        "The base model's vocabulary was resized before the adapter was trained: "
        "resize it likewise (resize_token_embeddings in transformers) and save it with "
        "its tokenizer, or merge the adapter into it with PEFT's merge_and_unload"
        if embeds
        else "It belongs to another model"
    )
    return UserError(
        f"the adapter has {path} saved in the shape {list(got)}, and this model's is "
        f"{list(want)}. {why}"
    )


def _rows(
    module: str,
    rows: np.ndarray,
    config: Mapping[str, Any],
    *,
    params: Any,
    locate: Locate,
) -> tuple[str, dict[str, np.ndarray]]:
    place = locate(f"{module}.weight")
    path = "" if place is None else place.path.rpartition("/")[0]
    if path not in ("embed_tokens", "lm_head"):
        raise UserError(
            f"the adapter has trained tokens of {module}, which is neither this "
            "model's embeddings nor its head"
        )
    given: Any = config.get("trainable_token_indices")
    if isinstance(given, Mapping):
        named = (value for key, value in given.items() if module.endswith(str(key)))
        given = next(named, None)
    width, vocabulary = (
        params["embed_tokens"]["embedding"].shape[::-1]
        if path == "embed_tokens"
        else params["lm_head"]["kernel"].shape
    )
    good = isinstance(given, list) and all(
        isinstance(i, int) and not isinstance(i, bool) and 0 <= i < vocabulary
        for i in given
    )
    if not good or len(set(given)) != len(given):
        raise UserError(
            f"adapter_config.json: trainable_token_indices of {module} must be "
            f"different tokens from 0 to {vocabulary - 1}: got {given!r}"
        )
    if rows.shape != (len(given), width):
        raise UserError(
            f"the adapter has trained tokens of {module} in the shape "
            f"{list(rows.shape)}: expected [{len(given)}, {width}]"
        )
    return path, {
        "rows": np.asarray(rows, np.float32),
        "indices": np.asarray(given, np.int32),
    }


def to_peft(
    collection: Any,
    *,
    tensor_form: TensorForm,
    adapted: Collection[str],
) -> SavedFiles:
    """Return the tensors and config fields of the collection.

    Args:
      collection: ``saved``.
      tensor_form: name and form of a weight in the model's own files.
      adapted: modules that LoRA adapts, which PEFT has wrapped.
    """
    tensors: dict[str, np.ndarray] = {}
    whole: dict[str, str] = {}
    biased: set[str] = set()
    rows: dict[str, list[int]] = {}
    for path, index, leaf in _leaves(collection):
        kind = path.rpartition("/")[2]
        if kind in ROWS:
            stem = path.rpartition("/")[0]
            weight = "embedding" if stem == "embed_tokens" else "kernel"
            module = tensor_form(f"{stem}/{weight}", ())[0].removesuffix(".weight")
            if kind == "indices":
                rows[module] = leaf.tolist()
            else:
                key = f"{PREFIX}{module}.token_adapter.trainable_tokens_delta"
                tensors[key] = np.asarray(leaf, np.float32)
            continue
        name, to_file = tensor_form(path, index)
        module, _, own = name.rpartition(".")
        inner = f"{module}.base_layer" if module in adapted else module
        value = to_file(np.asarray(leaf, np.float32))
        tensors[f"{PREFIX}{inner}.{own}"] = np.ascontiguousarray(value)
        if own == "bias":
            biased.add(module)
        elif module not in adapted:
            whole[module] = path
    config: dict[str, Any] = {}
    if whole:
        config["modules_to_save"] = _module_targets(whole)
    if alone := biased - whole.keys():
        config["bias"] = "lora_only" if alone <= set(adapted) else "all"
    if rows:
        config["trainable_token_indices"] = _token_field(rows)
    return SavedFiles(tensors, config)


def _leaves(collection: Any) -> Iterator[tuple[str, tuple[int, ...], np.ndarray]]:
    for path, leaf in trees.by_path(jax.device_get(collection)).items():
        group, rest = stacks.split(path).group, stacks.unstacked(path)
        if group is None:
            yield rest, (), leaf
            continue
        axes = 2 if "/experts/" in path else 1
        for i in np.ndindex(*leaf.shape[:axes]):
            yield rest, (group[0] + i[0], *i[1:]), leaf[i]


def _module_targets(whole: Mapping[str, str]) -> list[str]:
    """Return names whose ends, as PEFT compares them, are those of these modules only.

    ``norm`` alone would be the end of every layer's norms too: names are whole. What is
    inside of a module that is named is saved with it.
    """
    return sorted(
        module.rpartition(".")[2] if path.startswith(("embed_", "lm_")) else module
        for module, path in whole.items()
        if not any(module.startswith(f"{other}.") for other in whole)
    )


def _token_field(rows: Mapping[str, list[int]]) -> Any:
    named = {module.rpartition(".")[2]: indices for module, indices in rows.items()}
    return named["embed_tokens"] if list(named) == ["embed_tokens"] else named
