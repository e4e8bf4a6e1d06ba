"""What the tensors of a PEFT adapter's file are, by their names.

``base_model.model.<module>.`` and then ``lora_A.weight``, ``lora_B.weight``,
``lora_B.bias``, ``lora_embedding_A``, ``lora_embedding_B``, ``lora_magnitude_vector``,
``token_adapter.trainable_tokens_delta``, or, of a module that is saved whole, the
names of its own tensors. Files that were saved by hand have the adapter's name in them
too, ``lora_A.default.weight``; modules that are wrapped, ``base_layer`` and the like.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxalign.errors import UserError


__all__ = ["PREFIX", "PeftTensors", "modules", "saves", "sort"]

PREFIX = "base_model.model."

_LORA = re.compile(
    r"(?P<module>.+)\.(?:"
    r"(?P<factor>lora_[AB])(?:\.(?!weight$|bias$)[^.]+)?\.(?P<leaf>weight|bias)"
    r"|(?P<other>lora_embedding_[AB]|lora_magnitude_vector)(?:\.[^.]+)?(?:\.weight)?)"
)
_ROWS = re.compile(r"(.+)\.token_adapter\.trainable_tokens_delta(?:\.[^.]+)?")
_SAVED = re.compile(r"\.modules_to_save\.[^.]+(?=\.)")
_BASE = re.compile(r"\.(token_adapter\.base_layer|base_layer|original_module)(?=\.)")


class PeftTensors(NamedTuple):
    """An adapter's tensors by what they are."""

    lora: dict[str, np.ndarray]
    """Factors, by their whole names without the adapter's."""
    saved: dict[str, np.ndarray]
    """Of modules that are trained whole and of biases, by the model's own names."""
    copies: dict[str, np.ndarray]
    """Of the base model, which the config does not say are trained, likewise."""
    rows: dict[str, np.ndarray]
    """Of embeddings and head, by module."""


def sort(tensors: Mapping[str, np.ndarray], config: Mapping[str, Any]) -> PeftTensors:
    """Tell what each tensor of an adapter is.

    Args:
      tensors: of its files.
      config: adapter_config.json.
    Raises:
      UserError: a name that is no adapter's, two adapters in one file, or nothing for
        what the config says is saved.
    """
    found = PeftTensors({}, {}, {}, {})
    for name, value in tensors.items():
        if not name.startswith(PREFIX):
            raise UserError(
                f"the adapter's tensor {name!r} is not understood: expected names that "
                f"begin with {PREFIX}, as PEFT's save_pretrained writes them"
            )
        kind, key = _kind(name.removeprefix(PREFIX), config)
        if key in getattr(found, kind):
            raise UserError(
                f"the adapter has {key!r} twice, under two adapters' names: got "
                f"{name!r}. Save the one that is meant on its own"
            )
        getattr(found, kind)[key] = value
    for target in targets(config):
        if not any(saves({"modules_to_save": [target]}, name) for name in found.saved):
            raise UserError(
                f"adapter_config.json: modules_to_save names {target!r}, but the "
                "adapter's file holds no such weights: save it again with "
                "save_pretrained"
            )
    if config.get("trainable_token_indices") and not found.rows:
        raise UserError(
            "adapter_config.json: trainable_token_indices names tokens, but the "
            "adapter's file holds no rows for them: save it again with save_pretrained"
        )
    return found


def targets(config: Mapping[str, Any]) -> Sequence[str]:
    """Return the names that ``modules_to_save`` gives."""
    given = config.get("modules_to_save") or ()
    return (given,) if isinstance(given, str) else given


def _kind(name: str, config: Mapping[str, Any]) -> tuple[str, str]:
    if match := _LORA.fullmatch(name):
        own = match["other"] or f"{match['factor']}.{match['leaf']}"
        return "lora", f"{PREFIX}{match['module']}.{own}"
    if match := _ROWS.fullmatch(name):
        return "rows", match[1]
    whole = _SAVED.sub("", name)
    plain = _BASE.sub("", whole)
    trained_bias = plain.endswith(".bias") and config.get("bias") in (
        "all",
        "lora_only",
    )
    # What a wrapper keeps of the base beside its own copy is never trained.
    kept = ".original_module." in whole or ".token_adapter." in whole
    if not kept and (whole != name or trained_bias or saves(config, plain)):
        return "saved", plain
    return "copies", plain


def modules(tensors: Iterable[str]) -> set[str]:
    """Return the modules that LoRA's tensors, by their whole names, belong to."""
    found = (_LORA.fullmatch(name.removeprefix(PREFIX)) for name in tensors)
    return {match["module"] for match in found if match}


def saves(config: Mapping[str, Any], tensor: str) -> bool:
    """Tell whether ``modules_to_save`` has the module of a tensor.

    PEFT saves every module whose name ends with one of these, and all that is in it.

    >>> saves({"modules_to_save": ["mlp"]}, "model.layers.0.mlp.up_proj.weight")
    True
    """
    parts = tensor.split(".")[:-1]
    modules = [".".join(parts[: i + 1]) for i in range(len(parts))]
    ends = tuple(targets(config))
    return any(module.endswith(ends) for module in modules)
