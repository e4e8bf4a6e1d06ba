"""Objectives: what is minimised, from arrays up to batches."""

from typing import TYPE_CHECKING

from jaxalign.lazy import submodules


if TYPE_CHECKING:
    from jaxalign.objectives import (
        anchored,
        aspects,
        diagnostics,
        divergences,
        dpo2d,
        logistic,
        logps,
        margins,
        mix,
        objective,
        optimal_transport,
        options,
        pairwise,
        policy,
        record,
        reference_free,
        segment_choice,
        sft,
        stepwise,
        table,
        token_level,
        token_weights,
        unpaired,
    )

__all__ = [
    "anchored",
    "aspects",
    "diagnostics",
    "divergences",
    "dpo2d",
    "logistic",
    "logps",
    "margins",
    "mix",
    "objective",
    "optimal_transport",
    "options",
    "pairwise",
    "policy",
    "record",
    "reference_free",
    "segment_choice",
    "sft",
    "stepwise",
    "table",
    "token_level",
    "token_weights",
    "unpaired",
]

__getattr__, __dir__ = submodules(__name__, __all__)
