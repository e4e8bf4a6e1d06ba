"""What an adapter trains and what that costs, from config.json alone."""

import dataclasses
import functools
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxalign import stacks, trees
from jaxalign.adapters.adapter import (
    COLLECTIONS,
    Adapter,
    PeftConfig,
    trained,
)
from jaxalign.adapters.lora import LoRAConfig
from jaxalign.checkpoints import adapter_start, hub, quantisation
from jaxalign.checkpoints import load as load_lib
from jaxalign.checkpoints.adapter_files import AdapterFiles
from jaxalign.configs import check_fields
from jaxalign.errors import UserError
from jaxalign.models import decoder, quantised
from jaxalign.models.config import DecoderConfig
from jaxalign.models.decoder import Remat
from jaxalign.models.quantised import Quantised, Quantize
from jaxalign.training.checks import check_trained
from jaxalign.training.config import check_trainable


__all__ = ["DescribeConfig", "describe", "table"]

_FLOAT32 = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class DescribeConfig:
    """What to describe.

    Attributes:
      model: directory with config.json; weights are not needed.
      adapter: what is trained beside the base weights.
      trainable: patterns of the base weights to train, see ``TrainConfig``.
      dtype: of the frozen weights and of the computation.
      quantize: how the layers' frozen linear weights are held.
      remat: what the backward pass keeps of each layer.
      batch_rows: rows of a micro-batch.
      row_length: places of a row.

    >>> DescribeConfig(model="smollm2").adapter.name
    'lora'
    """

    model: str
    adapter: Adapter = dataclasses.field(default_factory=LoRAConfig)
    trainable: tuple[str, ...] = ()
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    quantize: Quantize = "none"
    remat: Remat = "dots"
    batch_rows: int = 4
    row_length: int = 2048

    def __post_init__(self) -> None:
        check_fields(self)
        for field in ("batch_rows", "row_length"):
            if getattr(self, field) < 1:
                raise UserError(
                    f"{field} must be at least 1: got {getattr(self, field)}"
                )
        check_trainable(self.adapter, self.trainable)


def describe(config: DescribeConfig) -> dict[str, Any]:
    """Count what is trained and estimate the bytes of a training step.

    Returns:
      ``trainable`` and ``total`` numbers, ``stored`` as what codes config.json says the
      weights are (None for plain numbers), and ``groups``: for each stack of layers,
      a tower, its connector, the embeddings, the last norm and the head its name, what
      is trained by kind, and

      * ``weights_bytes``: base weights in ``dtype`` or quantised, with the scales of
        their codes; trained ones and adapters float32;
      * ``optimizer_bytes``: AdamW's two moments, float32, and ``gradient_bytes``;
      * ``activations_bytes``: what the backward pass keeps of ``batch_rows`` ×
        ``row_length`` tokens, 0 below the lowest trained layer. An estimate from the
        sizes of the layers, for remat none a lower bound; what the compiler fuses or
        reorders it does not know.

      The head's logits are not in it: they are never held whole.
    Raises:
      UserError: config.json is not understood, or the adapter does not fit it.
    Example::

      config = DescribeConfig(model="smollm2", adapter=LoRAConfig(rank=8))
      print(table(describe(config)))
    """
    model = load_lib.open_config(config.model)[0]
    if isinstance(config.adapter, PeftConfig):
        files = AdapterFiles(Path(config.adapter.path), config.model)
        params = decoder.param_shapes(model, files.groups(), files.vision_groups())
        made = files.collections()
    else:
        params, made = adapter_start.shapes(config.adapter, model)
    check_trained(params, made, config.trainable, config.quantize)
    variables = {"params": params, **made}
    base = trees.mask_from_patterns(params, config.trainable)
    mask = {**trained(variables), "params": base}
    kept = jax.tree.map(lambda keep, leaf: leaf if keep else None, mask, variables)
    names = ["vision", "connector"] if model.sees else []
    names += ["embed_tokens", *_layer_groups(params)]
    there = {name for tree in variables.values() for name in tree}
    names += [name for name in ("norm", "lm_head") if name in there]
    lowest = next((i for i, n in enumerate(names) if _leaves(kept, n)), len(names))
    groups = [
        _group(config, model.text, name, variables, kept, backward=i >= lowest)
        for i, name in enumerate(names)
    ]
    return {
        "model": Path(config.model).name,
        "stored": _stored(config.model),
        "adapter": config.adapter.name,
        "trainable": sum(group["trainable"] for group in groups),
        "total": trees.num_params(params),
        **{
            name: sum(group[name] for group in groups)
            for name in groups[0]
            if name.endswith("_bytes")
        },
        "groups": groups,
    }


def _stored(model: str) -> str | None:
    """Return as what codes the checkpoint's config.json says its weights are stored."""
    settings = quantisation.read_config(hub.directory_of(model, weights=False))
    return None if settings is None else str(settings.get("quant_method"))


def _layer_groups(params: Any) -> list[str]:
    return sorted(
        (name for name in params if stacks.group_of_name(name)),
        key=lambda name: stacks.group_of_name(name) or (0, 0),
    )


def _leaves(tree: Any, name: str) -> list[tuple[str, Any]]:
    """Return paths and leaves of one group in all collections."""
    part = {k: v[name] for k, v in tree.items() if v.get(name) is not None}
    return list(trees.by_path(part).items())


def _group(
    config: DescribeConfig,
    model: DecoderConfig,
    name: str,
    variables: Any,
    kept: Any,
    *,
    backward: bool,
) -> dict[str, Any]:
    counts: dict[str, int] = dict.fromkeys(
        ("base", "lora", "prefix", "gates", "saved"), 0
    )
    for path, leaf in _leaves(kept, name):
        kind = path.split("/")[0]
        if path.endswith("gate") and kind in COLLECTIONS:
            kind = "gates"
        counts["base" if kind == "params" else kind] += leaf.size
    trainable = sum(counts.values())
    width = jnp.dtype(config.dtype).itemsize
    wide = sum(
        leaf.size
        for path, leaf in _leaves(variables, name)
        if not path.startswith("params/")
    )
    held = jax.eval_shape(
        functools.partial(quantised.quantise_params, kind=config.quantize),
        {name: variables["params"].get(name, {})},
    )
    layers = stacks.group_of_name(name)
    activations = 0
    if layers is not None and backward:
        rank = sum(
            leaf.shape[-1]
            for path, leaf in _leaves(variables, name)
            if path.startswith("lora/") and path.endswith(("/a", "/a0"))
        )
        tokens = config.batch_rows * config.row_length
        activations = tokens * width * (layers[1] - layers[0])
        activations *= _floats_a_token(model, config.remat, rank)
    return {
        "name": name if layers is None else f"layers {layers[0]}-{layers[1] - 1}",
        "trainable": trainable,
        **counts,
        "backward": backward,
        "weights_bytes": _base_bytes(held, width)
        + counts["base"] * (_FLOAT32 - width)
        + wide * _FLOAT32,
        "optimizer_bytes": 2 * _FLOAT32 * trainable,
        "gradient_bytes": _FLOAT32 * trainable,
        "activations_bytes": activations,
    }


def _base_bytes(params: Any, width: int) -> int:
    """Count the bytes of base weights, those of codes as they are."""
    leaves = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, Quantised))
    return sum(
        trees.num_bytes(leaf) if isinstance(leaf, Quantised) else leaf.size * width
        for leaf in leaves
    )


def _floats_a_token(model: DecoderConfig, remat: Remat, rank: int) -> int:
    """Estimate what the backward pass keeps of one layer and token."""
    d, m = model.width, model.mlp_width
    q, kv = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    if remat == "full":
        return d
    # The layer's input, what each linear layer gives, and attention with its log-sums.
    dots = d + (q + 2 * kv + d + 2 * m + d) + (q + model.num_heads) + rank
    if remat == "dots":
        return dots
    # Norms before and after scaling, rotated queries and keys, the MLP's products.
    return dots + 4 * d + (q + kv) + 3 * m


def table(found: dict[str, Any]) -> str:
    """Return the description as text, one line a group."""
    kinds = {"lora": "LoRA", "prefix": "prefix", "gates": "gates"}
    if any(group["saved"] for group in found["groups"]):
        kinds["saved"] = "saved"
    rows = [["group", "trained", *kinds.values(), "weights", "optimiser"]]
    rows[0].append("activations")
    for group in [*found["groups"], {"name": "all", **_sums(found["groups"])}]:
        trainable = f"{group['trainable']:,}" if group["trainable"] else "-"
        rows.append(
            [
                group["name"],
                trainable,
                *(f"{group[k]:,}" if group[k] else "-" for k in kinds),
                *(
                    _size(group[f"{k}_bytes"])
                    for k in ("weights", "optimizer", "activations")
                ),
            ]
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    stored = f" (stored as {found['stored']} codes)" if found["stored"] else ""
    share = 100 * found["trainable"] / found["total"]
    summary = (
        f"{found['model']}{stored}, {found['adapter']}: {found['trainable']:,} beside "
        f"{found['total']:,} base weights are trained ({share:.3g} %)"
    )
    return "\n".join([summary, "", lines[0], *lines[1:-1], lines[-1]])


def _sums(groups: list[dict[str, Any]]) -> dict[str, int]:
    return {
        name: sum(group[name] for group in groups)
        for name in groups[0]
        if name not in ("name", "backward")
    }


def _size(num_bytes: int) -> str:
    if not num_bytes:
        return "-"
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:.1f} {unit}"
    return f"{num_bytes} B"
