"""Llama: config reading, the map of weight names, sharding rules.

Also right for checkpoints of other names that are this architecture (SmolLM2, ...).
"""

from collections.abc import Mapping
from typing import Any

from jax.sharding import PartitionSpec as P

from jaxalign.errors import UserError
from jaxalign.models.families.rules import Rule
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
    (r"layers_.*/(q|k|v|gate|up)_proj/a", P(None, "fsdp", None)),
    (r"layers_.*/(q|k|v|gate|up)_proj/b", P(None, None, "tensor")),
    (r"layers_.*/(o|down)_proj/a", P(None, "tensor", None)),
    (r"layers_.*/(o|down)_proj/b", P(None, None, "fsdp")),
    (r"lm_head/a", P("fsdp", None)),
    (r"lm_head/b", P(None, "tensor")),
    (r".*/scale", P()),
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
    if heads % kv_heads or head_dim % 2:
        raise UserError(
            f"config.json: num_attention_heads {heads} must be a multiple of "
            f"num_key_value_heads {kv_heads}, and head_dim {head_dim} even"
        )
    theta, scaling = _rope(config)
    return DecoderConfig(
        vocab_size=integer(config, "vocab_size"),
        width=width,
        mlp_width=integer(config, "intermediate_size"),
        num_layers=integer(config, "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        norm_eps=number(config, "rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        tie_embeddings=bool(config.get("tie_word_embeddings", False)),
        attention_bias=bool(config.get("attention_bias", False)),
        mlp_bias=bool(config.get("mlp_bias", False)),
    )


def integer(config: Mapping[str, Any], name: str, default: int | None = None) -> int:
    """Return a positive whole number of config.json."""
    value = config.get(name)
    if value is None and default is not None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(
            f"config.json: {name} must be a positive whole number: got {value!r}"
        )
    return value


def number(config: Mapping[str, Any], name: str, default: float) -> float:
    """Return a positive number of config.json."""
    value = config.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise UserError(f"config.json: {name} must be a positive number: got {value!r}")
    return float(value)


def _rope(config: Mapping[str, Any]) -> tuple[float, tuple[tuple[str, Any], ...]]:
    new = config.get("rope_parameters")
    old = config.get("rope_scaling")
    for name, value in (("rope_parameters", new), ("rope_scaling", old)):
        if value is not None and not isinstance(value, Mapping):
            raise UserError(f"config.json: {name} must be an object: got {value!r}")
    if new:
        theta = number(new, "rope_theta", number(config, "rope_theta", 10000.0))
        scaling = {k: v for k, v in new.items() if k != "rope_theta"}
    else:
        theta = number(config, "rope_theta", 10000.0)
        scaling = dict(old) if old else {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    return theta, () if kind == "default" else tuple(sorted(scaling.items()))
