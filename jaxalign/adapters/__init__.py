"""Adapters: what is trained instead of the base weights."""

from typing import TYPE_CHECKING

from jaxalign.lazy import submodules


if TYPE_CHECKING:
    from jaxalign.adapters import (
        adapter,
        gates,
        hybrid,
        lora,
        low_rank,
        prefix,
        saved,
        selection,
    )

__all__ = [
    "adapter",
    "gates",
    "hybrid",
    "lora",
    "low_rank",
    "prefix",
    "saved",
    "selection",
]

__getattr__, __dir__ = submodules(__name__, __all__)
