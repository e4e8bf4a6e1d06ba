"""Logistic regression on soft labels, solved exactly: few coefficients, float64.

What AlpacaEval's length control and Arena-Hard's style control are fits of. The optimum
of a convex function is one point, so that a figure depends on no seed, no step size and
no optimiser's tolerance.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np


__all__ = ["Fit", "fit", "log_loss", "sigmoid"]

_MOST_STEPS = 100
_FAR = 40.0
"""A logit beyond which no probability differs from 0 or 1: classes are separated."""


class Fit(NamedTuple):
    """Coefficients, and whether they are the optimum."""

    coefficients: np.ndarray
    converged: bool
    """False where there is no finite optimum: some sum of columns tells the labels
    apart, and nothing penalises large coefficients."""


def sigmoid(logits: Any) -> np.ndarray:
    """Return 1 / (1 + exp(-logits)).

    >>> float(sigmoid(0.0))
    0.5
    """
    return np.asarray(np.exp(-np.logaddexp(0.0, -np.asarray(logits, np.float64))))


def log_loss(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return -(w log sigmoid(z) + (1 - w) log sigmoid(-z)) of each row.

    >>> log_loss(np.zeros(1), np.array([0.3])).round(4).tolist()
    [0.6931]
    """
    return np.logaddexp(0.0, logits) - labels * logits


def fit(
    features: np.ndarray,
    labels: np.ndarray | None = None,
    *,
    weights: np.ndarray | Sequence[float] | None = None,
    moments: np.ndarray | None = None,
    l1: float = 0.0,
    l2: float = 0.0,
) -> Fit:
    """Minimise sum_i weights_i log_loss(features_i c, labels_i) + l1 |c|_1 + l2/2 |c|².

    The loss is linear in the labels: they enter through their moments sum_i weights_i
    labels_i features_i alone, which may be given instead. Solved by proximal Newton
    steps (Lee, Sun and Saunders 2014, https://arxiv.org/abs/1206.1623), which keep the
    penalties exact, until no coefficient moves by 1e-12.

    Args:
      features: a row each, [n, k]; no intercept is added.
      labels: between 0 and 1.
      weights: of the rows, at least 0; default 1.
      moments: [k], instead of ``labels``.
      l1: what a coefficient's size costs.
      l2: what half of its square costs.
    Example:
      >>> ones = np.ones((4, 1))  # logit of the mean
      >>> fit(ones, np.array([1.0, 0.5, 1.0, 0.5])).coefficients.round(6).tolist()
      [1.098612]
    """
    n, k = features.shape
    weights = np.ones(n) if weights is None else np.asarray(weights, np.float64)
    if moments is None:
        assert labels is not None
        moments = features.T @ (weights * labels)

    def objective(at: np.ndarray) -> float:
        smooth = weights @ np.logaddexp(0.0, features @ at) - moments @ at
        return float(smooth + l1 * np.abs(at).sum() + l2 / 2 * at @ at)

    at = np.zeros(k)
    for _ in range(_MOST_STEPS):
        probability = sigmoid(features @ at)
        slope = features.T @ (weights * probability) - moments + l2 * at
        spread = weights * probability * (1 - probability)
        curvature = (features.T * spread) @ features + l2 * np.eye(k)
        step = _step(at, slope, curvature, l1)
        promised = float(slope @ step + l1 * (np.abs(at + step) - np.abs(at)).sum())
        size, now = 1.0, objective(at)
        rounding = 1e-13 * (
            1.0 + abs(now)
        )  # of a sum: near the optimum it says nothing
        while objective(at + size * step) > now + 1e-4 * size * promised + rounding:
            size /= 2
        at = at + size * step
        if np.abs(size * step).max(initial=0.0) < 1e-12:
            return Fit(at, True)
        if not l1 and not l2 and np.abs(features @ at).max(initial=0.0) > _FAR:
            break
    return Fit(at, False)


def _step(
    at: np.ndarray, slope: np.ndarray, curvature: np.ndarray, l1: float
) -> np.ndarray:
    """Return the minimum of the quadratic model of the loss plus l1 |at + step|_1."""
    # Rows that are all alike, or columns that add up, leave directions without any
    # curvature: too little to show in a result keeps the step finite.
    curvature = curvature + 1e-12 * max(1.0, float(np.trace(curvature))) * np.eye(
        len(at)
    )
    if not l1:
        return np.linalg.solve(curvature, -slope)
    moved = at.copy()
    for _ in range(10_000):  # one coefficient after the other finds which are 0
        for j, bend in enumerate(curvature.diagonal()):
            wanted = bend * moved[j] - slope[j] - curvature[j] @ (moved - at)
            moved[j] = np.sign(wanted) * max(abs(wanted) - l1, 0.0) / bend
        exact = _with_signs(np.sign(moved), at, slope, curvature, l1)
        if exact is not None:
            return exact - at
    return moved - at


def _with_signs(
    signs: np.ndarray,
    at: np.ndarray,
    slope: np.ndarray,
    curvature: np.ndarray,
    l1: float,
) -> np.ndarray | None:
    """Return the minimum of the quadratic model if these are its signs, else None."""
    some = signs != 0
    # The slope of the model at a point x is slope + curvature (x - at).
    base = slope - curvature @ at
    found = np.zeros_like(at)
    found[some] = np.linalg.solve(
        curvature[np.ix_(some, some)], -(base + l1 * signs)[some]
    )
    rest = np.abs(base + curvature @ found)[~some]
    fits = (np.sign(found) == signs).all() and (rest <= l1 * (1 + 1e-12)).all()
    return found if fits else None
