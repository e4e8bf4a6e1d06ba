"""Shares of graded answers, with what has no grade beside them and never in them."""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, get_args

from jaxalign.evaluation import statistics
from jaxalign.evaluation.task import Grade, Graded, GradeStatus


__all__ = ["UNDECIDED", "by_group", "shares", "silent_answers"]

UNDECIDED: tuple[str, ...] = tuple(s for s in get_args(GradeStatus) if s != "ok")
"""States of a grade that is none."""


def shares(
    grades: Iterable[Grade | None], measures: Mapping[str, Collection[Any]]
) -> dict[str, Any]:
    """Return which shares of the grades have which labels.

    Args:
      grades: None for an answer that was never graded, as one that failed.
      measures: from a figure's name to the labels that it counts.
    Returns:
      A share with Wilson's interval by name; the number of grades in each state that
      is none; and where there are any, ``bounds``: the first share if all of these had
      fallen one way, or all the other.
    Example:
      >>> given = [Grade("safe"), Grade("unsafe"), Grade(None, "unparsed")]
      >>> found = shares(given, {"attack_success": ["unsafe"]})
      >>> found["attack_success"].value, found["attack_success"].n, found["unparsed"]
      (0.5, 2, 1)
      >>> [round(share, 3) for share in found["bounds"]]
      [0.333, 0.667]
    """
    given = list(grades)
    decided = [one.value for one in given if one is not None and one.status == "ok"]
    states = Counter("answer_failed" if one is None else one.status for one in given)
    hits = {
        name: sum(value in labels for value in decided)
        for name, labels in measures.items()
    }
    found: dict[str, Any] = {
        name: statistics.share(count, len(decided)) for name, count in hits.items()
    }
    found |= {state: states[state] for state in UNDECIDED}
    undecided = len(given) - len(decided)
    if undecided and hits:
        first = next(iter(hits.values()))
        found["bounds"] = statistics.bounds(first, len(decided), undecided)
    return found


def by_group(
    labels: Sequence[str],
    grades: Sequence[Grade | None],
    measures: Mapping[str, Collection[Any]],
) -> dict[str, dict[str, Any]]:
    """Return :func:`shares` of each group, the groups in the order of their first one.

    Args:
      labels: the group of each grade.
      grades: see :func:`shares`.
      measures: see :func:`shares`.
    Example:
      >>> given = [Grade("a"), Grade("b"), Grade("a")]
      >>> found = by_group(["x", "y", "x"], given, {"first": ["a"]})
      >>> {group: one["first"].value for group, one in found.items()}
      {'x': 1.0, 'y': 0.0}
    """
    groups: dict[str, list[Grade | None]] = {}
    for label, grade in zip(labels, grades, strict=True):
        groups.setdefault(label, []).append(grade)
    return {label: shares(some, measures) for label, some in groups.items()}


def silent_answers(graded: Iterable[Graded]) -> dict[str, int]:
    """Count the answers without a text of the model's own.

    >>> from jaxalign.evaluation.task import Answer
    >>> silent_answers([Graded(0, None, {("q", 0): Answer("", "empty")}, {})])
    {'empty_answers': 1, 'filtered_answers': 0}
    """
    states = Counter(answer.status for one in graded for answer in one.answers.values())
    return {"empty_answers": states["empty"], "filtered_answers": states["refused"]}
