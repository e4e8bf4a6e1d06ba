"""Preference alignment with two-dimensional feedback (segments × aspects) in JAX.

Every namespace is imported when it is first used, so that ``import jaxalign`` takes a
moment and touches no device.
"""

import importlib
from typing import TYPE_CHECKING, Any


__version__ = "0.1.0"

__all__ = [
    "adapters",
    "checkpoints",
    "data",
    "evaluation",
    "models",
    "objectives",
    "parallel",
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
        models,
        objectives,
        parallel,
        training,
        trees,
        types,
    )


def __getattr__(name: str) -> Any:
    if name in __all__:
        return importlib.import_module(f"jaxalign.{name}")
    raise AttributeError(f"module 'jaxalign' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
