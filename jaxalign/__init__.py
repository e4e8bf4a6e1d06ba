"""Preference alignment with two-dimensional feedback (segments × aspects) in JAX.

Every namespace is imported when it is first used, so that ``import jaxalign`` takes a
moment and touches no device.
"""

import importlib
from typing import TYPE_CHECKING, Any

from jaxalign.lazy import submodules


__all__ = [
    "adapters",
    "checkpoints",
    "data",
    "evaluation",
    "feedback",
    "generation",
    "judging",
    "load_hf",
    "models",
    "objectives",
    "parallel",
    "reports",
    "save_hf",
    "training",
    "trees",
    "types",
]

if TYPE_CHECKING:
    from jaxalign import (
        adapters,
        checkpoints,
        data,
        evaluation,
        feedback,
        generation,
        judging,
        models,
        objectives,
        parallel,
        reports,
        training,
        trees,
        types,
    )
    from jaxalign.checkpoints.export import save_hf
    from jaxalign.checkpoints.load import load as load_hf

    __version__: str

_submodule, _ = submodules(__name__, __all__)

_FUNCTIONS = {"load_hf": ("load", "load"), "save_hf": ("export", "save_hf")}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib import metadata

        # That of pyproject.toml, which is its only place.
        return metadata.version("jaxalign")
    if name in _FUNCTIONS:
        module, function = _FUNCTIONS[name]
        return getattr(
            importlib.import_module(f"jaxalign.checkpoints.{module}"), function
        )
    return _submodule(name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
