"""Model families: one file each, read by ``model_type``."""

from collections.abc import Mapping
from typing import Any

from jaxalign.errors import UserError
from jaxalign.models.families import (
    gemma2,
    gemma3_text,
    granite,
    idefics3,
    llama,
    llava,
    mistral,
    mixtral,
    olmo2,
    phi3,
    qwen2,
    qwen2_5_vl,
    qwen3,
    qwen3_moe,
    smollm3,
    smolvlm,
)
from jaxalign.models.families.family import Family


__all__ = ["FAMILIES", "Family", "family_of"]

FAMILIES: dict[str, Family] = {
    module.FAMILY.model_type: module.FAMILY
    for module in (
        gemma2,
        gemma3_text,
        granite,
        idefics3,
        llama,
        llava,
        mistral,
        mixtral,
        olmo2,
        phi3,
        qwen2,
        qwen2_5_vl,
        qwen2_5_vl,
        qwen3,
        qwen3_moe,
        smollm3,
        smolvlm,
        smolvlm,
    )
}


def family_of(config: Mapping[str, Any]) -> Family:
    """Return the family that a config.json names.

    Raises:
      UserError: a family that is not implemented; it is never approximated.
    Example:
      >>> from jaxalign.models.families import llama
      >>> family_of({"model_type": "llama"}) is llama.FAMILY
      True
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise UserError(
            f"config.json: model_type {model_type!r} is not supported: expected "
            f"{', '.join(sorted(FAMILIES))}"
        )
    family = FAMILIES[model_type]
    return family if family.narrowed is None else family.narrowed(family, config)
