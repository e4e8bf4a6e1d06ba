"""Evaluation: scoring records, and benchmarks with intervals."""

from typing import TYPE_CHECKING

from jaxalign.lazy import submodules


if TYPE_CHECKING:
    from jaxalign.evaluation import (
        bradley_terry,
        calibration,
        differences,
        length_control,
        logistic_fit,
        published,
        score,
        statistics,
        style,
        task,
        verdicts,
    )

__all__ = [
    "bradley_terry",
    "calibration",
    "differences",
    "length_control",
    "logistic_fit",
    "published",
    "score",
    "statistics",
    "style",
    "task",
    "verdicts",
]

__getattr__, __dir__ = submodules(__name__, __all__)
