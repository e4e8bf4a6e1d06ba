"""SmolVLM and Idefics3: tiles of a picture and a small whole of it, pixel shuffle.

[Idefics3](https://arxiv.org/abs/2408.12637), [SmolVLM](https://arxiv.org/abs/2504.05299).
The tower is SigLIP's, the connector joins squares of patches and has one linear layer.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxalign.data.patchers import tiles
from jaxalign.models.config import ConnectorConfig, DecoderConfig, VisionConfig
from jaxalign.models.families import fields, vision_fields, vision_rules
from jaxalign.models.families.family import Eyes, Family
from jaxalign.models.families.rules import SHARDING, Rule


__all__ = ["FAMILY", "read_eyes", "read_text"]

MODEL_TYPE = "idefics3"


def read_text(config: Mapping[str, Any]) -> DecoderConfig:
    """Read the decoder.

    Raises:
      UserError: see ``vision_fields.read_text``.
    """
    return vision_fields.read_text(config, "llama")


def read_eyes(
    config: Mapping[str, Any], text: DecoderConfig
) -> tuple[VisionConfig, ConnectorConfig]:
    """Read tower and connector.

    Raises:
      UserError: a field is missing or wrong, or asks for what is not implemented.
    """
    given = {**vision_fields.part(config, "vision_config")}
    given["model_type"] = f"{config['model_type']}_vision"
    whole = vision_fields.filled(given, given["model_type"])
    tower = vision_fields.read_tower({**whole, "model_type": "siglip_vision_model"})
    shuffle = fields.integer(config, "scale_factor", 2)
    connector = ConnectorConfig(
        unit=shuffle * shuffle, layers=(("proj", text.width),), bias=False
    )
    return dataclasses.replace(tower, last_norm=True), connector


_TOWER = "model.vision_model."

FAMILY = Family(
    MODEL_TYPE,
    read_text,
    (
        *vision_rules.text_rules("model.text_model."),
        *vision_rules.tower_rules(
            _TOWER,
            "encoder.layers.{layer}",
            vision_rules.CLIP,
            others={"post_layernorm": "last_norm"},
            plain=vision_rules.CLIP_EMBEDDINGS,
        ),
        *vision_rules.linear_rules(
            {"model.connector.modality_projection.proj": "connector/proj"}, bias=False
        ),
    ),
    ignored=(
        Rule(f"{_TOWER}embeddings.position_ids", ""),
        Rule("model.text_model.layers.{layer}.self_attn.rotary_emb.inv_freq", ""),
    ),
    sharding=(*vision_rules.SHARDING, *SHARDING),
    eyes=Eyes(read_eyes, tiles.SplitTiles.from_files),
)
