"""Llama: config reading, the map of weight names, sharding rules.

Also right for checkpoints of other names that are this architecture (SmolLM2, ...).
"""

from collections.abc import Mapping
from typing import Any

from jaxalign.models.config import DecoderConfig
from jaxalign.models.families import fields
from jaxalign.models.families.family import Family
from jaxalign.models.families.rules import decoder_rules


__all__ = ["FAMILY", "read_text"]

MODEL_TYPE = "llama"


def read_text(config: Mapping[str, Any]) -> DecoderConfig:
    """Read config.json, of transformers 4 (``rope_theta``) or 5 (``rope_parameters``).

    Raises:
      UserError: a field is missing or of the wrong kind, or asks for an option that is
        not implemented.
    """
    fields.activation(config, MODEL_TYPE, "hidden_act", "silu")
    fields.expect(config, MODEL_TYPE, pretraining_tp=1)
    sizes = fields.sizes(config)
    bias = fields.flag(config, "attention_bias")
    return DecoderConfig(
        **sizes,
        rotaries=(fields.rotary(config, sizes["head_dim"]),),
        tie_embeddings=fields.flag(config, "tie_word_embeddings"),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=fields.flag(config, "mlp_bias"),
    )


FAMILY = Family(MODEL_TYPE, read_text, decoder_rules())
