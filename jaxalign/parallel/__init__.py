"""Meshes and placement."""

from typing import TYPE_CHECKING

from jaxalign.lazy import submodules


if TYPE_CHECKING:
    from jaxalign.parallel import (
        mesh,
        sharding,
    )

__all__ = [
    "mesh",
    "sharding",
]

__getattr__, __dir__ = submodules(__name__, __all__)
