"""Phi-3: fused projections, part of each head rotated, LongRoPE."""

from collections.abc import Mapping
from typing import Any

from jaxalign.models.config import DecoderConfig
from jaxalign.models.families import fields
from jaxalign.models.families.family import Family
from jaxalign.models.families.rules import decoder_rules


__all__ = ["FAMILY", "read_text"]

MODEL_TYPE = "phi3"


def read_text(config: Mapping[str, Any]) -> DecoderConfig:
    """Read config.json.

    Raises:
      UserError: a field is missing or of the wrong kind, or asks for an option that is
        not implemented.
    """
    fields.activation(config, MODEL_TYPE, "hidden_act", "silu")
    fields.expect(config, MODEL_TYPE, attention_bias=False)
    sizes = fields.sizes(config, eps=1e-5)
    every = (True,) * sizes["num_layers"]
    return DecoderConfig(
        **sizes,
        rotaries=(fields.rotary(config, sizes["head_dim"], partial=True),),
        windows=fields.windows(config, fields.layer_types(config, every)),
        tie_embeddings=fields.flag(config, "tie_word_embeddings"),
        fused=True,
    )


FAMILY = Family(MODEL_TYPE, read_text, decoder_rules(fused=True, biases=False))
