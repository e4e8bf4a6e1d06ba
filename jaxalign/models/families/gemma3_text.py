"""Gemma 3, text: five layers in six slide, at a slower turning base of their own."""

from collections.abc import Mapping
from typing import Any

from jaxalign.models.config import DecoderConfig
from jaxalign.models.families import fields
from jaxalign.models.families.family import Family
from jaxalign.models.families.rules import FOUR_NORMS, decoder_rules


__all__ = ["FAMILY", "read_text"]

MODEL_TYPE = "gemma3_text"


def read_text(config: Mapping[str, Any]) -> DecoderConfig:
    """Read config.json.

    Raises:
      UserError: a field is missing or of the wrong kind, or asks for an option that is
        not implemented.
    """
    fields.activation(config, MODEL_TYPE, "hidden_activation", "gelu_tanh")
    fields.expect(config, MODEL_TYPE, use_bidirectional_attention=False)
    sizes = fields.sizes(config, head_dim=256)
    every = fields.integer(config, "sliding_window_pattern", 6)
    sliding = fields.layer_types(
        config, [(i + 1) % every != 0 for i in range(sizes["num_layers"])]
    )
    head_dim = sizes["head_dim"]
    whole = fields.rotary(config, head_dim, theta=1e6, part="full_attention")
    # In the older style only the layers that do not slide are scaled.
    near = {"rope_theta": fields.number(config, "rope_local_base_freq", 10000.0)}
    if "sliding_attention" in (config.get("rope_parameters") or {}):
        near = config
    local = fields.rotary(near, head_dim, part="sliding_attention")
    bias = fields.flag(config, "attention_bias")
    return DecoderConfig(
        **sizes,
        rotaries=(whole, local),
        layer_rotaries=tuple(int(slides) for slides in sliding),
        windows=fields.windows({"sliding_window": 4096, **config}, sliding),
        tie_embeddings=fields.flag(config, "tie_word_embeddings", True),
        qkv_bias=bias,
        o_bias=bias,
        norms="both",
        norm_offset=1.0,
        qk_norm="head",
        activation="gelu_tanh",
        query_scale=fields.number(config, "query_pre_attn_scalar", 256.0) ** -0.5,
        attention_softcap=fields.optional_number(config, "attn_logit_softcapping"),
        logits_softcap=fields.optional_number(config, "final_logit_softcapping"),
        embedding_scale=sizes["width"] ** 0.5,
    )


FAMILY = Family(MODEL_TYPE, read_text, decoder_rules(norms=FOUR_NORMS, qk_norm=True))
