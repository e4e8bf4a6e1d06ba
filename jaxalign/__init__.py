"""Preference alignment with two-dimensional feedback (segments × aspects) in JAX.

Every namespace is imported when it is first used, so that ``import jaxalign`` takes a
moment and touches no device::

    import jaxalign

    base = jaxalign.load_hf("smollm2")
    rows = jaxalign.data.records.from_rows([{"prompt": ..., "chosen": ..., ...}])
    config = jaxalign.adapters.lora.LoRAConfig(rank=8)
    lora = jaxalign.adapters.lora.init(key, base.variables["params"], config)

There is one convention for arrays. ``variables`` are collections by name, ``{"params":
..., "lora": ...}``: what a :class:`Model`'s functions, ``save_hf`` and the objectives
take. ``params`` are the base weights alone, ``variables["params"]``: what adapters are
made for and meshes lay out. Each is refused where the other is meant.
What a user gets wrong is a :class:`jaxalign.errors.UserError`, which says the cure.
"""

import importlib
from typing import TYPE_CHECKING, Any

from jaxalign.lazy import submodules


__all__ = [
    "Model",
    "adapters",
    "checkpoints",
    "data",
    "errors",
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
    "variables",
]

if TYPE_CHECKING:
    from jaxalign import (
        adapters,
        checkpoints,
        data,
        errors,
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
        variables,
    )
    from jaxalign.checkpoints.export import save_hf
    from jaxalign.checkpoints.load import load as load_hf
    from jaxalign.types import Model

    __version__: str

_submodule, _ = submodules(__name__, __all__)

_INSIDE = {
    "Model": ("types", "Model"),
    "load_hf": ("checkpoints.load", "load"),
    "save_hf": ("checkpoints.export", "save_hf"),
}
"""What is at the top too, by its module and its name there."""


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib import metadata

        # That of pyproject.toml, which is its only place.
        return metadata.version("jaxalign")
    if name in _INSIDE:
        module, inside = _INSIDE[name]
        return getattr(importlib.import_module(f"jaxalign.{module}"), inside)
    return _submodule(name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
