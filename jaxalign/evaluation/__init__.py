"""Evaluation: scoring records, and benchmarks with intervals."""

from typing import TYPE_CHECKING

from jaxalign.lazy import submodules


if TYPE_CHECKING:
    from jaxalign.evaluation import (
        authors_wording,
        bradley_terry,
        calibration,
        compare,
        config,
        differences,
        estimate,
        fastchat,
        grading,
        harness,
        inspect_log,
        length_control,
        letters,
        logistic_fit,
        measures,
        outcomes,
        published,
        results,
        score,
        statistics,
        style,
        task,
        task_files,
        verdicts,
    )

__all__ = [
    "authors_wording",
    "bradley_terry",
    "calibration",
    "compare",
    "config",
    "differences",
    "estimate",
    "fastchat",
    "grading",
    "harness",
    "inspect_log",
    "length_control",
    "letters",
    "logistic_fit",
    "measures",
    "outcomes",
    "published",
    "results",
    "score",
    "statistics",
    "style",
    "task",
    "task_files",
    "verdicts",
]

__getattr__, __dir__ = submodules(__name__, __all__)
