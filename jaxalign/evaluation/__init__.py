"""Evaluation: scoring records, reports."""

from typing import TYPE_CHECKING

from jaxalign.lazy import submodules


if TYPE_CHECKING:
    from jaxalign.evaluation import (
        score,
    )

__all__ = [
    "score",
]

__getattr__, __dir__ = submodules(__name__, __all__)
