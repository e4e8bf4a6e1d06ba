"""Names of towers and connectors, as families' tables have them."""

import re
from collections.abc import Mapping

from jax.sharding import PartitionSpec as P

from jaxalign.models.config import TowerNames
from jaxalign.models.families.rules import Rule, decoder_rules


__all__ = [
    "CLIP",
    "CLIP_EMBEDDINGS",
    "DINOV2",
    "QWEN",
    "SHARDING",
    "canonical",
    "linear_rules",
    "text_rules",
    "tower_rules",
]

CLIP = TowerNames()
"""Of CLIP, SigLIP and SmolVLM's tower."""

CLIP_EMBEDDINGS = {
    "embeddings.patch_embedding.weight": "patch_embedding/kernel",
    "embeddings.patch_embedding.bias": "patch_embedding/bias",
    "embeddings.position_embedding.weight": "positions",
}
"""What these have before their layers."""

DINOV2 = TowerNames(attention="attention", out="o_proj")

QWEN = TowerNames(
    attention="attn",
    qkv="qkv",
    out="proj",
    up="up_proj",
    gate="gate_proj",
    down="down_proj",
)


def text_rules(prefix: str, *, qk_norm: bool = False) -> tuple[Rule, ...]:
    """Return the table of a decoder that is a part of a model.

    Args:
      prefix: what its tensors' names have for ``model.``.
      qk_norm: whether queries and keys may have norms.
    """
    return tuple(
        rule._replace(hf=prefix + rule.hf.removeprefix("model."))
        if rule.hf.startswith("model.")
        else rule
        for rule in decoder_rules(qk_norm=qk_norm)
    )


def linear_rules(tensors: Mapping[str, str], *, bias: bool = True) -> tuple[Rule, ...]:
    """Return the rows of linear layers: their names in files, and their paths."""
    weights = [
        Rule(f"{hf}.weight", f"{path}/kernel", transpose=True)
        for hf, path in tensors.items()
    ]
    biases = [Rule(f"{hf}.bias", f"{path}/bias") for hf, path in tensors.items()]
    return (*weights, *(biases if bias else ()))


def tower_rules(
    prefix: str,
    layer: str,
    names: TowerNames,
    *,
    norms: tuple[str, str] = ("layer_norm1", "layer_norm2"),
    norm_bias: bool = True,
    others: Mapping[str, str],
    plain: Mapping[str, str] | None = None,
) -> tuple[Rule, ...]:
    """Return the table of a tower.

    Args:
      prefix: of its tensors' names, with the dot.
      layer: of a layer's, behind the prefix; ``{layer}`` is its number.
      names: of its linear layers.
      norms: of a layer.
      norm_bias: whether norms have biases.
      others: paths of other norms by name.
      plain: paths of weights by whole name, stored in other shapes.
    """
    attention = [names.qkv] if names.qkv else [names.query, names.key, names.value]
    mlp = [names.up, names.down, *([names.gate] if names.gate else [])]
    linear = {
        f"{prefix}{layer}.{block}.{name}": f"vision/layers/{block}/{name}"
        for block, inner in ((names.attention, [*attention, names.out]), ("mlp", mlp))
        for name in inner
    }
    scales = {
        f"{prefix}{layer}.{hf}": f"vision/layers/{path}"
        for hf, path in zip(norms, ("norm1", "norm2"), strict=True)
    } | {f"{prefix}{hf}": f"vision/{path}" for hf, path in others.items()}
    return (
        *linear_rules(linear),
        *(Rule(f"{hf}.weight", f"{path}/scale") for hf, path in scales.items()),
        *(
            Rule(f"{hf}.bias", f"{path}/bias")
            for hf, path in scales.items()
            if norm_bias
        ),
        *(
            Rule(f"{prefix}{hf}", f"vision/{path}", path.endswith("kernel"), True)
            for hf, path in (plain or {}).items()
        ),
    )


_PART = re.compile(
    r"(?:model\.)?(vision_tower|multi_modal_projector|image_newline|language_model)\b"
)


def canonical(name: str) -> str:
    """Return the name of LLaVA's kin in transformers 5, for any of four spellings.

    >>> canonical("vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight")
    'model.vision_tower.encoder.layers.0.mlp.fc1.weight'
    >>> canonical("language_model.model.norm.weight")
    'model.language_model.norm.weight'
    >>> canonical("language_model.lm_head.weight")
    'lm_head.weight'
    """
    if _PART.match(name) is None:
        return name
    name = _PART.sub(r"model.\1", name, count=1)
    name = name.replace("model.language_model.model.", "model.language_model.", 1)
    if name.startswith("model.language_model.lm_head"):
        return name.removeprefix("model.language_model.")
    return name.replace("model.vision_tower.vision_model.", "model.vision_tower.", 1)


_INTO = r"q_proj|k_proj|v_proj|qkv|fc1|gate_proj|up_proj"
_OUT_OF = r"out_proj|o_proj|proj|fc2|down_proj"

SHARDING: tuple[tuple[str, P], ...] = (
    (rf"vision/layers_.*/({_INTO})/kernel", P(None, "fsdp", "tensor")),
    (rf"vision/layers_.*/({_OUT_OF})/kernel", P(None, "tensor", "fsdp")),
    (rf"vision/layers_.*/({_INTO})/bias", P(None, "tensor")),
    (rf"vision/layers_.*/({_INTO})/a0?", P(None, "fsdp", None)),
    (rf"vision/layers_.*/({_INTO})/b0?", P(None, None, "tensor")),
    (rf"vision/layers_.*/({_INTO})/magnitude", P(None, "tensor")),
    (rf"vision/layers_.*/({_OUT_OF})/a0?", P(None, "tensor", None)),
    (rf"vision/layers_.*/({_OUT_OF})/b0?", P(None, None, "fsdp")),
    (r"connector/.*/kernel", P("fsdp", "tensor")),
    (r"connector/.*/a0?", P("fsdp", None)),
    (r"connector/.*/b0?", P(None, "tensor")),
    (r"(vision|connector)/.*", P()),
)
"""Of towers and connectors: as of decoders, see ``rules.SHARDING``."""
