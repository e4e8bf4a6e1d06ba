"""Feedback: segments, judges, pairs, and the rounds that make and use them."""

from typing import TYPE_CHECKING

from jaxalign.lazy import submodules


if TYPE_CHECKING:
    from jaxalign.feedback import (
        annotate,
        asking,
        candidates,
        config,
        decompose,
        gate,
        judges,
        pairing,
        rounds,
        segmenters,
        store,
        votes,
    )

__all__ = [
    "annotate",
    "asking",
    "candidates",
    "config",
    "decompose",
    "gate",
    "judges",
    "pairing",
    "rounds",
    "segmenters",
    "store",
    "votes",
]

__getattr__, __dir__ = submodules(__name__, __all__)
