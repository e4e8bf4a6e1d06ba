"""Qwen2.5-VL: pictures of any size, windows in the tower, rotary in two dimensions.

[Qwen2.5-VL](https://arxiv.org/abs/2502.13923). The decoder is Qwen2's with multimodal
rotary: time, row and column each turn a part of a head.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxalign.data.patchers import any_size
from jaxalign.errors import UserError
from jaxalign.models.config import ConnectorConfig, DecoderConfig, VisionConfig
from jaxalign.models.families import fields, qwen2, vision_fields, vision_rules
from jaxalign.models.families.family import Eyes, Family
from jaxalign.models.families.rules import SHARDING, Rule


__all__ = ["FAMILY", "canonical", "multimodal", "read_eyes", "read_text"]

MODEL_TYPE = "qwen2_5_vl"


def read_text(config: Mapping[str, Any], model_type: str = MODEL_TYPE) -> DecoderConfig:
    """Read the decoder, whose fields may stand in config.json itself.

    Args:
      config: config.json.
      model_type: of the family.
    Raises:
      UserError: a field is missing or wrong, or asks for what is not implemented.
    """
    text = config.get("text_config") or config
    inner = vision_fields.filled(
        {k: v for k, v in text.items() if k != "model_type"}, f"{model_type}_text"
    )
    inner["tie_word_embeddings"] = fields.flag(
        config, "tie_word_embeddings"
    ) or fields.flag(text, "tie_word_embeddings")
    return multimodal(inner)


def multimodal(text: dict[str, Any]) -> DecoderConfig:
    """Read a decoder of Qwen2's kind whose positions have three axes.

    Raises:
      UserError: its sections are missing or do not make up half a head.
    """
    name = "rope_scaling" if text.get("rope_scaling") else "rope_parameters"
    rope = {**(text.get(name) or {})}
    sections = rope.pop("mrope_section", None)
    for key in ("type", "rope_type"):
        if rope.get(key) == "mrope":  # what the rule was called once
            rope[key] = "default"
    read = qwen2.read_text({**text, name: rope})
    good = isinstance(sections, list) and all(isinstance(n, int) for n in sections)
    if not good or len(sections) != 3 or 2 * sum(sections) != read.head_dim:
        raise UserError(
            "config.json: mrope_section must be three numbers whose sum is half of "
            f"head_dim {read.head_dim}: got {sections!r}"
        )
    rotary = dataclasses.replace(read.rotaries[0], sections=tuple(sections))
    return dataclasses.replace(read, rotaries=(rotary,))


def read_eyes(
    config: Mapping[str, Any], text: DecoderConfig
) -> tuple[VisionConfig, ConnectorConfig]:
    """Read tower and connector.

    Raises:
      UserError: a field is missing or wrong, or asks for what is not implemented.
    """
    given = vision_fields.part(config, "vision_config")
    whole = vision_fields.filled(
        {k: v for k, v in given.items() if k != "model_type"}, f"{MODEL_TYPE}_vision"
    )
    fields.activation(whole, MODEL_TYPE, "hidden_act", "silu")
    fields.expect(whole, MODEL_TYPE, in_channels=3, in_chans=3)
    width, heads = (
        fields.integer(whole, "hidden_size"),
        fields.integer(whole, "num_heads"),
    )
    patch, merge = (
        fields.integer(whole, name) for name in ("patch_size", "spatial_merge_size")
    )
    out = fields.integer(whole, "out_hidden_size")
    if out != text.width or width % heads or width // heads % 4:
        raise UserError(
            f"config.json: out_hidden_size {out} must be the decoder's width "
            f"{text.width}, and hidden_size {width} num_heads {heads} times a multiple "
            "of 4"
        )
    full = whole.get("fullatt_block_indexes")
    if not isinstance(full, list) or not all(isinstance(i, int) for i in full):
        raise UserError(
            f"config.json: fullatt_block_indexes must be a list of layers: got {full!r}"
        )
    window = fields.integer(whole, "window_size") // patch // merge * merge
    tower = VisionConfig(
        width=width,
        mlp_width=fields.integer(whole, "intermediate_size"),
        num_layers=fields.integer(whole, "depth", most=2**16),
        num_heads=heads,
        patch_values=3 * patch * patch,
        frames=fields.integer(whole, "temporal_patch_size"),
        patch_bias=False,
        rotary_theta=10000.0,
        norm="rms",
        activation="silu",
        window=window,
        full_layers=tuple(full),
        names=vision_rules.QWEN,
    )
    joined = width * merge * merge
    connector = ConnectorConfig(
        unit=merge * merge,
        layers=(("mlp_0", joined), ("mlp_2", text.width)),
        norm="rms",
    )
    return tower, connector


def canonical(name: str) -> str:
    """Return the name that a tensor has in transformers 5, for any of three spellings.

    >>> canonical("visual.blocks.0.attn.qkv.weight")
    'model.visual.blocks.0.attn.qkv.weight'
    >>> canonical("model.layers.0.mlp.up_proj.weight")
    'model.language_model.layers.0.mlp.up_proj.weight'
    """
    head, _, rest = name.partition(".")
    if head == "visual":
        return f"model.{name}"
    if head == "model" and rest.split(".")[0] in ("layers", "embed_tokens", "norm"):
        return f"model.language_model.{rest}"
    return name


_TOWER = "model.visual."

FAMILY = Family(
    MODEL_TYPE,
    read_text,
    (
        *vision_rules.text_rules("model.language_model."),
        *vision_rules.tower_rules(
            _TOWER,
            "blocks.{layer}",
            vision_rules.QWEN,
            norms=("norm1", "norm2"),
            norm_bias=False,
            others={},
            plain={"patch_embed.proj.weight": "patch_embedding/kernel"},
        ),
        Rule(f"{_TOWER}merger.ln_q.weight", "connector/norm/scale"),
        *vision_rules.linear_rules(
            {
                f"{_TOWER}merger.mlp.0": "connector/mlp_0",
                f"{_TOWER}merger.mlp.2": "connector/mlp_2",
            }
        ),
    ),
    ignored=(),
    sharding=(*vision_rules.SHARDING, *SHARDING),
    canonical=canonical,
    eyes=Eyes(read_eyes, any_size.AnySize.from_files),
)
