"""Grades that are in no share: counted by name, and what they could have changed."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from jaxalign.evaluation.statistics import Figure
from jaxalign.evaluation.task import Grade


__all__ = ["failures", "leaf"]


def failures(grades: Iterable[Grade]) -> dict[str, int]:
    """Return how many grades have each status that is not ``ok``.

    >>> failures([Grade("A"), Grade(None, "judge_failed"), Grade(None, "unparsed")])
    {'unparsed': 1, 'judge_failed': 1, 'answer_failed': 0}
    """
    counts = Counter(grade.status for grade in grades)
    return {
        name: counts[name] for name in ("unparsed", "judge_failed", "answer_failed")
    }


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
