"""Mistral: Llama whose layers all have a sliding window."""

from collections.abc import Mapping
from typing import Any

from jaxalign.models.config import DecoderConfig
from jaxalign.models.families import fields
from jaxalign.models.families.rules import HEAD, IGNORED, SHARDING, decoder_rules


__all__ = ["HEAD", "IGNORED", "MODEL_TYPE", "RULES", "SHARDING", "read_config"]

MODEL_TYPE = "mistral"

RULES = decoder_rules(biases=False)


def read_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Read config.json.

    Raises:
      UserError: a field is missing or of the wrong kind, or asks for an option that is
        not implemented.
    """
    fields.activation(config, MODEL_TYPE, "hidden_act", "silu")
    fields.expect(config, MODEL_TYPE, attention_bias=False, mlp_bias=False)
    sizes = fields.sizes(config)
    every = fields.layer_types(config, (True,) * sizes["num_layers"])
    return DecoderConfig(
        **sizes,
        rotaries=(fields.rotary(config, sizes["head_dim"]),),
        windows=fields.windows(config, every),
        tie_embeddings=fields.flag(config, "tie_word_embeddings"),
    )
