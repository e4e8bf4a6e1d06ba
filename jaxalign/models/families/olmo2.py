"""OLMo 2: norms on the outputs of blocks and over all queries and all keys."""

from collections.abc import Mapping
from typing import Any

from jaxalign.models.config import DecoderConfig
from jaxalign.models.families import fields
from jaxalign.models.families.family import Family
from jaxalign.models.families.rules import decoder_rules


__all__ = ["FAMILY", "read_text"]

MODEL_TYPE = "olmo2"


def read_text(config: Mapping[str, Any]) -> DecoderConfig:
    """Read config.json.

    Raises:
      UserError: a field is missing or of the wrong kind, or asks for an option that is
        not implemented.
    """
    fields.activation(config, MODEL_TYPE, "hidden_act", "silu")
    sizes = fields.sizes(config, eps=1e-5)
    bias = fields.flag(config, "attention_bias")
    return DecoderConfig(
        **sizes,
        rotaries=(fields.rotary(config, sizes["head_dim"]),),
        tie_embeddings=fields.flag(config, "tie_word_embeddings"),
        qkv_bias=bias,
        o_bias=bias,
        norms="output",
        qk_norm="whole",
    )


FAMILY = Family(
    MODEL_TYPE,
    read_text,
    decoder_rules(
        norms=("post_attention_layernorm", "post_feedforward_layernorm"), qk_norm=True
    ),
)
