"""Evaluation: scoring records, and benchmarks with intervals."""

from typing import TYPE_CHECKING

from jaxalign.lazy import submodules


if TYPE_CHECKING:
    from jaxalign.evaluation import (
        calibration,
        differences,
        length_control,
        logistic_fit,
        published,
        score,
        statistics,
        task,
    )

__all__ = [
    "calibration",
    "differences",
    "length_control",
    "logistic_fit",
    "published",
    "score",
    "statistics",
    "task",
]

__getattr__, __dir__ = submodules(__name__, __all__)
