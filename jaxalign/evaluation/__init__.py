"""Evaluation: scoring records, and benchmarks with intervals."""

from typing import TYPE_CHECKING

from jaxalign.lazy import submodules


if TYPE_CHECKING:
    from jaxalign.evaluation import (
        alpaca_files,
        arena_files,
        authors_wording,
        bradley_terry,
        calibration,
        choices,
        compare,
        config,
        delimited,
        differences,
        estimate,
        fastchat,
        figstep_pictures,
        grader_agreement,
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
        safety_grading,
        score,
        shares,
        statistics,
        style,
        task,
        task_files,
        verdicts,
    )

__all__ = [
    "alpaca_files",
    "arena_files",
    "authors_wording",
    "bradley_terry",
    "calibration",
    "choices",
    "compare",
    "config",
    "delimited",
    "differences",
    "estimate",
    "fastchat",
    "figstep_pictures",
    "grader_agreement",
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
    "safety_grading",
    "score",
    "shares",
    "statistics",
    "style",
    "task",
    "task_files",
    "verdicts",
]

__getattr__, __dir__ = submodules(__name__, __all__)
