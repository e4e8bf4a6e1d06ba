"""SmolLM3: Llama with every fourth layer left unrotated."""

from collections.abc import Mapping
from typing import Any

from jaxalign.errors import UserError
from jaxalign.models.config import DecoderConfig
from jaxalign.models.families import fields
from jaxalign.models.families.family import Family
from jaxalign.models.families.rules import decoder_rules
from jaxalign.models.rotary import Rotary


__all__ = ["FAMILY", "read_text"]

MODEL_TYPE = "smollm3"


def read_text(config: Mapping[str, Any]) -> DecoderConfig:
    """Read config.json.

    Raises:
      UserError: a field is missing or of the wrong kind, or asks for an option that is
        not implemented.
    """
    fields.activation(config, MODEL_TYPE, "hidden_act", "silu")
    sizes = fields.sizes(config)
    layers = range(sizes["num_layers"])
    every = fields.integer(config, "no_rope_layer_interval", 4)
    rotated = config.get("no_rope_layers") or [
        int((i + 1) % every != 0) for i in layers
    ]
    good = isinstance(rotated, list) and all(kind in (0, 1) for kind in rotated)
    if not good or len(rotated) != len(layers):
        raise UserError(
            "config.json: no_rope_layers must be a 0 or 1 for each of the "
            f"{len(layers)} layers: got {rotated!r}"
        )
    sliding = fields.flag(config, "use_sliding_window")
    sliding = [sliding and not kind for kind in rotated]
    rotary = fields.rotary(config, sizes["head_dim"], theta=2e6)
    still = Rotary(theta=1.0, dims=rotary.dims, kind="none")
    bias = fields.flag(config, "attention_bias")
    return DecoderConfig(
        **sizes,
        rotaries=(still, rotary),
        layer_rotaries=tuple(rotated),
        windows=fields.windows(config, fields.layer_types(config, sliding)),
        tie_embeddings=fields.flag(config, "tie_word_embeddings", True),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=fields.flag(config, "mlp_bias"),
    )


FAMILY = Family(MODEL_TYPE, read_text, decoder_rules())
