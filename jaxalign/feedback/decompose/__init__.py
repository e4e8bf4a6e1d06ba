"""Decomposers: a response in pieces that a judge can judge, and a score from them."""

from typing import TYPE_CHECKING

from jaxalign.lazy import submodules


if TYPE_CHECKING:
    from jaxalign.feedback.decompose import (
        claims,
        config,
        decomposition,
        dream,
        hops,
        observations,
        risk_scores,
        risks,
        segments,
    )

__all__ = [
    "claims",
    "config",
    "decomposition",
    "dream",
    "hops",
    "observations",
    "risk_scores",
    "risks",
    "segments",
]

__getattr__, __dir__ = submodules(__name__, __all__)
