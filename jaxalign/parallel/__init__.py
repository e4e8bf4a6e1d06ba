"""Meshes and placement."""

from typing import TYPE_CHECKING

from jaxalign.lazy import submodules


if TYPE_CHECKING:
    from jaxalign.parallel import (
        mesh,
        multihost,
        sharding,
    )

__all__ = [
    "mesh",
    "multihost",
    "sharding",
]

__getattr__, __dir__ = submodules(__name__, __all__)
