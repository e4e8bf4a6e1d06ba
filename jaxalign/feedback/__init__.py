"""Feedback: segments, decompositions, pairs, and the rounds that make and use them."""

from typing import TYPE_CHECKING

from jaxalign.lazy import submodules


if TYPE_CHECKING:
    from jaxalign.feedback import (
        annotate,
        candidates,
        config,
        decompose,
        disentangle,
        disentangle_file,
        distill,
        distill_config,
        distill_estimate,
        distill_file,
        distill_filters,
        examining,
        gate,
        gate_metrics,
        judge_file,
        lessons,
        pair_filters,
        pair_statistics,
        pairing,
        rounds,
        segmenters,
    )

__all__ = [
    "annotate",
    "candidates",
    "config",
    "decompose",
    "disentangle",
    "disentangle_file",
    "distill",
    "distill_config",
    "distill_estimate",
    "distill_file",
    "distill_filters",
    "examining",
    "gate",
    "gate_metrics",
    "judge_file",
    "lessons",
    "pair_filters",
    "pair_statistics",
    "pairing",
    "rounds",
    "segmenters",
]

__getattr__, __dir__ = submodules(__name__, __all__)
