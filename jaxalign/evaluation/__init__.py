"""Evaluation: scoring records, and benchmarks with intervals."""

from typing import TYPE_CHECKING

from jaxalign.lazy import submodules


if TYPE_CHECKING:
    from jaxalign.evaluation import (
        boards,
        calibration,
        choices,
        compare,
        config,
        contamination,
        delimited,
        differences,
        estimate,
        figstep_pictures,
        grader_agreement,
        grading,
        harness,
        inspect_log,
        joining,
        letters,
        measures,
        observation_agreement,
        outcomes,
        published,
        results,
        safety_grading,
        score,
        shares,
        statistics,
        task,
        task_files,
    )

__all__ = [
    "boards",
    "calibration",
    "choices",
    "compare",
    "config",
    "contamination",
    "delimited",
    "differences",
    "estimate",
    "figstep_pictures",
    "grader_agreement",
    "grading",
    "harness",
    "inspect_log",
    "joining",
    "letters",
    "measures",
    "observation_agreement",
    "outcomes",
    "published",
    "results",
    "safety_grading",
    "score",
    "shares",
    "statistics",
    "task",
    "task_files",
]

__getattr__, __dir__ = submodules(__name__, __all__)
