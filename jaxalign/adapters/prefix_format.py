"""Prefixes as files: PEFT's one table where it can say them, our own else.

PEFT keeps a prefix of *all* layers as ``prompt_embeddings`` [P, layers × 2 × kv heads ×
head size], keys (not rotated) before values, and lets the text begin at position P.
Everything else (some layers only, gates, a softmax of its own, the text at position 0)
is kept as ``layers.<i>.key`` and ``.value`` [kv heads, P, head size] with one tensor
for each further leaf, ``layers.<i>.log_gate`` and the like.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxalign import stacks
from jaxalign.adapters import prefix
from jaxalign.errors import UserError


__all__ = ["PrefixFiles", "from_files", "from_peft", "layers_of", "to_files", "to_peft"]

_KINDS = tuple(leaf for leaf in prefix.LEAVES if leaf != "position")
_TENSOR = re.compile(rf"layers\.(0|[1-9][0-9]{{0,8}})\.({'|'.join(_KINDS)})")
_TABLE = "prompt_embeddings"


class PrefixFiles(NamedTuple):
    """Contents of a directory: its config and its tensors."""

    config: dict[str, Any]
    tensors: dict[str, np.ndarray]


def _layers(adapters: Any) -> dict[int, dict[str, np.ndarray]]:
    """Take the stacks apart: the leaves of each layer."""
    found = {}
    for name, tree in adapters.items():
        group = stacks.group_of_name(name)
        assert group is not None
        for i, layer in enumerate(range(*group)):
            found[layer] = {
                leaf: np.asarray(value[i], np.float32)
                for leaf, value in tree["self_attn"].items()
            }
    return found


def to_peft(
    adapters: Any, *, num_layers: int, base_model: str | None = None
) -> tuple[dict[str, Any], dict[str, np.ndarray]] | None:
    """Return config and tensors of a stock PEFT directory, None if PEFT has no such.

    Args:
      adapters: the ``prefix`` collection.
      num_layers: of the model.
      base_model: recorded as where the adapter belongs.
    """
    layers = _layers(adapters)
    heads, length, size = next(iter(layers.values()))["key"].shape
    for leaves in layers.values():
        if set(leaves) != {"key", "value", "position"} or leaves["position"] != -length:
            return None
    if set(layers) != set(range(num_layers)):
        return None
    # [layer, k/v, head, token, size] -> [token, layer, k/v, head, size]
    table = np.stack(
        [np.stack([layers[i]["key"], layers[i]["value"]]) for i in range(num_layers)]
    ).transpose(3, 0, 1, 2, 4)
    config = {
        "peft_type": "PREFIX_TUNING",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "num_virtual_tokens": length,
        "num_layers": num_layers,
        "num_attention_heads": heads,
        "token_dim": heads * size,
        "num_transformer_submodules": 1,
        "encoder_hidden_size": heads * size,
        "prefix_projection": False,
    }
    tensors = {_TABLE: np.ascontiguousarray(table.reshape(length, -1))}
    return dict(sorted(config.items())), tensors


def to_files(
    adapters: Any, *, num_layers: int, base_model: str | None = None
) -> PrefixFiles:
    """Return the contents of ``prefix_config.json`` and ``prefix.safetensors``."""
    layers = _layers(adapters)
    first = next(iter(layers.values()))
    config = {
        "base_model_name_or_path": base_model,
        "format": "jaxalign-prefix-1",
        "num_layers": num_layers,
        "position": float(first["position"]),
        "prefix_length": int(first["key"].shape[1]),
    }
    tensors = {
        f"layers.{layer}.{leaf}": np.array(leaves[leaf], order="C")
        for layer, leaves in sorted(layers.items())
        for leaf in _KINDS
        if leaf in leaves
    }
    return PrefixFiles(config, tensors)


def from_peft(files: PrefixFiles, *, num_layers: int, kv_heads: int) -> PrefixFiles:
    """Bring a PEFT prefix into the form of :func:`to_files`.

    Raises:
      UserError: it is none, or belongs to another model.
    """
    table = files.tensors.get(_TABLE)
    if table is None or table.ndim != 2:
        raise UserError(
            f"the adapter holds no table {_TABLE!r} [tokens, layers × 2 × width]: got "
            f"{sorted(files.tensors)[:3]}"
        )
    length, width = table.shape
    if width % (num_layers * 2 * kv_heads):
        raise UserError(
            f"the prefix is {width} numbers wide, which are not the keys and values of "
            f"{num_layers} layers with {kv_heads} heads: it belongs to another model"
        )
    parts = np.asarray(table, np.float32).reshape(length, num_layers, 2, kv_heads, -1)
    parts = parts.transpose(1, 2, 3, 0, 4)
    tensors = {
        f"layers.{layer}.{leaf}": parts[layer, i]
        for layer in range(num_layers)
        for i, leaf in enumerate(("key", "value"))
    }
    return PrefixFiles({"position": -float(length), "num_layers": num_layers}, tensors)


def layers_of(files: PrefixFiles) -> tuple[int, ...]:
    """Return the layers that have a prefix.

    Raises:
      UserError: a tensor that is no leaf of a prefix.
    """
    return tuple(sorted({_parse(name)[0] for name in files.tensors}))


def _parse(name: str) -> tuple[int, str]:
    match = _TENSOR.fullmatch(name)
    if match is None:
        raise UserError(
            f"the prefix's tensor {name!r} is not understood: expected such as "
            "layers.3.key"
        )
    return int(match.group(1)), match.group(2)


def from_files(
    files: PrefixFiles, *, groups: Any, width: int, kv_heads: int, head_dim: int
) -> dict[str, Any]:
    """Return the ``prefix`` collection of files in the form of :func:`to_files`.

    Args:
      files: config and tensors.
      groups: of the model, cut where the prefix's layers begin and end.
      width: of the stream.
      kv_heads: heads of keys and values.
      head_dim: their size.
    Raises:
      UserError: a tensor that is missing, not understood or of the wrong shape.
    """
    layers: dict[int, dict[str, np.ndarray]] = {}
    for name, value in files.tensors.items():
        layer, leaf = _parse(name)
        layers.setdefault(layer, {})[leaf] = np.asarray(value, np.float32)
    position = files.config.get("position")
    if isinstance(position, bool) or not isinstance(position, int | float):
        raise UserError(
            f"prefix_config.json: position must be a number: got {position!r}"
        )
    last = max(high for _, high in groups) - 1
    kinds = set(next(iter(layers.values()), ()))
    lengths = {
        leaves["key"].shape[1:2] for leaves in layers.values() if "key" in leaves
    }
    if not layers or not {"key", "value"} <= kinds or len(lengths) != 1:
        raise UserError("the prefix needs keys and values of one length in its layers")
    length = lengths.pop()[0] if lengths else 0
    for layer, leaves in layers.items():
        _check_layer(layer, leaves, kinds, last, (width, kv_heads, length, head_dim))
        leaves["position"] = np.asarray(position, np.float32)
    adapters = {}
    for low, high in groups:
        mine = [layers[i] for i in range(low, high) if i in layers]
        if mine and len(mine) != high - low:
            raise ValueError("a group is cut through: load it with other groups")
        if mine:
            leaves = {name: np.stack([leaf[name] for leaf in mine]) for name in mine[0]}
            adapters[stacks.group_name((low, high))] = {"self_attn": leaves}
    return adapters


def _check_layer(
    layer: int,
    leaves: Mapping[str, np.ndarray],
    kinds: set[str],
    last: int,
    sizes: tuple[int, int, int, int],
) -> None:
    width, kv_heads, length, head_dim = sizes
    if layer > last:
        raise UserError(
            f"the prefix is for layer {layer}, but the model's last is {last}: it "
            "belongs to another model"
        )
    if set(leaves) != kinds:
        raise UserError(
            f"the prefix of layer {layer} has {sorted(leaves)}: expected "
            f"{sorted(kinds)}, as other layers have"
        )
    for leaf, value in leaves.items():
        want: tuple[int, ...] = ()
        if leaf in ("key", "value"):
            want = (kv_heads, length, head_dim)
        elif leaf.endswith("_gate") and leaf != "log_gate":
            want = (width,)
        if value.shape != want or 0 in want:
            raise UserError(
                f"the prefix's tensor layers.{layer}.{leaf} has the shape "
                f"{list(value.shape)}: expected {list(want)}. It belongs to another "
                "model"
            )
