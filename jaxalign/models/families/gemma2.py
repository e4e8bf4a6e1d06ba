"""Gemma 2: every other layer slides, scores and logits are capped, four norms."""

from collections.abc import Mapping
from typing import Any

from jaxalign.models.config import DecoderConfig
from jaxalign.models.families import fields
from jaxalign.models.families.family import Family
from jaxalign.models.families.rules import FOUR_NORMS, decoder_rules


__all__ = ["FAMILY", "read_text"]

MODEL_TYPE = "gemma2"


def read_text(config: Mapping[str, Any]) -> DecoderConfig:
    """Read config.json.

    Raises:
      UserError: a field is missing or of the wrong kind, or asks for an option that is
        not implemented.
    """
    fields.activation(config, MODEL_TYPE, "hidden_activation", "gelu_tanh")
    fields.expect(config, MODEL_TYPE, use_bidirectional_attention=False)
    sizes = fields.sizes(config, head_dim=256)
    every_other = [i % 2 == 0 for i in range(sizes["num_layers"])]
    sliding = fields.layer_types(config, every_other)
    bias = fields.flag(config, "attention_bias")
    return DecoderConfig(
        **sizes,
        rotaries=(fields.rotary(config, sizes["head_dim"]),),
        windows=fields.windows({"sliding_window": 4096, **config}, sliding),
        tie_embeddings=fields.flag(config, "tie_word_embeddings", True),
        qkv_bias=bias,
        o_bias=bias,
        norms="both",
        norm_offset=1.0,
        activation="gelu_tanh",
        query_scale=fields.number(config, "query_pre_attn_scalar", 256.0) ** -0.5,
        attention_softcap=fields.optional_number(
            {"attn_logit_softcapping": 50.0, **config}, "attn_logit_softcapping"
        ),
        logits_softcap=fields.optional_number(
            {"final_logit_softcapping": 30.0, **config}, "final_logit_softcapping"
        ),
        embedding_scale=sizes["width"] ** 0.5,
    )


FAMILY = Family(MODEL_TYPE, read_text, decoder_rules(norms=FOUR_NORMS))
