"""LLaVA-1.5: a fixed square picture, a tower's second last states, a two-layer MLP.

[LLaVA-1.5](https://arxiv.org/abs/2310.03744). The tower is CLIP's, SigLIP's or
DINOv2's, the decoder Llama or one of its kin.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxalign.data.patchers import square
from jaxalign.models.config import ConnectorConfig, DecoderConfig, VisionConfig
from jaxalign.models.families import fields, vision_fields, vision_rules
from jaxalign.models.families.family import Eyes, Family
from jaxalign.models.families.rules import SHARDING, Rule


__all__ = ["FAMILY", "read_eyes", "read_text"]

MODEL_TYPE = "llava"


def read_text(config: Mapping[str, Any]) -> DecoderConfig:
    """Read the decoder.

    Raises:
      UserError: see ``vision_fields.read_text``.
    """
    # The flag may stand in the part for the text alone, as in older files.
    text = vision_fields.part(config, "text_config")
    tied = fields.flag(config, "tie_word_embeddings") or fields.flag(
        text, "tie_word_embeddings"
    )
    return vision_fields.read_text(config, "llama", tied=tied)


def read_eyes(
    config: Mapping[str, Any], text: DecoderConfig
) -> tuple[VisionConfig, ConnectorConfig]:
    """Read tower and connector.

    Raises:
      UserError: see ``vision_fields.read_tower``.
    """
    fields.expect(
        config,
        MODEL_TYPE,
        projector_hidden_act="gelu",
        vision_feature_select_strategy=("default", "full"),
    )
    given = vision_fields.part(config, "vision_config")
    tower = vision_fields.read_tower(vision_fields.filled(given, "clip_vision_model"))
    run = vision_fields.layers_run(config, tower.num_layers)
    connector = ConnectorConfig(
        unit=1,
        layers=(("linear_1", text.width), ("linear_2", text.width)),
        bias=fields.flag(config, "multimodal_projector_bias", True),
    )
    return dataclasses.replace(tower, num_layers=run), connector


def _canonical(name: str) -> str:
    name = vision_rules.canonical(name)
    for old, new in _DINOV2:
        name = name.replace(old, new)
    return name


_DINOV2 = (
    (".attention.attention.query", ".attention.q_proj"),
    (".attention.attention.key", ".attention.k_proj"),
    (".attention.attention.value", ".attention.v_proj"),
    (".attention.output.dense", ".attention.o_proj"),
)
"""What DINOv2's layers were called before transformers 5."""

_TOWER = "model.vision_tower."

_CLIP_RULES = vision_rules.tower_rules(
    _TOWER,
    "encoder.layers.{layer}",
    vision_rules.CLIP,
    others={"pre_layrnorm": "first_norm"},
    plain={
        "embeddings.class_embedding": "class_token",
        **vision_rules.CLIP_EMBEDDINGS,
    },
)
_DINOV2_RULES = vision_rules.tower_rules(
    _TOWER,
    "encoder.layer.{layer}",
    vision_rules.DINOV2,
    norms=("norm1", "norm2"),
    others={},
    plain={
        "embeddings.cls_token": "class_token",
        "embeddings.patch_embeddings.projection.weight": "patch_embedding/kernel",
        "embeddings.patch_embeddings.projection.bias": "patch_embedding/bias",
        "embeddings.position_embeddings": "positions",
        "encoder.layer.{layer}.layer_scale1.lambda1": "layers/layer_scale1",
        "encoder.layer.{layer}.layer_scale2.lambda1": "layers/layer_scale2",
    },
)
_PROJECTOR = "model.multi_modal_projector."


def _narrowed(family: Family, config: Mapping[str, Any]) -> Family:
    """Return the family with the names of the tower at hand."""
    tower = config.get("vision_config")
    if not isinstance(tower, Mapping) or tower.get("model_type") != "dinov2":
        return family
    rest = [rule for rule in family.rules if rule not in _CLIP_RULES]
    return family._replace(rules=(*rest, *_DINOV2_RULES))


FAMILY = Family(
    MODEL_TYPE,
    read_text,
    (
        *vision_rules.text_rules("model.language_model.", qk_norm=True),
        *_CLIP_RULES,
        *vision_rules.linear_rules(
            {
                f"{_PROJECTOR}linear_1": "connector/linear_1",
                f"{_PROJECTOR}linear_2": "connector/linear_2",
            }
        ),
    ),
    ignored=(
        Rule(f"{_TOWER}embeddings.position_ids", ""),
        Rule(f"{_TOWER}embeddings.mask_token", ""),
        *(
            Rule(f"{_TOWER}{name}.{leaf}", "")
            for name in ("post_layernorm", "layernorm")
            for leaf in ("weight", "bias")
        ),
        Rule("model.language_model.layers.{layer}.self_attn.rotary_emb.inv_freq", ""),
    ),
    sharding=(*vision_rules.SHARDING, *SHARDING),
    canonical=_canonical,
    eyes=Eyes(read_eyes, square.FixedSquare.from_files),
    narrowed=_narrowed,
)
