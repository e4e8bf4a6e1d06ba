"""Models: Linen decoders behind two pure functions."""

from jaxalign import slices
from jaxalign.models import attention, decoder, families, layers, rotary


__all__ = ["attention", "decoder", "families", "layers", "rotary"]

slices.register()
