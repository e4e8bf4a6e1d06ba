"""Figures of answers that were graded three ways, alone and two questions together.

Of N judged answers A are correct, B incorrect, C not attempted (SimpleQA,
https://arxiv.org/abs/2411.04368; ChineseSimpleVQA, https://arxiv.org/abs/2502.11718):

    CO = A / N   IN = B / N   NA = C / N   CGA = A / (A + B)
    F = 2 CO CGA / (CO + CGA) = 2A / (2A + 2B + C)

What has no grade is in none of these: it is counted beside them. The authors' scripts
count a judge's unreadable reply as not attempted, which lowers NA's meaning and raises
CGA; those figures stand under ``upstream``.
"""

import collections
import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxalign.evaluation import statistics
from jaxalign.evaluation.statistics import Figure
from jaxalign.evaluation.task import Grade
from jaxalign.judging.graders import GRADES


__all__ = [
    "SMALL",
    "Weights",
    "f_score",
    "joint",
    "states",
    "three_way",
    "upstream",
    "weights_of",
]

SMALL = 20
"""Rows below which a figure is marked: its interval is wider than 40 points."""

NAMES = dict(zip(GRADES, ("CO", "IN", "NA"), strict=True))
FAILED = ("judge_failed", "answer_failed")

Weights = Mapping[str, float]
"""Of one row over CO, IN, NA and what failed: 1 on one of them, but where an answer was
chosen by a vote that was tied."""


def weights_of(grade: Grade | None) -> Weights:
    """Return a grade as weights.

    >>> weights_of(Grade("correct"))
    {'CO': 1.0}
    >>> weights_of(Grade(None, "judge_failed"))
    {'judge_failed': 1.0}
    """
    if grade is None:
        return {"answer_failed": 1.0}
    if grade.status == "ok":
        return {NAMES[grade.value]: 1.0}
    name = "answer_failed" if grade.status == "answer_failed" else "judge_failed"
    return {name: 1.0}


def three_way(
    rows: Sequence[Weights],
    clusters: Sequence[Hashable] | None = None,
    *,
    seed: int = 0,
) -> dict[str, Any]:
    """Return CO, IN, NA, CGA and F with their intervals, and what failed.

    Args:
      rows: weights of each row.
      clusters: of the rows, such as their pictures; for F's interval.
      seed: of F's bootstrap.
    Returns:
      Figures by name, ``judge_failed`` and ``answer_failed`` as counts, and
      ``small: True`` where fewer than 20 rows were judged. Shares have Wilson's
      intervals, F a bootstrap's over rows, 2,000 rounds.
    Example:
      >>> rows = [{"CO": 1.0}] * 3 + [{"IN": 1.0}] * 2 + [{"NA": 1.0}]
      >>> found = three_way(rows)
      >>> [round(found[name].value, 4) for name in ("CO", "CGA", "F")]
      [0.5, 0.6, 0.5455]
    """
    judged = [
        n for n, row in enumerate(rows) if not any(name in row for name in FAILED)
    ]
    table = np.array(
        [[rows[n].get(name, 0.0) for name in NAMES.values()] for n in judged]
    ).reshape(-1, 3)
    right, wrong, _ = totals = [math.fsum(column) for column in table.T]
    found: dict[str, Any] = {
        name: statistics.share(_within(total, len(judged)), len(judged))
        for name, total in zip(NAMES.values(), totals, strict=True)
    }
    found["CGA"] = _attempted(right, wrong, len(judged))
    found["F"] = statistics.bootstrap_of_sums(
        f_score,
        table,
        seed=seed,
        clusters=None if clusters is None else [clusters[n] for n in judged],
    )
    for name in FAILED:
        found[name] = sum(name in row for row in rows)
    if len(judged) < SMALL:
        found["small"] = True
    return found


def _within(total: float | int, n: float | int) -> float | int:
    return min(total, n)  # a sum of thirds may be a last bit too much


def _attempted(right: float, wrong: float, n: int) -> Figure:
    """Return CGA; 0 where nothing was attempted, as the benchmark defines it."""
    whole = _whole(right + wrong)
    if not whole:
        return Figure(0.0 if n else None, None, None, 0)
    return statistics.share(_within(right, whole), whole)


def f_score(sums: np.ndarray) -> np.ndarray:
    """Return F, ``2A / (2A + 2B + C)``, of sums of A, B and C, ``[round, 3]``.

    >>> f_score(np.array([[3, 2, 1]])).round(4).tolist()
    [0.5455]
    """
    right, wrong, none = sums.T
    return 2 * right / (2 * right + 2 * wrong + none)


def upstream(rows: Sequence[Weights]) -> dict[str, float | None]:
    """Return what the authors' scripts would print of these rows, as shares.

    Rows that the judge failed on are not attempted there; rows without an answer are in
    the denominator alone.

    >>> rows = [{"CO": 1.0}, {"CO": 1.0}, {"IN": 1.0}, {"judge_failed": 1.0}]
    >>> {name: round(value, 4) for name, value in upstream(rows).items()}
    {'CO': 0.5, 'IN': 0.25, 'NA': 0.25, 'CGA': 0.6667, 'F': 0.5714}
    """
    n = len(rows)
    if not n:
        return dict.fromkeys(("CO", "IN", "NA", "CGA", "F"))

    def total(*names: str) -> float:
        return math.fsum(row.get(name, 0.0) for row in rows for name in names)

    right, wrong = total("CO") / n, total("IN") / n
    attempted = right + wrong
    given = right / attempted if attempted else 0.0
    both = right + given
    return {
        "CO": right,
        "IN": wrong,
        "NA": total("NA", "judge_failed") / n,
        "CGA": given,
        "F": 2 * right * given / both if both else 0.0,
    }


def states(rows: Sequence[Weights]) -> list[str]:
    """Return the states that occur, those of the grades always.

    >>> states([{"CO": 1.0}])
    ['CO', 'IN', 'NA']
    """
    seen = {name for row in rows for name in row}
    return [*NAMES.values(), *(name for name in FAILED if name in seen)]


def joint(first: Sequence[Weights], second: Sequence[Weights]) -> dict[str, Any]:
    """Return how two questions of the same rows were graded together.

    Args:
      first: of recognition, row by row.
      second: of the final question.
    Returns:
      ``table``, outer key the first's state, inner the second's; and ``given``, what
      follows from the rows that both were judged on: P(second correct | first
      correct), P(second correct | first not) (luck, or another way to the answer), and
      the shares of the second's errors that are owed to each.
    Example:
      >>> one = [{"CO": 1.0}, {"CO": 1.0}, {"IN": 1.0}]
      >>> two = [{"CO": 1.0}, {"NA": 1.0}, {"IN": 1.0}]
      >>> found = joint(one, two)
      >>> found["table"]["CO"]["NA"], found["given"]["correct_if_recognised"].value
      (1, 0.5)
    """
    table = {a: dict.fromkeys(states(second), 0.0) for a in states(first)}
    cells: collections.Counter[tuple[bool, bool]] = collections.Counter()
    for one, two in zip(first, second, strict=True):
        for (a, u), (b, v) in ((p, q) for p in one.items() for q in two.items()):
            table[a][b] += u * v
            if a not in FAILED and b not in FAILED:
                cells[a == "CO", b == "CO"] += u * v  # type: ignore[assignment]
    both, seen_only = cells[True, True], cells[True, False]
    lucky, neither = cells[False, True], cells[False, False]
    return {
        "table": {
            a: {b: _whole(v) for b, v in row.items()} for a, row in table.items()
        },
        "given": {
            "correct_if_recognised": _of(both, both + seen_only),
            "correct_if_not_recognised": _of(lucky, lucky + neither),
            "errors_of_recognition": _of(neither, neither + seen_only),
            "errors_of_knowledge": _of(seen_only, neither + seen_only),
        },
    }


def _of(part: float | int, every: float | int) -> Figure:
    whole = _whole(every)
    return statistics.share(_within(part, whole), whole)


def _whole(value: float | int) -> Any:
    return round(value) if math.isclose(value, round(value), abs_tol=1e-9) else value
