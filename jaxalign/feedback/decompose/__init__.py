"""Decomposers: a response in pieces that a judge can judge, and a score from them."""

from typing import TYPE_CHECKING

from jaxalign.lazy import submodules


if TYPE_CHECKING:
    from jaxalign.feedback.decompose import (
        claims,
        decomposition,
        dream,
        hops,
        observations,
        risks,
        segments,
    )

__all__ = [
    "claims",
    "decomposition",
    "dream",
    "hops",
    "observations",
    "risks",
    "segments",
]

__getattr__, __dir__ = submodules(__name__, __all__)
