"""Qwen3: Llama with norms on the queries and keys of each head."""

from collections.abc import Mapping
from typing import Any

from jaxalign.models.config import DecoderConfig
from jaxalign.models.families import fields
from jaxalign.models.families.family import Family
from jaxalign.models.families.rules import decoder_rules


__all__ = ["FAMILY", "read_text"]

MODEL_TYPE = "qwen3"


def read_text(config: Mapping[str, Any]) -> DecoderConfig:
    """Read config.json.

    Raises:
      UserError: a field is missing or of the wrong kind, or asks for an option that is
        not implemented.
    """
    fields.activation(config, MODEL_TYPE, "hidden_act", "silu")
    sizes = fields.sizes(config, head_dim=128)
    bias = fields.flag(config, "attention_bias")
    return DecoderConfig(
        **sizes,
        rotaries=(fields.rotary(config, sizes["head_dim"]),),
        windows=fields.late_windows(config, sizes["num_layers"]),
        tie_embeddings=fields.flag(config, "tie_word_embeddings"),
        qkv_bias=bias,
        o_bias=bias,
        qk_norm="head",
    )


FAMILY = Family(MODEL_TYPE, read_text, decoder_rules(qk_norm=True))
