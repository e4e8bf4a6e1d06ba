"""Attention: one entry, the mask, the kernels, and the choice and trial of a kernel."""

from jaxalign.models.attention.attend import SAVED_NAMES, attention
from jaxalign.models.attention.choice import Implementation
from jaxalign.models.attention.mask import (
    CacheLayout,
    RowLayout,
    attention_mask,
    both_ways,
    capped,
    lengths,
    row_layout,
)


__all__ = [
    "SAVED_NAMES",
    "CacheLayout",
    "Implementation",
    "RowLayout",
    "attention",
    "attention_mask",
    "both_ways",
    "capped",
    "lengths",
    "row_layout",
]
