"""Whether stated confidence is right: Brier score, calibration error, risk, coverage.

Rows without a stated confidence are left out, and counted, by who calls. ``correct`` is
1 or 0, or a share where ties were split.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from jaxalign.errors import UserError
from jaxalign.evaluation.statistics import Figure, bootstrap, mean


__all__ = [
    "Bin",
    "aurc",
    "bins",
    "brier",
    "expected_calibration_error",
    "figures",
    "risk_coverage",
]

Numbers = Sequence[float | int] | np.ndarray
Equal = Literal["width", "mass"]

_POINTS = 100
"""Most points of a kept risk-coverage curve."""


class Bin(NamedTuple):
    """Answers of about one confidence.

    >>> Bin(0.9, 1.0, 2, 0.9, 0.5).n
    2
    """

    low: float
    """Of equal widths: where it begins, itself included. Of equal mass: the smallest
    confidence in it."""
    high: float
    """Of equal widths: where it ends, itself left out but for 1. Of equal mass: the
    largest confidence in it."""
    n: int
    confidence: float | None
    """The mean of what was stated; None where the bin is empty."""
    accuracy: float | None
    """The share that is correct."""


def brier(confidence: Numbers, correct: Numbers) -> Figure:
    """Return the Brier score, ``mean((confidence - correct)²)``; 0 is best.

    Brier 1950, for one outcome: always stating 0.5 gives 0.25.

    Args:
      confidence: stated, 0 to 1.
      correct: 0 to 1.
    Raises:
      UserError: lengths differ, or a value is not within 0 and 1.
    Example:
      >>> round(brier([0.9, 0.9, 0.6, 0.55, 0.1], [1, 0, 1, 1, 0]).value, 6)
      0.2385
    """
    stated, right = _checked(confidence, correct)
    return mean((stated - right) ** 2)


def bins(
    confidence: Numbers, correct: Numbers, count: int = 10, equal: Equal = "width"
) -> list[Bin]:
    """Return the calibration curve: confidence and accuracy of each bin.

    Bin k of equal ``width`` is ``[k/count, (k + 1)/count)``, the last with its end; all
    are returned, empty ones too. Of equal ``mass`` a row's bin is that of the middle of
    its rank: rows that state the same stay together, whatever their order, so that the
    masses differ and fewer bins than ``count`` may be returned.

    Args:
      confidence: stated, 0 to 1.
      correct: 0 to 1.
      count: of bins.
      equal: what the bins have in common.
    Raises:
      UserError: see :func:`brier`.
    Example:
      >>> [b.n for b in bins([0.9, 0.9, 0.6, 0.1], [1, 0, 1, 0], 2)]
      [1, 3]
    """
    stated, right = _checked(confidence, correct)
    if equal == "width":
        edges = np.arange(count + 1) / count
        of_row = np.searchsorted(edges[1:-1], stated, side="right")
        return [
            _bin(low, high, stated[of_row == k], right[of_row == k])
            for k, (low, high) in enumerate(zip(edges[:-1], edges[1:], strict=True))
        ]
    _, members, sizes = np.unique(stated, return_inverse=True, return_counts=True)
    middle = np.cumsum(sizes) - sizes / 2
    of_row = (count * middle / max(1, len(stated))).astype(int)[members]
    return [
        _bin(stated[inside].min(), stated[inside].max(), stated[inside], right[inside])
        for k in range(count)
        if (inside := of_row == k).any()
    ]


def expected_calibration_error(found: Sequence[Bin]) -> float | None:
    """Return ``sum_b n_b/n |accuracy_b - confidence_b|`` of bins; 0 is best.

    Naeini et al. 2015. It depends on the bins, and of few rows it is too large: it is
    told with the bins' counts.

    >>> stated, right = [0.9, 0.9, 0.6, 0.55, 0.1], [1, 0, 1, 1, 0]
    >>> round(expected_calibration_error(bins(stated, right)), 6)
    0.35
    """
    n = sum(b.n for b in found)
    if n == 0:
        return None
    gaps = [
        b.n * abs(b.accuracy - b.confidence)
        for b in found
        if b.accuracy is not None and b.confidence is not None
    ]
    return math.fsum(gaps) / n


def risk_coverage(confidence: Numbers, correct: Numbers) -> list[tuple[float, float]]:
    """Return (coverage, risk) where the k most confident of n rows are answered.

    Coverage is ``k/n``, risk the share of errors among them. Of rows that state the
    same any may come first: risk is the mean over their orders.

    Args:
      confidence: stated, 0 to 1.
      correct: 0 to 1.
    Returns:
      One point for each k from 1 to n.
    Raises:
      UserError: see :func:`brier`.
    Example:
      >>> risk_coverage([0.9, 0.9, 0.6, 0.5], [1, 0, 1, 1])[1:]
      [(0.5, 0.5), (0.75, 0.3333333333333333), (1.0, 0.25)]
    """
    risks = _risks(*_checked(confidence, correct))
    n = len(risks)
    return [(k / n, float(risk)) for k, risk in enumerate(risks, 1)]


def aurc(confidence: Numbers, correct: Numbers) -> float | None:
    """Return the area under the risk-coverage curve, the mean of its n risks.

    Geifman, Uziel and El-Yaniv 2019. A confidence that says nothing gives the error
    rate; it is told beside that.

    >>> round(aurc([0.9, 0.9, 0.6, 0.5], [1, 0, 1, 1]), 6)
    0.395833
    """
    risks = _risks(*_checked(confidence, correct))
    return float(risks.mean()) if len(risks) else None


def figures(
    confidence: Numbers,
    correct: Numbers,
    *,
    count: int = 10,
    rounds: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """Return all of this for ``metrics``, under names that the page knows.

    Args:
      confidence: stated, 0 to 1.
      correct: 0 to 1.
      count: of bins.
      rounds: of the bootstrap by row, for both calibration errors and the area.
      seed: of the bootstrap.
    Returns:
      ``n``; figures ``confidence``, ``accuracy``, ``brier``, ``ece_equal_width``,
      ``ece_equal_mass``, ``aurc``; ``bins`` of both kinds as dicts; ``risk_coverage``
      of at most a hundred points. Drawing rows anew makes a calibration error larger,
      never smaller on average: of few rows its value lies low in its interval.
    Raises:
      UserError: see :func:`brier`.
    Example:
      >>> found = figures([0.9, 0.9, 0.6, 0.55, 0.1], [1, 0, 1, 1, 0], rounds=20)
      >>> round(found["ece_equal_width"].value, 6), found["bins"]["equal_width"][9]["n"]
      (0.35, 2)
    """
    rows = np.stack(_checked(confidence, correct), axis=1)
    curve = risk_coverage(rows[:, 0], rows[:, 1])
    # Equal steps of coverage, the last one included.
    steps = min(_POINTS, len(curve))
    kept = [curve[-(-len(curve) * k // steps) - 1] for k in range(1, steps + 1)]

    def resampled(statistic: Any) -> Figure:
        return bootstrap(statistic, rows, rounds=rounds, seed=seed)

    return {
        "n": len(rows),
        "confidence": mean(rows[:, 0]),
        "accuracy": mean(rows[:, 1]),
        "brier": brier(rows[:, 0], rows[:, 1]),
        "ece_equal_width": resampled(lambda r: _error(r, count, "width")),
        "ece_equal_mass": resampled(lambda r: _error(r, count, "mass")),
        "aurc": resampled(lambda r: float(_risks(r[:, 0], r[:, 1]).mean())),
        "bins": {
            "equal_width": _dicts(bins(rows[:, 0], rows[:, 1], count)),
            "equal_mass": _dicts(bins(rows[:, 0], rows[:, 1], count, "mass")),
        },
        "risk_coverage": [{"coverage": c, "risk": r} for c, r in kept],
    }


def _checked(confidence: Numbers, correct: Numbers) -> tuple[np.ndarray, np.ndarray]:
    stated, right = (np.asarray(x, np.float64) for x in (confidence, correct))
    if stated.shape != right.shape:
        raise UserError(
            f"every answer needs its confidence: got {len(stated)} confidences and "
            f"{len(right)} answers"
        )
    for name, values in (("confidence", stated), ("correct", right)):
        wrong = ~((values >= 0) & (values <= 1))
        if wrong.any():
            row = int(np.flatnonzero(wrong)[0])
            raise UserError(
                f"{name} must be within 0 and 1: row {row} has {values[row]:g}. Divide "
                "percentages by 100; leave out, and count, what was not stated"
            )
    return stated, right


def _bin(low: float, high: float, stated: np.ndarray, right: np.ndarray) -> Bin:
    if not len(stated):
        return Bin(float(low), float(high), 0, None, None)
    means = float(stated.mean()), float(right.mean())
    return Bin(float(low), float(high), len(stated), *means)


def _error(rows: np.ndarray, count: int, equal: Equal) -> float | None:
    return expected_calibration_error(bins(rows[:, 0], rows[:, 1], count, equal))


def _risks(stated: np.ndarray, right: np.ndarray) -> np.ndarray:
    _, members, sizes = np.unique(-stated, return_inverse=True, return_counts=True)
    errors = np.bincount(members, weights=1 - right)
    # Each row of a tie is, on average over the orders, as wrong as all of them.
    expected = np.repeat(errors / sizes, sizes)
    return np.cumsum(expected) / np.arange(1, len(stated) + 1)


def _dicts(found: Sequence[Bin]) -> list[dict[str, Any]]:
    return [b._asdict() for b in found]
