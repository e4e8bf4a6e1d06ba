"""Granite: Llama with multipliers on embeddings, attention, residuals and logits."""

from collections.abc import Mapping
from typing import Any

from jaxalign.models.config import DecoderConfig
from jaxalign.models.families import fields
from jaxalign.models.families.family import Family
from jaxalign.models.families.rules import decoder_rules


__all__ = ["FAMILY", "read_text"]

MODEL_TYPE = "granite"


def read_text(config: Mapping[str, Any]) -> DecoderConfig:
    """Read config.json.

    Raises:
      UserError: a field is missing or of the wrong kind, or asks for an option that is
        not implemented.
    """
    fields.activation(config, MODEL_TYPE, "hidden_act", "silu")
    sizes = fields.sizes(config)
    bias = fields.flag(config, "attention_bias")
    return DecoderConfig(
        **sizes,
        rotaries=(fields.rotary(config, sizes["head_dim"]),),
        tie_embeddings=fields.flag(config, "tie_word_embeddings"),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=fields.flag(config, "mlp_bias"),
        query_scale=fields.number(config, "attention_multiplier", 1.0),
        embedding_scale=fields.number(config, "embedding_multiplier", 1.0),
        residual_scale=fields.number(config, "residual_multiplier", 1.0),
        logits_divisor=fields.number(config, "logits_scaling", 1.0),
    )


FAMILY = Family(MODEL_TYPE, read_text, decoder_rules())
