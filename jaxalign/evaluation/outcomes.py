"""Grades that are in no share: counted by name, and what they could have changed."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, get_args

from jaxalign.evaluation.statistics import Figure
from jaxalign.evaluation.task import Grade, GradeStatus


__all__ = ["UNDECIDED", "failures", "leaf"]

UNDECIDED: tuple[str, ...] = tuple(s for s in get_args(GradeStatus) if s != "ok")
"""States of a grade that is none."""


def failures(grades: Iterable[Grade | None]) -> dict[str, int]:
    """Return how many grades have each status that is not ``ok``.

    None is that of an answer which was never graded, as one that failed.

    >>> failures([Grade("A"), Grade(None, "judge_failed"), Grade(None, "unparsed")])
    {'unparsed': 1, 'judge_failed': 1, 'answer_failed': 0}
    """
    counts = Counter("answer_failed" if g is None else g.status for g in grades)
    return {state: counts[state] for state in UNDECIDED}


def leaf(
    figure: Figure, bounds: Sequence[float] | None = None, **more: Any
) -> dict[str, Any]:
    """Return a figure as ``metrics.json`` has it, with what else is said of it.

    Args:
      figure: the figure.
      bounds: what it would be if all that is undecided fell one way, and the other.
      **more: named values.
    Example:
      >>> leaf(Figure(0.5, None, None, 2), [1 / 3, 2 / 3], official=False)["official"]
      False
    """
    found = {**figure._asdict(), **more}
    return found if bounds is None else {**found, "bounds": list(bounds)}
