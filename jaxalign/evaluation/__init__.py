"""Evaluation: scoring records, and benchmarks with intervals."""

from typing import TYPE_CHECKING

from jaxalign.lazy import submodules


if TYPE_CHECKING:
    from jaxalign.evaluation import (
        calibration,
        differences,
        published,
        score,
        statistics,
        task,
    )

__all__ = [
    "calibration",
    "differences",
    "published",
    "score",
    "statistics",
    "task",
]

__getattr__, __dir__ = submodules(__name__, __all__)
