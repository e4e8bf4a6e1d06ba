"""Models: Linen decoders and towers behind pure functions."""

from typing import TYPE_CHECKING

from jaxalign import slices
from jaxalign.lazy import submodules


if TYPE_CHECKING:
    from jaxalign.models import (
        attention,
        config,
        decoder,
        decoding,
        families,
        layers,
        quantised,
        rotary,
        vision,
    )

__all__ = [
    "attention",
    "config",
    "decoder",
    "decoding",
    "families",
    "layers",
    "quantised",
    "rotary",
    "vision",
]

__getattr__, __dir__ = submodules(__name__, __all__)

# Weights that are cut by hand are a pytree from here on.
slices.register()
