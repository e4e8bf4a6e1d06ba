"""What pairing looks at beside scores: likeness, contradiction and length."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Literal, NamedTuple

from jaxalign.data.records import Segment
from jaxalign.feedback.decompose.observations import folded


__all__ = [
    "TOLERANCE",
    "LengthBalance",
    "balance",
    "contradictory_share",
    "grams",
    "length_excess",
    "length_ratio",
    "similarity",
    "within",
]

TOLERANCE = 1e-9
"""Scores are means, rounded differently: nearer than this they are equal."""

_GRAM = 3
# RLAIF-V's grid.
_BOUNDS = tuple(step / 50 for step in range(50))


class LengthBalance(NamedTuple):
    """A bound on how much longer one side of a pair may be."""

    longer: Literal["chosen", "rejected"]
    """The side that was longer on average, and that the bound holds for."""
    bound: float
    """Largest excess allowed, a share of the longer text; 1 keeps every pair."""


def grams(text: str) -> Counter[str]:
    """Return how often each three characters in a row occur, case and width aside.

    A text of fewer characters is one gram. Time and size are linear in the text.

    >>> dict(grams("A  bc"))
    {'a b': 1, ' bc': 1}
    """
    plain = folded(text)
    last = max(len(plain) - _GRAM, 0)
    return Counter(plain[at : at + _GRAM] for at in range(last + 1))


def similarity(one: Counter[str], other: Counter[str]) -> float:
    """Return the Jaccard index of two multisets, in [0, 1]; 1 if they are equal.

    sum(min(counts)) / sum(max(counts))

    >>> similarity(grams("abcd"), grams("abce"))  # abc of abc, bcd, bce
    0.3333333333333333
    """
    return (one & other).total() / (one | other).total()


def contradictory_share(
    chosen: Sequence[Segment], rejected: Sequence[Segment]
) -> float:
    """Return the share of contradictory pairs among those that the loss selects.

    With r the mean of a segment's scores and N the smaller number of segments, the k-th
    highest r of the chosen stands against the k-th lowest of the rejected, k = 1 ... N
    (https://arxiv.org/abs/2410.19720, equation 6); a pair contradicts unless the chosen
    r is above the rejected one. The share is 1 exactly if the best chosen segment is
    not above the worst rejected one, and 0 where a side has no segments.

    >>> def segment(r): return Segment(start=0, end=1, scores={"correctness": r})
    >>> contradictory_share([segment(3), segment(1)], [segment(2)])
    0.0
    """
    count = min(len(chosen), len(rejected))
    if not count:
        return 0.0
    best = sorted(map(_overall, chosen), reverse=True)[:count]
    worst = sorted(map(_overall, rejected))[:count]
    against = [w <= r + TOLERANCE for w, r in zip(best, worst, strict=True)]
    return sum(against) / count


def _overall(segment: Segment) -> float:
    return math.fsum(segment.scores.values()) / len(segment.scores)


def length_ratio(one: str, other: str) -> float:
    """Return the longer length over the shorter, in characters; at least 1.

    >>> length_ratio("four", "a")
    4.0
    """
    short, long = sorted((len(one), len(other)))
    return long / short if short else math.inf


def length_excess(chosen: str, rejected: str) -> float:
    """Return (chosen length - rejected length) / longer length, in [-1, 1].

    >>> length_excess("four", "a")
    0.75
    """
    longer = max(len(chosen), len(rejected))
    return (len(chosen) - len(rejected)) / longer if longer else 0.0


def balance(pairs: Sequence[tuple[str, str]]) -> LengthBalance:
    """Return the bound that brings the mean length difference nearest to zero.

    As in RLAIF-V, whose grid of bounds it is (0, 0.02, ... 0.98), except that the side
    that is longer on average is held, be it the chosen or the rejected. A bound that
    leaves no pair is none; of equally good ones the widest is taken.

    Args:
      pairs: (chosen text, rejected text).
    Example:
      >>> balance([("long answer", "short"), ("four", "a longer one")])
      LengthBalance(longer='rejected', bound=1.0)
    """
    differences = [len(chosen) - len(rejected) for chosen, rejected in pairs]
    longer: Literal["chosen", "rejected"]
    longer = "chosen" if sum(differences) >= 0 else "rejected"
    excesses = [_held(longer, chosen, rejected) for chosen, rejected in pairs]
    best = LengthBalance(longer, 1.0)
    least = math.inf
    for bound in (1.0, *reversed(_BOUNDS)):
        kept = [d for d, e in zip(differences, excesses, strict=True) if e <= bound]
        if kept and abs(sum(kept) / len(kept)) < least:
            least = abs(sum(kept) / len(kept))
            best = LengthBalance(longer, bound)
    return best


def within(found: LengthBalance, chosen: str, rejected: str) -> bool:
    """Whether a pair keeps to a bound.

    >>> within(LengthBalance("chosen", 0.5), "four", "a")
    False
    """
    return _held(found.longer, chosen, rejected) <= found.bound


def _held(longer: str, chosen: str, rejected: str) -> float:
    excess = length_excess(chosen, rejected)
    return excess if longer == "chosen" else -excess
