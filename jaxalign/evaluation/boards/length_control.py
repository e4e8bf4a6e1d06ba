"""AlpacaEval 2's win rates: weighted, discrete, and controlled for length.

A preference is how sure the judge is that the model's answer beats the baseline's, w
between 0 and 1. The length-controlled win rate is what a logistic model of w says when
both answers are equally long (Dubois et al. 2024, https://arxiv.org/abs/2404.04475;
tatsu-lab/alpaca_eval, ``length_controlled_v1``)::

  logit w_i = length · t_i + difficulty · d_i + model
  t_i = tanh(D_i / sd(D)), D_i = characters of the baseline's answer - of the model's
  d_i = a fixed number for each of the 805 instructions

The three coefficients minimise |length| + |difficulty| + |model| + C × the log loss. In
it the baseline itself, asked to be concise and to be verbose, takes part with 0.1 a row
and without the model's term: that ties ``length`` and ``difficulty`` for all models.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from jaxalign.evaluation.boards.logistic_fit import fit, log_loss, sigmoid
from jaxalign.evaluation.statistics import Figure, bootstrap, mean, share


__all__ = [
    "COSTS",
    "Coefficients",
    "Gamed",
    "LengthControlled",
    "WinRate",
    "control",
    "gamed",
    "length_term",
    "likely_gamed",
    "predict",
    "win_rate",
]

COSTS = tuple(float(cost) for cost in np.logspace(-4, 4, 10))
"""The values of C that cross-validation chooses among."""

Variant = Literal["full", "noreg", "minimal"]
"""``full`` is the board's. ``noreg`` leaves the gamed baselines out (1.1 points off in
the median of 50 models, up to 16), ``minimal`` the difficulties too (4.8, up to 27)."""

_GAMED_WEIGHT = 0.1  # lambda / 2: lambda is 0.2, and there are two gamed baselines
_FOLDS = 5


class WinRate(NamedTuple):
    """How often a model's answers are preferred; shares between 0 and 1."""

    win_rate: Figure
    """The mean of w."""
    discrete_win_rate: Figure
    """(wins + draws / 2) / n."""
    wins: int
    losses: int
    draws: int


def win_rate(preferences: Sequence[float]) -> WinRate:
    """Return the win rates of preferences w between 0 and 1.

    win_rate = mean(w), its standard error sd(w, ddof 1) / sqrt(n); a win is w > 1/2, a
    loss w < 1/2, a draw exactly 1/2. The mean's interval is normal, the other Wilson's.

    >>> found = win_rate([0.9, 0.2, 0.5, 1.0])
    >>> found.win_rate.value, found.discrete_win_rate.value, found.draws
    (0.65, 0.625, 1)
    """
    w = np.asarray(preferences, np.float64)
    wins, losses = int((w > 0.5).sum()), int((w < 0.5).sum())
    draws = len(w) - wins - losses
    return WinRate(mean(w), share(wins + draws / 2, len(w)), wins, losses, draws)


def length_term(
    baseline: Sequence[int] | np.ndarray, model: Sequence[int] | np.ndarray
) -> np.ndarray:
    """Return tanh(D / sd(D)) of D = baseline - model, lengths in code points.

    The standard deviation is over all rows (ddof 1); D is not centred.

    >>> length_term([3, 3, 3], [2, 3, 4]).round(4).tolist()
    [0.7616, 0.0, -0.7616]
    """
    difference = np.asarray(baseline, np.float64) - np.asarray(model, np.float64)
    spread = difference.std(ddof=1) if len(difference) > 1 else 0.0
    # Equal lengths everywhere: there is nothing to control for.
    return np.tanh(difference / spread) if spread else np.zeros_like(difference)


class Gamed(NamedTuple):
    """The baseline's answers that were asked to be concise and to be verbose."""

    features: np.ndarray
    """[g, 2]: length term and difficulty of each row."""
    labels: np.ndarray
    """[g]: w of each row; of these only their moments enter a fit."""
    moments: np.ndarray
    """[2]: the sums of w t and of w d over both sets of answers."""
    weight: float
    """Of a row in the loss."""


_MOMENTS = np.array([-182.71, 412.9])
"""sum w t and sum w d of the published gamed rows. Their preferences are in no
repository; the moments follow from the published coefficients, at which the loss is
stationary (solved for many models: within 0.05 and 0.2)."""


def _labels(features: np.ndarray) -> np.ndarray:
    """Return labels with the moments above, for folds, where rows are left out."""
    return sigmoid(features @ np.array([-1.836, 0.744]))


def gamed(
    difficulty: np.ndarray,
    baseline: Sequence[int] | np.ndarray,
    concise: Sequence[int] | np.ndarray,
    verbose: Sequence[int] | np.ndarray,
) -> Gamed:
    """Return the gamed rows from the lengths of the three sets of answers.

    Args:
      difficulty: of the 805 instructions.
      baseline: characters of the baseline's answers.
      concise: of those that were asked to be concise.
      verbose: of those that were asked to be verbose.
    Example:
      >>> gamed(np.zeros(2), [5, 9], [3, 4], [8, 9]).features.shape
      (4, 2)
    """
    terms = [length_term(baseline, lengths) for lengths in (concise, verbose)]
    return _gamed(np.concatenate(terms), difficulty)


_LIKELY = (
    (1.4188, -0.1617, (-1.2348, -0.6103, -0.0598, 0.5254, 1.2764)),
    (-0.7257, 0.0116, (-1.2348, -0.4262, 0.0609, 0.4763, 1.0433)),
)
"""Of concise and of verbose answers: D / sd(D) lies at a + b d + one of five values,
each as often. Statistics of the published answers' lengths."""


def likely_gamed(difficulty: np.ndarray) -> Gamed:
    """Return gamed rows where their lengths are not known, from their distribution.

    Each row stands for itself with five lengths, a fifth of the weight each. The three
    length-controlled win rates in this project's tests move by less than 0.01 points.

    >>> found = likely_gamed(np.zeros(2))
    >>> found.features.shape, found.weight
    ((20, 2), 0.02)
    """
    terms = [
        np.tanh(start + slope * difficulty + rest)
        for start, slope, rests in _LIKELY
        for rest in rests
    ]
    return _gamed(np.concatenate(terms), difficulty)


def _gamed(terms: np.ndarray, difficulty: np.ndarray) -> Gamed:
    repeats = len(terms) // len(difficulty)
    features = np.stack([terms, np.tile(difficulty, repeats)], 1)
    weight = _GAMED_WEIGHT * 2 / repeats
    return Gamed(features, _labels(features), _MOMENTS, weight)


class Coefficients(NamedTuple):
    """Of the logistic model; of the baseline itself they are 0."""

    length: float
    difficulty: float
    model: float


_BASELINE = Coefficients(0.0, 0.0, 0.0)


class LengthControlled(NamedTuple):
    """A length-controlled win rate, and the fit that it comes from."""

    win_rate: Figure
    """Mean over the instructions of the win rate that is predicted at equal lengths."""
    spread: float
    """sd(predictions, ddof 1) / sqrt(n), what the board calls ``lc_standard_error``. It
    says how unlike the instructions are, not how sure the value is."""
    coefficients: Coefficients
    cost: float
    """C, the weight of the loss beside the penalty."""
    variant: Variant


def predict(
    coefficients: Coefficients,
    difficulty: np.ndarray,
    other: Coefficients = _BASELINE,
) -> tuple[float, float]:
    """Return mean and spread of the win rates predicted at equal lengths.

    mean_i sigmoid((model - other.model) + (difficulty - other.difficulty) d_i)

    Args:
      coefficients: of the model.
      difficulty: of the instructions.
      other: of what it is compared with; default the baseline.
    Example:
      >>> predict(Coefficients(-1.8, 0.8, 0.0), np.zeros(4))
      (0.5, 0.0)
    """
    logits = coefficients.model - other.model
    slope = coefficients.difficulty - other.difficulty
    predictions = sigmoid(logits + slope * difficulty)
    n = len(predictions)
    spread = float(predictions.std(ddof=1) / np.sqrt(n)) if n > 1 else 0.0
    return float(predictions.mean()), spread


class _Rows(NamedTuple):
    """What a fit is over: the gamed rows, then the model's own."""

    features: np.ndarray
    labels: np.ndarray
    weights: np.ndarray
    moments: np.ndarray
    folds: np.ndarray


def _rows(
    preferences: np.ndarray,
    terms: np.ndarray,
    difficulty: np.ndarray | None,
    gamed: Gamed | None,
) -> _Rows:
    columns = [terms, np.ones_like(terms)]
    if difficulty is not None:
        columns.insert(1, difficulty)
    known = ~np.isnan(preferences)  # rows without a preference are only predicted
    features, labels = np.stack(columns, 1)[known], preferences[known]
    weights, moments = np.ones(len(labels)), features.T @ labels
    # By place among the rows: that is what the original's folds of equal groups are.
    folds = np.arange(len(labels)) % _FOLDS
    if gamed is not None:
        n = len(gamed.labels)
        extra = np.column_stack([gamed.features, np.zeros(n)])
        features = np.concatenate([extra, features])
        labels = np.concatenate([gamed.labels, labels])
        weights = np.concatenate([np.full(n, gamed.weight), weights])
        moments = moments + _GAMED_WEIGHT * np.append(gamed.moments, 0.0)
        folds = np.concatenate([np.arange(n) % _FOLDS, folds])
    return _Rows(features, labels, weights, moments, folds)


def _choose_cost(rows: _Rows) -> float:
    """Return the C with the least log loss on the rows that a fit has not seen.

    Five folds, the loss weighted as in the fit. Neighbouring values differ by about
    1e-6 in loss and by up to 0.1 points in the win rate.
    """
    losses = np.zeros(len(COSTS))
    for fold in range(_FOLDS):
        seen = rows.folds != fold
        features, labels, weights = (
            part[seen] for part in (rows.features, rows.labels, rows.weights)
        )
        logits = [
            rows.features[~seen]
            @ fit(features, labels, weights=weights, l1=1 / cost).coefficients
            for cost in COSTS
        ]
        losses += [
            float((rows.weights[~seen] * log_loss(each, rows.labels[~seen])).mean())
            for each in logits
        ]
    return COSTS[int(losses.argmin())]


def control(
    preferences: Sequence[float | None],
    terms: np.ndarray,
    *,
    difficulty: np.ndarray | None = None,
    gamed: Gamed | None = None,
    cost: float | None = None,
    rounds: int = 200,
    seed: int = 0,
) -> LengthControlled:
    """Return the length-controlled win rate of a model.

    Its interval and standard error are by bootstrap: rows are drawn and the model is
    fitted again, at the same C. The board has nothing like it.

    Args:
      preferences: w of each row, None where there is none; such a row is predicted.
      terms: of length, see :func:`length_term`, over all rows.
      difficulty: of the rows' instructions. Without it the variant is ``minimal``.
      gamed: the rows of the gamed baselines. Without them it is ``noreg``.
      cost: C; default by cross-validation, which needs five preferences.
      rounds: of the bootstrap; 0 for none.
      seed: of the bootstrap.
    Example:
      >>> equal = control([0.5, 0.5, 0.5], length_term([3, 3, 3], [2, 3, 4]), cost=1.0)
      >>> equal.win_rate.value, equal.variant
      (0.5, 'minimal')
    """
    w = np.array([np.nan if p is None else p for p in preferences], np.float64)
    if difficulty is None and gamed is not None:
        raise ValueError("the gamed baselines have difficulties: give them of all rows")
    if cost is None and (~np.isnan(w)).sum() < _FOLDS:
        raise ValueError(f"cross-validation needs {_FOLDS} preferences: give a cost")
    if cost is None:
        cost = _choose_cost(_rows(w, terms, difficulty, gamed))
    columns = [w, terms] if difficulty is None else [w, terms, difficulty]
    table = np.stack(columns, 1)

    def win_rate(drawn: np.ndarray) -> float:
        return predict(_fitted(drawn, gamed, cost), _difficulty(drawn))[0]

    coefficients = _fitted(table, gamed, cost)
    value, spread = predict(coefficients, _difficulty(table))
    figure = Figure(value, None, None, len(w))
    if rounds:
        figure = bootstrap(win_rate, table, rounds=rounds, seed=seed)
    variant = "minimal" if difficulty is None else "full" if gamed else "noreg"
    return LengthControlled(figure, spread, coefficients, cost, variant)


def _fitted(table: np.ndarray, gamed: Gamed | None, cost: float) -> Coefficients:
    """Return the coefficients of rows [w, term] or [w, term, difficulty]."""
    difficulty = table[:, 2] if table.shape[1] > 2 else None
    rows = _rows(table[:, 0], table[:, 1], difficulty, gamed)
    found = fit(rows.features, weights=rows.weights, moments=rows.moments, l1=1 / cost)
    length, *rest = found.coefficients.tolist()
    return (
        Coefficients(length, *rest)
        if len(rest) > 1
        else Coefficients(length, 0.0, *rest)
    )


def _difficulty(table: np.ndarray) -> np.ndarray:
    return table[:, 2] if table.shape[1] > 2 else np.zeros(len(table))
