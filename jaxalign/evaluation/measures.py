"""What grades measure, and how two runs differ in it on the same rows.

A label's share, a mean of numbers, and what is made of correct, incorrect and not
attempted. Apart from :mod:`.compare`, which reads the runs' files.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from jaxalign.evaluation import differences, statistics
from jaxalign.evaluation.grading import f_score
from jaxalign.evaluation.statistics import Figure
from jaxalign.judging.graders import GRADES


__all__ = ["Difference", "Measure", "by_topic", "difference", "of_grades"]

_MOST_LABELS = 12
"""More are texts rather than classes."""


class Measure(NamedTuple):
    """How a grade becomes numbers, and their sums a value.

    >>> Measure("yes", lambda grade: (float(grade == "yes"),)).columns("yes")
    (1.0,)
    """

    name: str
    columns: Callable[[Any], tuple[float, ...]]
    statistic: Callable[[np.ndarray], np.ndarray] | None = None
    """Of sums ``[round, column]``; None for the mean of the one column."""


class Difference(NamedTuple):
    """How one measure of a question differs on the rows that both runs have."""

    measure: str
    """A label, whose share it is; ``mean``; CGA and F of what is graded three ways."""
    baseline: Figure
    run: Figure
    difference: Figure
    """The run's minus the baseline's, with a paired standard error."""
    test: str
    """``mcnemar`` (exact), ``sign_flip`` or ``swap`` (permutations)."""
    p_value: float
    mid_p: float | None = None
    """McNemar's."""
    gained: int | None = None
    """Rows that the run has and the baseline has not, of a share."""
    lost: int | None = None
    topics: Mapping[str, Any] = MappingProxyType({})
    """The same on the rows of each topic, as :class:`Difference`."""
    adjusted: float | None = None
    """Of a topic: its p-value after Holm's correction over the topics."""


def of_grades(grades: Sequence[Any]) -> list[Measure]:
    """Return what can be measured of grades.

    Args:
      grades: of both runs.
    Returns:
      The share of each label, where they are at most twelve texts, the most frequent
      first; of correct, incorrect and not attempted also CGA and F. The mean of
      numbers and of true and false. Nothing of other grades.
    Example:
      >>> [m.name for m in of_grades(["b", "a", "b"])], [m.name for m in of_grades([1])]
      (['b', 'a'], ['mean'])
      >>> [m.name for m in of_grades(["correct", "not_attempted"])]
      ['correct', 'incorrect', 'not_attempted', 'CGA', 'F']
    """
    if not grades:
        return []
    if all(isinstance(grade, int | float) for grade in grades):  # True and False too
        return [Measure("mean", lambda grade: (float(grade),))]
    if not all(isinstance(grade, str) for grade in grades):
        return []
    counts = Counter(grades)
    if len(counts) > _MOST_LABELS:
        return []
    three_way = GRADES[-1] in counts and counts.keys() <= {*GRADES}
    labels = GRADES if three_way else [label for label, _ in counts.most_common()]
    found = [Measure(label, _indicator(label)) for label in labels]
    if three_way:
        found += [Measure("CGA", _one_hot, _cga), Measure("F", _one_hot, f_score)]
    return found


def by_topic(
    measure: Measure,
    pairs: Sequence[tuple[Any, Any]],
    topics: Sequence[str | None],
    *,
    clusters: Sequence[int] | None = None,
    rounds: int = 2000,
    permutations: int = 10_000,
    seed: int = 0,
) -> Difference:
    """Return the difference over all rows, with that of each topic in it.

    Args:
      measure: of :func:`of_grades`.
      pairs: (baseline's grade, run's grade) of each row.
      topics: of the rows; fewer than two are none.
      clusters: of the rows.
      rounds: of the bootstrap of ratios.
      permutations: of the tests that try no more sign patterns than that.
      seed: of both.
    Returns:
      A difference whose topics have p-values as they are and adjusted (Holm).
    Example:
      >>> pairs = [(0, 1)] * 6 + [(1, 1)] * 6
      >>> found = by_topic(of_grades([0, 1])[0], pairs, ["sea"] * 6 + ["land"] * 6)
      >>> [(name, d.p_value, d.adjusted) for name, d in found.topics.items()]
      [('land', 1.0, 1.0), ('sea', 0.03125, 0.0625)]
    """
    how: dict[str, Any] = {
        "rounds": rounds,
        "permutations": permutations,
        "seed": seed,
    }
    whole = difference(measure, pairs, clusters=clusters, **how)
    names = sorted({topic for topic in topics if topic is not None})
    if len(names) < 2:
        return whole
    found = {}
    for name in names:
        rows = [row for row, topic in enumerate(topics) if topic == name]
        mine = None if clusters is None else [clusters[row] for row in rows]
        found[name] = difference(
            measure, [pairs[row] for row in rows], clusters=mine, **how
        )
    adjusted = differences.holm([d.p_value for d in found.values()])
    return whole._replace(
        topics={
            name: d._replace(adjusted=p)
            for (name, d), p in zip(found.items(), adjusted, strict=True)
        }
    )


def difference(
    measure: Measure,
    pairs: Sequence[tuple[Any, Any]],
    *,
    clusters: Sequence[int] | None = None,
    rounds: int = 2000,
    permutations: int = 10_000,
    seed: int = 0,
) -> Difference:
    """Return how two runs differ in a measure, see :func:`by_topic`.

    Shares are tested by McNemar's exact test, means by flipping signs, ratios by
    exchanging rows; with clusters, shares as means.

    >>> pairs = list(zip("AAABBCAA", "AABBBCAC", strict=True))
    >>> found = difference(of_grades("AB")[0], pairs)
    >>> found.difference.value, found.gained, found.lost, found.p_value
    (-0.25, 0, 2, 0.5)
    """
    baseline, run = (
        np.asarray([measure.columns(pair[side]) for pair in pairs]) for side in (0, 1)
    )
    if measure.statistic is not None:
        how: dict[str, Any] = {"seed": seed, "clusters": clusters}
        p_value = differences.swap(
            measure.statistic, run, baseline, rounds=permutations, **how
        )
        sides = _ratios(measure.statistic, baseline, run, {"rounds": rounds, **how})
        return Difference(measure.name, *sides, "swap", p_value)
    one, other = baseline[:, 0], run[:, 0]
    binary = bool(np.isin([one, other], (0, 1)).all())
    mine, theirs = (_of_one(side, binary, clusters) for side in (one, other))
    apart = differences.paired(other, one, clusters)
    made = Difference(measure.name, mine, theirs, apart, "sign_flip", 1.0)
    if binary:
        gained, lost = int((other > one).sum()), int((other < one).sum())
        made = made._replace(gained=gained, lost=lost)
        if clusters is None:
            test = differences.mcnemar(gained, lost)
            return made._replace(test="mcnemar", p_value=test[0], mid_p=test[1])
    p_value = differences.sign_flip(
        other - one, rounds=permutations, seed=seed, clusters=clusters
    )
    return made._replace(p_value=p_value)


def _of_one(values: np.ndarray, binary: bool, clusters: Sequence[int] | None) -> Figure:
    if clusters is not None:
        return statistics.clustered(values, clusters)
    if binary:
        return statistics.share(float(values.sum()), len(values))
    return statistics.mean(values)


def _ratios(
    statistic: Callable[[np.ndarray], np.ndarray],
    baseline: np.ndarray,
    run: np.ndarray,
    how: dict[str, Any],
) -> tuple[Figure, Figure, Figure]:
    return (
        statistics.bootstrap_of_sums(statistic, baseline, **how),
        statistics.bootstrap_of_sums(statistic, run, **how),
        differences.paired_of_sums(statistic, run, baseline, **how),
    )


def _indicator(label: str) -> Callable[[Any], tuple[float, ...]]:
    return lambda grade: (float(grade == label),)


def _one_hot(grade: str) -> tuple[float, ...]:
    return tuple(float(grade == label) for label in GRADES)


def _cga(sums: np.ndarray) -> np.ndarray:
    """Correct given attempted, 0 where nothing was attempted."""
    correct, incorrect, _ = sums.T
    return correct / np.maximum(correct + incorrect, 1)
