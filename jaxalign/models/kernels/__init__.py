"""Kernels of attention, one file each, and the choice among them."""

from jaxalign.models.kernels import blocks, choice, cudnn, splash


__all__ = ["blocks", "choice", "cudnn", "splash"]
