"""Shares of graded answers, with what has no grade beside them and never in them."""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from jaxalign.evaluation import statistics
from jaxalign.evaluation.outcomes import failures
from jaxalign.evaluation.task import Grade, Graded


__all__ = [
    "by_group",
    "grades_of",
    "groups_of",
    "of_topics",
    "shares",
    "silent_answers",
    "with_topics",
]


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
    hits = {
        name: sum(value in labels for value in decided)
        for name, labels in measures.items()
    }
    found: dict[str, Any] = {
        name: statistics.share(count, len(decided)) for name, count in hits.items()
    }
    found |= failures(given)
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
    return {
        label: shares([grades[n] for n in places], measures)
        for label, places in groups_of(labels).items()
    }


def groups_of(labels: Sequence[str]) -> dict[str, list[int]]:
    """Return the places of each label, the labels in the order of their first one.

    >>> groups_of(["x", "y", "x"])
    {'x': [0, 2], 'y': [1]}
    """
    found: dict[str, list[int]] = {}
    for place, label in enumerate(labels):
        found.setdefault(label, []).append(place)
    return found


def grades_of(graded: Iterable[Graded], name: str) -> list[tuple[Any, Grade]]:
    """Return (item, grade) of all gradings of a name, one for each sample.

    >>> given = {("q", 0): Grade("a"), ("other", 0): Grade("b")}
    >>> [grade.value for _, grade in grades_of([Graded(0, None, {}, given)], "q")]
    ['a']
    """
    return [
        (one.item, grade)
        for one in graded
        for (grading, _), grade in one.grades.items()
        if grading == name
    ]


def with_topics(
    pairs: Sequence[tuple[Any, Grade]], measures: Mapping[str, Collection[Any]]
) -> dict[str, Any]:
    """Return :func:`shares` over all, and under ``topics`` of each item's ``topic``.

    Args:
      pairs: of :func:`grades_of`.
      measures: see :func:`shares`.
    Example::

      with_topics(grades_of(graded, "refusal"), {"over_refusal": ["full_refusal"]})
    """
    grades = [grade for _, grade in pairs]
    found = shares(grades, measures)
    topics = [item.topic for item, _ in pairs]
    return {**found, "topics": by_group(topics, grades, measures)}


def of_topics(
    graded: Sequence[Graded], figures: Callable[[Sequence[Graded]], dict[str, Any]]
) -> dict[str, Any]:
    """Return figures by the items' ``topic``, under ``topics``; of one topic nothing.

    Args:
      graded: items that may have an empty topic.
      figures: of some of them.
    Example:
      >>> of_topics([], lambda some: {})
      {}
    """
    groups = groups_of([one.item.topic for one in graded])
    if len(groups) < 2:
        return {}
    return {
        "topics": {
            topic or "(none)": figures([graded[n] for n in places])
            for topic, places in groups.items()
        }
    }


def silent_answers(graded: Iterable[Graded]) -> dict[str, int]:
    """Count the answers without a text of the model's own.

    >>> from jaxalign.evaluation.task import Answer
    >>> silent_answers([Graded(0, None, {("q", 0): Answer("", "empty")}, {})])
    {'empty_answers': 1, 'filtered_answers': 0}
    """
    states = Counter(answer.status for one in graded for answer in one.answers.values())
    return {"empty_answers": states["empty"], "filtered_answers": states["refused"]}
