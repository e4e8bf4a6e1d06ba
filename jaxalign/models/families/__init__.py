"""Model families: one file each, read by ``model_type``."""

from collections.abc import Mapping
from types import ModuleType
from typing import Any

from jaxalign.errors import UserError
from jaxalign.models.families import llama


__all__ = ["family_of", "llama"]

_FAMILIES: dict[str, ModuleType] = {llama.MODEL_TYPE: llama}


def family_of(config: Mapping[str, Any]) -> ModuleType:
    """Return the module of the family that a config.json names.

    Raises:
      UserError: a family that is not implemented; it is never approximated.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in _FAMILIES:
        raise UserError(
            f"config.json: model_type {model_type!r} is not supported: expected "
            f"{', '.join(sorted(_FAMILIES))}"
        )
    return _FAMILIES[model_type]
