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
from jaxalign.models.config import DecoderConfig, ModelConfig, VisionConfig
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
      row_patches: places of a row for patches of pictures, of which a tower and a
        connector that are trained keep something.

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
    row_patches: int | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        for field in ("batch_rows", "row_length", "row_patches"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise UserError(f"{field} must be at least 1: got {value}")
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
        ``row_length`` tokens, of tower and connector of ``row_patches`` patches, 0
        below the lowest trained layer. An estimate from the
        sizes of the layers, for remat none a lower bound; what the compiler fuses or
        reorders it does not know.

      The head's logits are not in it: they are never held whole.
    Raises:
      UserError: config.json is not understood, or the adapter does not fit it;
        ``row_patches`` of a model that sees nothing.
    Example::

      config = DescribeConfig(model="smollm2", adapter=LoRAConfig(rank=8))
      print(table(describe(config)))
    """
    model = load_lib.open_config(config.model)[0]
    if config.row_patches is not None and not model.sees:
        raise UserError(
            f"row_patches {config.row_patches} has no effect: {config.model} is no "
            "vision-language model. Leave it out"
        )
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
        _group(config, model, name, variables, kept, backward=i >= lowest)
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
    model: ModelConfig,
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
    floats = 0
    if layers is not None:
        tokens = config.row_length * (layers[1] - layers[0])
        ranks = _ranks(_leaves(variables, name))
        floats = tokens * _floats_a_token(model.text, config.remat, ranks)
    elif name in stacks.SCOPES and config.row_patches:
        floats = _floats_of_sight(config, model, name, variables, kept)
    activations = config.batch_rows * width * floats * backward
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


def _ranks(leaves: list[tuple[str, Any]]) -> int:
    """Sum the ranks of LoRA's layers."""
    ends = ("/a", "/a0")
    return sum(
        leaf.shape[-1]
        for path, leaf in leaves
        if path.startswith("lora/") and path.endswith(ends)
    )


def _floats_of_sight(
    config: DescribeConfig, model: ModelConfig, name: str, variables: Any, kept: Any
) -> int:
    """Estimate what the backward pass keeps of a row's patches."""
    assert model.vision is not None and model.connector is not None
    patches, trained = config.row_patches or 0, _leaves(kept, name)
    if name == "connector":
        outputs = sum(features for _, features in model.connector.layers)
        inputs = model.connector.unit * model.vision.width
        ranks = _ranks(_leaves(variables, name))
        return patches // model.connector.unit * (inputs + outputs + ranks)
    found = [stacks.split(path.partition("/")[2]).group for path, _ in trained]
    lowest = min((0 if group is None else group[0] for group in found), default=0)
    floats = 0
    for stack in filter(None, map(stacks.group_of_name, variables["params"][name])):
        path = f"/{stacks.group_name(stack)}/"
        mine = [pair for pair in _leaves(variables, name) if path in pair[0]]
        layers = stack[1] - stack[0] if stack[0] >= lowest else 0
        each = _floats_a_patch(model.vision, config.remat, _ranks(mine))
        floats += layers * patches * each
    return floats


def _floats_a_patch(tower: VisionConfig, remat: Remat, rank: int) -> int:
    """Estimate what the backward pass keeps of one layer of a tower and patch."""
    d, wide = tower.width, tower.mlp_width * (1 if tower.names.gate is None else 2)
    if remat == "full":
        return d
    dots = d + (3 * d + d + wide + d) + (d + tower.num_heads) + rank
    if remat == "dots":
        return dots
    # Norms before and after scaling, turned queries and keys, the MLP's activation.
    return dots + 4 * d + 2 * d + wide


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
    """Return the description as text, one line a group.

    Args:
      found: see :func:`describe`.
    Example::

      print(table(describe(DescribeConfig(model="smollm2"))))
    """
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
    told = [summary, "", lines[0], *lines[1:-1], lines[-1]]
    for group in found["groups"]:
        name, unknown = group["name"], not group["activations_bytes"]
        if name in stacks.SCOPES and group["backward"] and unknown:
            told.append(
                f"{name} is trained, and what it keeps of pictures is not counted: say "
                "how many patches a row has, --row_patches"
            )
    return "\n".join(told)


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
