"""PEFT's ``adapter_config.json`` of LoRA: ranks, scales, options that we lack."""

import collections
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxalign.errors import UserError


__all__ = ["MERGE", "check_config", "scale_of", "to_config"]

MERGE = (
    "Merge it into its base model with PEFT and give the result as the model:\n"
    "  model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), "
    "ADAPTER)\n"
    "  model.merge_and_unload().save_pretrained(OUT)"
)
"""The way of what PEFT can merge and we cannot read."""

_UNMERGEABLE = (
    *("PROMPT_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING", "CPT", "CARTRIDGE"),
    *("ADAPTION_PROMPT", "POLY", "XLORA"),
)
"""Kinds of adapter that read their input, which PEFT does not merge either."""

_REFUSED = {
    "fan_in_fan_out": False,
    "use_qalora": False,
    "alora_invocation_tokens": None,
    "layer_replication": None,
    "use_bdlora": None,
    "monteclora_config": None,
    "arrow_config": None,
    "kasa_config": None,
    "velora_config": None,
    "target_parameters": None,
}
"""Options of PEFT that change the numbers, with the value at which they do not."""

_STARTS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")
"""Initialisations that leave the base weights as they are; the others change them."""


def check_config(config: Mapping[str, Any]) -> None:
    """Refuse an adapter_config.json that is not of plain LoRA.

    Raises:
      UserError: another kind of adapter, or an option that is not implemented.
    """
    kind = config.get("peft_type")
    if kind != "LORA":
        merge = "PEFT cannot merge it into a checkpoint either"
        raise UserError(
            f"adapter_config.json: peft_type {kind!r} is not supported: expected LORA "
            f"or PREFIX_TUNING. {merge if kind in _UNMERGEABLE else MERGE}"
        )
    for option, neutral in _REFUSED.items():
        value = config.get(option, neutral)
        if value != neutral and value not in ([], {}, None, False):
            raise UserError(
                f"adapter_config.json: {option}={value!r} is not implemented: expected "
                f"{neutral!r}. {MERGE}"
            )
    _check_saved(config)
    start = config.get("init_lora_weights")
    if start not in _STARTS:
        raise UserError(
            f"adapter_config.json: init_lora_weights={start!r} belongs to base weights "
            "that PEFT changes on loading: save the adapter with "
            "path_initial_model_for_weight_conversion, which makes it plain LoRA"
        )


def _check_saved(config: Mapping[str, Any]) -> None:
    """Check the fields that say what is trained beside LoRA."""
    modules = config.get("modules_to_save")
    good = isinstance(modules, str | None) or (
        isinstance(modules, list) and all(isinstance(name, str) for name in modules)
    )
    if not good:
        raise UserError(
            "adapter_config.json: modules_to_save must be a list of names: got "
            f"{modules!r}"
        )
    if config.get("bias", "none") not in ("none", "all", "lora_only", None):
        raise UserError(
            "adapter_config.json: bias must be none, all or lora_only: got "
            f"{config['bias']!r}"
        )
    for field in ("lora_bias", "use_dora", "use_rslora"):
        if config.get(field) not in (True, False, None):
            raise UserError(
                f"adapter_config.json: {field} must be true or false: got "
                f"{config[field]!r}"
            )


def to_config(
    ranks: Mapping[str, int],
    scales: Mapping[str, float],
    *,
    targets: Mapping[str, Any],
    use_dora: bool,
    lora_bias: bool = False,
    dropout: float,
    base_model: str | None,
) -> dict[str, Any]:
    """Return the config of an adapter, of keys that every PEFT understands.

    Ranks and alphas that differ from the most common ones go to ``rank_pattern`` and
    ``alpha_pattern``.

    Args:
      ranks: by Hugging Face name of the module.
      scales: what ``B A`` is multiplied by, likewise.
      targets: ``target_modules`` and what else says where the adapter is.
      use_dora: whether there are magnitudes.
      lora_bias: whether there are biases.
      dropout: recorded for whoever trains on.
      base_model: recorded as where the adapter belongs.
    """
    rslora = _looks_rslora(ranks, scales)
    alphas = {
        name: _round(scale * (ranks[name] ** 0.5 if rslora else ranks[name]))
        for name, scale in scales.items()
    }
    rank = collections.Counter(ranks.values()).most_common(1)[0][0]
    alpha = collections.Counter(alphas.values()).most_common(1)[0][0]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": dropout,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_rslora": rslora,
        "use_dora": use_dora,
        "rank_pattern": {n: r for n, r in sorted(ranks.items()) if r != rank},
        "alpha_pattern": {n: a for n, a in sorted(alphas.items()) if a != alpha},
        **({"lora_bias": True} if lora_bias else {}),
        **targets,
    }
    return dict(sorted(config.items()))


def _looks_rslora(ranks: Mapping[str, int], scales: Mapping[str, float]) -> bool:
    """Tell whether alphas are rounder as rsLoRA's; both ways say the same scales."""

    def round_ones(power: float) -> int:
        alphas = (
            _round(scale * ranks[name] ** power) for name, scale in scales.items()
        )
        return sum(alpha == int(alpha) for alpha in alphas)

    return round_ones(0.5) > round_ones(1.0)


def _round(alpha: float) -> float:
    """Take back the rounding of float32: 32 / 24 × 24 is 32."""
    near = round(alpha, 4)
    return near if abs(near - alpha) <= 1e-6 * abs(alpha) else alpha


def scale_of(config: Mapping[str, Any], name: str, rank: int) -> np.ndarray:
    """Return what ``B A`` of a module is multiplied by, as float32.

    Raises:
      UserError: its alpha is no number, or the patterns cannot be read.
    """
    alpha = _pattern(config.get("alpha_pattern"), name, config.get("lora_alpha", 8))
    numeric = isinstance(alpha, int | float) and not isinstance(alpha, bool)
    if not numeric or not abs(alpha) <= np.finfo(np.float32).max:
        raise UserError(
            f"adapter_config.json: lora_alpha must be a number: got {alpha!r}"
        )
    divisor = rank**0.5 if config.get("use_rslora") else rank
    return np.asarray(alpha / divisor, np.float32)


def _pattern(patterns: Any, name: str, default: Any) -> Any:
    """Look a module up as PEFT does: a pattern matches the end of its name."""
    if patterns is not None and not isinstance(patterns, Mapping):
        raise UserError(
            f"adapter_config.json: alpha_pattern must be an object: got {patterns!r}"
        )
    for pattern, value in (patterns or {}).items():
        try:
            match = re.fullmatch(rf"(.*\.)?({pattern})", name)
        except re.error as error:
            raise UserError(
                f"adapter_config.json: alpha_pattern {pattern!r} is not a regular "
                f"expression: {error}"
            ) from None
        if match:
            return value
    return default
