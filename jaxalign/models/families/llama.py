"""Llama: config reading, the map of weight names, sharding rules.

Also right for checkpoints of other names that are this architecture (SmolLM2, ...).
"""

import sys
from collections.abc import Mapping
from typing import Any

from jax.sharding import PartitionSpec as P

from jaxalign.errors import UserError
from jaxalign.models.families.rules import Rule, adapter_sharding
from jaxalign.models.layers import DecoderConfig


__all__ = ["HEAD", "IGNORED", "MODEL_TYPE", "RULES", "SHARDING", "read_config"]

MODEL_TYPE = "llama"

_LAYER = "model.layers.{layer}"

RULES: tuple[Rule, ...] = (
    Rule("model.embed_tokens.weight", "embed_tokens/embedding"),
    *(
        Rule(
            f"{_LAYER}.{block}.{name}.weight",
            f"layers/{block}/{name}/kernel",
            transpose=True,
        )
        for block, names in (
            ("self_attn", ("q_proj", "k_proj", "v_proj", "o_proj")),
            ("mlp", ("gate_proj", "up_proj", "down_proj")),
        )
        for name in names
    ),
    *(
        Rule(f"{_LAYER}.{block}.{name}.bias", f"layers/{block}/{name}/bias")
        for block, names in (
            ("self_attn", ("q_proj", "k_proj", "v_proj", "o_proj")),
            ("mlp", ("gate_proj", "up_proj", "down_proj")),
        )
        for name in names
    ),
    *(
        Rule(f"{_LAYER}.{name}.weight", f"layers/{name}/scale")
        for name in ("input_layernorm", "post_attention_layernorm")
    ),
    Rule("model.norm.weight", "norm/scale"),
    Rule("lm_head.weight", "lm_head/kernel", transpose=True),
)

HEAD = "lm_head.weight"
"""Left unread where the embeddings are tied, as transformers does."""

IGNORED: tuple[Rule, ...] = (
    Rule("model.layers.{layer}.self_attn.rotary_emb.inv_freq", ""),
    Rule("model.rotary_emb.inv_freq", ""),
)
"""Buffers of old checkpoints that are computed, not learned."""

# Columns of what leads into a block and rows of what leads out of it are split over
# ``tensor``; the other axis over ``fsdp``. A stacked leaf has the layer axis in front.
SHARDING: tuple[tuple[str, P], ...] = (
    (r"embed_tokens/embedding", P("tensor", "fsdp")),
    (r"lm_head/kernel", P("fsdp", "tensor")),
    (r"layers_.*/(q|k|v|gate|up)_proj/kernel", P(None, "fsdp", "tensor")),
    (r"layers_.*/(o|down)_proj/kernel", P(None, "tensor", "fsdp")),
    (r"layers_.*/(q|k|v|gate|up)_proj/bias", P(None, "tensor")),
    (r"layers_.*/(o|down)_proj/bias", P(None, None)),
    (r".*norm/scale", P()),
    *adapter_sharding(into="q|k|v|gate|up", out_of="o|down"),
)


def read_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Read config.json, of transformers 4 (``rope_theta``) or 5 (``rope_parameters``).

    Raises:
      UserError: a field is missing or of the wrong kind, or asks for an option that is
        not implemented.
    """
    activation = config.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise UserError(
            f"config.json: hidden_act {activation!r} is not implemented for llama: "
            "expected silu"
        )
    if config.get("pretraining_tp", 1) not in (1, None):
        raise UserError(
            f"config.json: pretraining_tp {config['pretraining_tp']!r} is not "
            "implemented: expected 1"
        )
    width = integer(config, "hidden_size")
    heads = integer(config, "num_attention_heads")
    kv_heads = integer(config, "num_key_value_heads", heads)
    head_dim = integer(config, "head_dim", width // heads)
    if heads % kv_heads or head_dim % 2 or not 2 <= head_dim <= 2**16:
        raise UserError(
            f"config.json: num_attention_heads {heads} must be a multiple of "
            f"num_key_value_heads {kv_heads}, and head_dim {head_dim} even, from 2 to "
            f"{2**16}"
        )
    theta, scaling = _rope(config)
    return DecoderConfig(
        vocab_size=integer(config, "vocab_size"),
        width=width,
        mlp_width=integer(config, "intermediate_size"),
        num_layers=integer(config, "num_hidden_layers", most=2**16),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        norm_eps=number(config, "rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        tie_embeddings=flag(config, "tie_word_embeddings"),
        attention_bias=flag(config, "attention_bias"),
        mlp_bias=flag(config, "mlp_bias"),
    )


def integer(
    config: Mapping[str, Any],
    name: str,
    default: int | None = None,
    *,
    most: int = 2**31 - 1,
) -> int:
    """Return a positive whole number of config.json."""
    value = config.get(name)
    if value is None and default is not None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise UserError(
            f"config.json: {name} must be a whole number from 1 to {most}: got "
            f"{value!r}"
        )
    return value


def number(config: Mapping[str, Any], name: str, default: float | None = None) -> float:
    """Return a positive number of config.json."""
    value = config.get(name)
    if value is None and default is not None:
        return default
    if isinstance(value, int | float) and not isinstance(value, bool):
        if 0 < value <= sys.float_info.max:
            return float(value)
    raise UserError(f"config.json: {name} must be a positive number: got {value!r}")


def flag(config: Mapping[str, Any], name: str) -> bool:
    """Return a yes or no of config.json; no where it is left out."""
    value = config.get(name)
    if value is not None and not isinstance(value, bool):
        raise UserError(f"config.json: {name} must be true or false: got {value!r}")
    return bool(value)


_SCALINGS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
}
"""Rotary scalings and the fields that they need."""


def _rope(config: Mapping[str, Any]) -> tuple[float, tuple[tuple[str, Any], ...]]:
    for name in ("rope_parameters", "rope_scaling"):
        value = config.get(name)
        if value is not None and not isinstance(value, Mapping):
            raise UserError(f"config.json: {name} must be an object: got {value!r}")
    # Where a config has both, transformers reads the older one.
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    theta = number(rope, "rope_theta", number(config, "rope_theta", 10000.0))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if not isinstance(kind, str) or kind not in _SCALINGS:
        raise UserError(
            f"config.json: rotary scaling {kind!r} is not implemented: expected "
            f"{', '.join(_SCALINGS)}"
        )
    if kind == "default":
        return theta, ()
    partial = rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if partial not in (None, 1):
        raise UserError(
            f"config.json: partial_rotary_factor {partial!r} is not implemented: "
            "expected 1"
        )
    fields = {name: number(rope, name) for name in _SCALINGS[kind]}
    if kind == "llama3" and fields["high_freq_factor"] <= fields["low_freq_factor"]:
        raise UserError(
            "config.json: high_freq_factor must be above low_freq_factor: got "
            f"{fields['high_freq_factor']} and {fields['low_freq_factor']}"
        )
    return theta, (("rope_type", kind), *sorted(fields.items()))
