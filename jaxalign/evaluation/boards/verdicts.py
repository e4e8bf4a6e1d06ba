"""Verdicts in prose: how benchmarks read what their judges wrote.

Each reader follows its benchmark's own rule, so that a stored judgement comes to what
the authors' tool made of it; what is no verdict is None, never a guess.
"""

import math
import re
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from jaxalign.errors import UserError


__all__ = [
    "CLEAR_WEIGHT",
    "Points",
    "arena_verdict",
    "points",
    "preference",
    "rating",
    "winner",
]

CLEAR_WEIGHT = 3
"""What a clear verdict (``>>``) counts for in Arena-Hard."""

_DOUBLE = re.compile(r"\[\[([AB<>=]+)\]\]")
_SINGLE = re.compile(r"\[([AB<>=]+)\]")
_LABEL = re.compile(r"A(<<|<|=|>|>>)B|B(<<|<|=|>|>>)A")
_V1 = frozenset({"A>>B", "A>B", "A=B", "B>A", "B>>A"})

_NUMBER = r"(\d+\.?\d*)"
_RATINGS = (re.compile(rf"\[\[{_NUMBER}\]\]"), re.compile(rf"\[{_NUMBER}\]"))


def arena_verdict(text: str, version: Literal["v0.1", "v2"] = "v2") -> str | None:
    """Return the label of an Arena-Hard judgement, such as ``A>>B``, or None.

    v0.1: what stands in double square brackets, if it is the same everywhere. v2: the
    last in double brackets, else the last in single ones; in capitals or not.

    >>> arena_verdict("First [[A>B]], but on reflection [[A=B]].")
    'A=B'
    >>> arena_verdict("First [[A>B]], but on reflection [[A=B]].", "v0.1") is None
    True
    """
    if version == "v0.1":
        found = set(_DOUBLE.findall(text))
        label = found.pop() if len(found) == 1 else ""
        return label if label in _V1 else None
    upper = text.upper()
    labels = _DOUBLE.findall(upper) or _SINGLE.findall(upper)
    return labels[-1] if labels and _LABEL.fullmatch(labels[-1]) else None


class Points(NamedTuple):
    """What a verdict gives one of the two sides."""

    score: float
    """1, 1/2 or 0."""
    weight: int


def points(label: str, side: Literal["A", "B"], clear: int = CLEAR_WEIGHT) -> Points:
    """Return what a label gives a side; ``>>`` and ``<<`` weigh ``clear`` times.

    Raises:
      UserError: it is no label.
    Example:
      >>> points("B>>A", "B"), points("A=B", "A")
      (Points(score=1.0, weight=3), Points(score=0.5, weight=1))
    """
    if not isinstance(label, str) or not _LABEL.fullmatch(label):
        raise UserError(
            f"a verdict must be one of {', '.join(sorted(_V1))}: got {label!r}"
        )
    if "=" in label:
        return Points(0.5, 1)
    winner = label[0] if ">" in label else label[-1]
    weight = clear if ">>" in label or "<<" in label else 1
    return Points(float(winner == side), weight)


def rating(text: str, *, bounded: bool = True) -> float | None:
    """Return the rating of an MT-Bench judgement: the first [[x]], else the first [x].

    Args:
      text: of the judgement.
      bounded: take a number outside 1 to 10, which is none on the scale that the judge
        was given, for no rating. FastChat's own tool takes any number.
    Example:
      >>> rating("Good. Rating: [[8.5]]"), rating("[7]"), rating("[[11]]"), rating("8")
      (8.5, 7.0, None, None)
    """
    for pattern in _RATINGS:
        if (found := pattern.search(text)) is not None:
            value = float(found[1])
            return value if not bounded or 1 <= value <= 10 else None
    return None


def winner(text: str) -> Literal["A", "B", "tie"] | None:
    """Return the winner of an MT-Bench comparison: [[A]], then [[B]], then [[C]].

    They are looked for in this order, wherever they stand.

    >>> winner("... [[C]]"), winner("[[B]] or [[A]]"), winner("A")
    ('tie', 'A', None)
    """
    if "[[A]]" in text:
        return "A"
    if "[[B]]" in text:
        return "B"
    return "tie" if "[[C]]" in text else None


def preference(
    logprobs: Sequence[Sequence[Any]], mine: str, other: str
) -> float | None:
    """Return P(mine) / (P(mine) + P(other)) of a reply's first token, None for neither.

    A name's tokens are all that hold it and nothing else but blanks and marks, such as
    ``A``, `` A`` and ``**A``. A name that is not among the tokens has no probability.

    Args:
      logprobs: [token, log-probability] of the most probable first tokens.
      mine: the name, in a reply, of one side.
      other: of the other.
    Example:
      >>> preference([["A", -0.5], [" B", -1.5], ["The", -3.0]], "A", "B").__round__(4)
      0.7311
    """
    chances = {mine: 0.0, other: 0.0}
    for token, logprob in logprobs:
        name = token.strip(_MARKS)
        if name in chances:
            chances[name] += math.exp(logprob)
    whole = sum(chances.values())
    return chances[mine] / whole if whole else None


_MARKS = " \t\n\"'*`([{:"
