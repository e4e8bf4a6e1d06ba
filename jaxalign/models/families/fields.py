"""Fields of config.json, read with care: sizes, numbers, rotary rules, windows."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from jaxalign.errors import UserError
from jaxalign.models.config import Mixture
from jaxalign.models.rotary import SCALINGS, Rotary


__all__ = [
    "activation",
    "expect",
    "flag",
    "integer",
    "late_windows",
    "layer_types",
    "mixture",
    "number",
    "optional_number",
    "rotary",
    "sizes",
    "windows",
]


def expect(config: Mapping[str, Any], family: str, **values: Any) -> None:
    """Refuse options that would change the numbers and are not implemented.

    Args:
      config: config.json.
      family: named in the error.
      **values: what each field may be, None and left out always included; a tuple for
        several.
    Raises:
      UserError: a field is something else.
    """
    for name, allowed in values.items():
        allowed = allowed if isinstance(allowed, tuple) else (allowed,)
        value = config.get(name)
        if value is not None and value not in allowed:
            raise UserError(
                f"config.json: {name} {value!r} is not implemented for {family}: "
                f"expected {' or '.join(map(repr, allowed))}"
            )


def activation(config: Mapping[str, Any], family: str, field: str, name: str) -> None:
    """Refuse another activation of the MLP than a family's.

    Raises:
      UserError: with the one that is implemented.
    """
    known = {"silu": ("silu", "swish"), "gelu_tanh": ("gelu_pytorch_tanh",)}[name]
    if config.get(field, known[0]) not in known:
        raise UserError(
            f"config.json: {field} {config[field]!r} is not implemented for {family}: "
            f"expected {known[0]}"
        )


def sizes(
    config: Mapping[str, Any], *, head_dim: int | None = None, eps: float = 1e-6
) -> dict[str, Any]:
    """Read what all families have: the fields of ``DecoderConfig`` for it.

    Args:
      config: config.json.
      head_dim: default of the family; None is hidden_size / num_attention_heads.
      eps: of the norms, where it is left out.
    Raises:
      UserError: a field is missing, of the wrong kind, or does not fit another.
    """
    width = integer(config, "hidden_size")
    heads = integer(config, "num_attention_heads")
    kv_heads = integer(config, "num_key_value_heads", heads)
    size = integer(config, "head_dim", head_dim or width // heads)
    if heads % kv_heads or size % 2 or not 2 <= size <= 2**16:
        raise UserError(
            f"config.json: num_attention_heads {heads} must be a multiple of "
            f"num_key_value_heads {kv_heads}, and head_dim {size} even, from 2 to "
            f"{2**16}"
        )
    return {
        "vocab_size": integer(config, "vocab_size"),
        "width": width,
        "mlp_width": integer(config, "intermediate_size"),
        "num_layers": integer(config, "num_hidden_layers", most=2**16),
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": size,
        "norm_eps": number(config, "rms_norm_eps", eps),
    }


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
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # JSON has one kind of numbers, and some write 128.0
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


def flag(config: Mapping[str, Any], name: str, default: bool = False) -> bool:
    """Return a yes or no of config.json."""
    value = config.get(name)
    if value is not None and not isinstance(value, bool):
        raise UserError(f"config.json: {name} must be true or false: got {value!r}")
    return default if value is None else value


def optional_number(config: Mapping[str, Any], name: str) -> float | None:
    """Return a positive number of config.json, or None where it is null or left out."""
    return None if config.get(name) is None else number(config, name)


def layer_types(config: Mapping[str, Any], default: Sequence[bool]) -> tuple[bool, ...]:
    """Return which layers have a sliding window, from ``layer_types`` if it is given.

    Raises:
      UserError: a type that is not implemented, or not one for each layer.
    """
    found = config.get("layer_types")
    if found is None:
        return tuple(default)
    known = {"sliding_attention": True, "full_attention": False}
    good = isinstance(found, list) and all(
        isinstance(kind, str) and kind in known for kind in found
    )
    if not good or len(found) != len(default):
        raise UserError(
            f"config.json: layer_types must be one of {', '.join(known)} for each of "
            f"the {len(default)} layers: got {found!r}"
        )
    return tuple(known[kind] for kind in found)


def windows(
    config: Mapping[str, Any], sliding: Sequence[bool]
) -> tuple[int | None, ...]:
    """Return the window of each layer, empty if none has one."""
    if config.get("sliding_window") is None or not any(sliding):
        return ()
    window = integer(config, "sliding_window")
    return tuple(window if slides else None for slides in sliding)


def late_windows(config: Mapping[str, Any], num_layers: int) -> tuple[int | None, ...]:
    """Return Qwen's windows: of the layers from ``max_window_layers`` on.

    They count only where ``use_sliding_window`` says so.
    """
    if not flag(config, "use_sliding_window"):
        return ()
    first = 0
    if config.get("max_window_layers") != 0:
        first = integer(config, "max_window_layers", 28)
    return windows(config, layer_types(config, [i >= first for i in range(num_layers)]))


def mixture(config: Mapping[str, Any], *, normalize: bool) -> Mixture:
    """Read how many experts there are and how many a token goes through.

    Raises:
      UserError: a field is missing or wrong.
    """
    name = "num_local_experts" if "num_local_experts" in config else "num_experts"
    experts = integer(config, name, most=2**16)
    per_token = integer(config, "num_experts_per_tok", most=experts)
    return Mixture(experts=experts, per_token=per_token, normalize=normalize)


def rotary(
    config: Mapping[str, Any],
    head_dim: int,
    *,
    theta: float = 10000.0,
    part: str | None = None,
    partial: bool = False,
) -> Rotary:
    """Read a rotary rule: of transformers 5 (``rope_parameters``) or 4.

    Args:
      config: config.json.
      head_dim: size of a head.
      theta: base, where it is left out.
      part: of ``rope_parameters``, for families that have one for each type of layer.
      partial: whether the family rotates a part of each head where it is told to.
    Raises:
      UserError: a field is missing or wrong, or a scaling is not implemented.
    """
    for name in ("rope_parameters", "rope_scaling"):
        value = config.get(name)
        if value is not None and not isinstance(value, Mapping):
            raise UserError(f"config.json: {name} must be an object: got {value!r}")
    # Where a config has both, transformers reads the older one.
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if part is not None and isinstance(rope.get(part), Mapping):
        rope = rope[part]
    theta = number(rope, "rope_theta", number(config, "rope_theta", theta))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if not isinstance(kind, str) or kind not in SCALINGS or kind == "none":
        raise UserError(
            f"config.json: rotary scaling {kind!r} is not implemented: expected "
            f"{', '.join(name for name in SCALINGS if name != 'none')}"
        )
    share = rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    dims = head_dim
    if partial and share is not None:
        dims = int(head_dim * number({"part": share}, "part"))
    elif share not in (None, 1) and kind != "default":  # which ignores it
        raise UserError(
            f"config.json: partial_rotary_factor {share!r} is not implemented: "
            "expected 1"
        )
    if dims % 2 or not 2 <= dims <= head_dim:
        raise UserError(
            f"config.json: partial_rotary_factor {share!r} leaves {dims} of {head_dim} "
            "dimensions, which must be even and from 2 on"
        )
    scaling = _scaling(config, rope, kind, dims)
    return Rotary(theta=theta, dims=dims, kind=kind, scaling=scaling)


_OPTIONAL = {
    "yarn": ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
    "longrope": ("attention_factor",),
}


def _scaling(
    config: Mapping[str, Any], rope: Mapping[str, Any], kind: str, dims: int
) -> tuple[tuple[str, Any], ...]:
    whole = dict(rope)
    for name in ("original_max_position_embeddings", "max_position_embeddings"):
        whole.setdefault(name, config.get(name))
    if whole.get("original_max_position_embeddings") is None:
        whole["original_max_position_embeddings"] = config.get(
            "max_position_embeddings"
        )
    fields: dict[str, Any] = {}
    for name in SCALINGS[kind]:
        if name in ("short_factor", "long_factor"):
            fields[name] = _factors(whole, name, dims // 2)
        else:
            fields[name] = number(whole, name)
    for name in _OPTIONAL.get(kind, ()):
        if (value := optional_number(whole, name)) is not None:
            fields[name] = value
    if kind == "yarn":
        truncate = whole.get("truncate")
        fields["truncate"] = True if truncate is None else flag(whole, "truncate")
    if kind == "longrope":
        most = number(config, "max_position_embeddings")
        fields["factor"] = most / fields["original_max_position_embeddings"]
    if kind == "llama3" and fields["high_freq_factor"] <= fields["low_freq_factor"]:
        raise UserError(
            "config.json: high_freq_factor must be above low_freq_factor: got "
            f"{fields['high_freq_factor']} and {fields['low_freq_factor']}"
        )
    return tuple(sorted(fields.items()))


def _factors(rope: Mapping[str, Any], name: str, count: int) -> tuple[float, ...]:
    values = rope.get(name)
    if not isinstance(values, list) or len(values) != count:
        raise UserError(
            f"config.json: {name} must be {count} numbers, one for each pair of "
            f"dimensions: got {values!r}"
        )
    return tuple(number({name: value}, name) for value in values)
