"""Models: Linen decoders behind two pure functions."""

from typing import TYPE_CHECKING

from jaxalign import slices
from jaxalign.lazy import submodules


if TYPE_CHECKING:
    from jaxalign.models import (
        attention,
        config,
        decoder,
        families,
        layers,
        quantised,
        rotary,
    )

__all__ = [
    "attention",
    "config",
    "decoder",
    "families",
    "layers",
    "quantised",
    "rotary",
]

__getattr__, __dir__ = submodules(__name__, __all__)

# Weights that are cut by hand are a pytree from here on.
slices.register()
