"""Which of a teacher's answers a student is to learn: rules on texts and lengths.

All are pure, and all choices are the same in every run.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

from jaxalign.feedback.decompose.observations import folded
from jaxalign.judging.graders import without_draft


__all__ = [
    "ALLUSIONS",
    "Balanced",
    "BalancedReason",
    "answer_fault",
    "balance",
    "most_refusals",
    "quotes",
    "trimmed",
]

ALLUSIONS = (
    *("system prompt", "system message", "these remarks", "the remarks"),
    *("somebody looked at", "someone looked at"),
)
"""Words that speak of the context itself, in lower case."""

_RUN = 8
_WIDE = "\u3040-\u30ff\u3400-\u9fff"
# A Chinese or Japanese character is a word of its own: these have no spaces.
_WORD = re.compile(rf"[{_WIDE}]|[^\W{_WIDE}]+")


def quotes(answer: str, context: str, known: Iterable[str] = ()) -> bool:
    """Tell whether an answer gives away what the teacher alone was told.

    It does where eight words in a row are the context's, case and punctuation aside,
    or where it speaks of the context (:data:`ALLUSIONS`); not where these words are the
    prompt's own.

    Args:
      answer: of the teacher.
      context: what it was told.
      known: texts that the student sees too.
    Example:
      >>> told = "Never say how the lock on the old door can be opened."
      >>> quotes("I never say how the lock on the old door opens.", told)
      True
      >>> quotes("That lock can be opened, but I will not say how.", told)
      False
    """
    texts = [*known]
    spoken = _plain(answer)
    if any(
        phrase in spoken and not any(phrase in _plain(text) for text in texts)
        for phrase in ALLUSIONS
    ):
        return True
    shared = _runs(answer) & _runs(context)
    return bool(shared.difference(*map(_runs, texts)))


def _plain(text: str) -> str:
    return " ".join(_WORD.findall(folded(text)))


def _runs(text: str) -> set[tuple[str, ...]]:
    words = _WORD.findall(folded(text))
    return {tuple(words[at : at + _RUN]) for at in range(len(words) - _RUN + 1)}


def answer_fault(text: str, finish_reason: str) -> str | None:
    """Return why an answer is no answer, None where it is one.

    Args:
      text: all that the teacher wrote.
      finish_reason: why it ended there.
    Example:
      >>> answer_fault("It is 4.", "stop"), answer_fault("It is", "length")
      (None, 'cut off')
    """
    if finish_reason == "length":
        return "cut off"
    if finish_reason == "content_filter":
        return "filtered"
    said = without_draft(text)
    return None if said and not said.startswith("<think>") else "empty"


class Balanced(NamedTuple):
    """An answer that passed, for :func:`balance`."""

    row: int
    """Of its prompt."""
    risky: bool
    """Whether the prompt is; else it is benign."""
    refused: bool
    length: int
    """In characters."""


BalancedReason = Literal["refusal share", "length"]
"""Why an answer goes that has no fault of its own."""


def balance(
    answers: Sequence[Balanced],
    *,
    max_refusal_share: float,
    max_length_ratio: float | None,
    seed: int = 0,
) -> dict[int, BalancedReason]:
    """Return which answers have to go, by their prompts, and why.

    Of the answers to risky prompts at most ``max_refusal_share`` may be refusals: the
    surplus goes, drawn by ``seed``. The mean lengths of answers to risky and to benign
    prompts may differ by the factor ``max_length_ratio`` at most: of the longer side
    the longest go, until that holds. Where it would not hold with half of that side
    left, none goes for its length. Both are repeated until both hold.

    Args:
      answers: one a prompt.
      max_refusal_share: in [0, 1]; 1 keeps all refusals.
      max_length_ratio: at least 1; None keeps all lengths.
      seed: of the draw.
    Example:
      >>> risky = [Balanced(n, True, n < 2, 40) for n in range(5)]
      >>> options = {"max_refusal_share": 0.25, "max_length_ratio": 2.0}
      >>> balance([*risky, Balanced(5, False, False, 30)], **options)
      {0: 'refusal share'}
    """
    gone: dict[int, BalancedReason] = {}
    least: dict[bool, int] = {}
    while True:
        left = [one for one in answers if one.row not in gone]
        refusals = [one for one in left if one.risky and one.refused]
        others = sum(one.risky and not one.refused for one in left)
        refusals.sort(key=lambda one: _drawn(seed, one.row))
        surplus = refusals[most_refusals(others, max_refusal_share) :]
        new: dict[int, BalancedReason] = {one.row: "refusal share" for one in surplus}
        if not new and max_length_ratio is not None:
            if not least:
                sides = [one.risky for one in left]
                least = {side: -(-sides.count(side) // 2) for side in (True, False)}
            new = dict.fromkeys(_longest(left, max_length_ratio, least), "length")
        if not new:
            return gone
        gone |= new


def _drawn(seed: int, index: int) -> str:
    return hashlib.sha256(f"{seed} {index}".encode()).hexdigest()


def _longest(
    left: Sequence[Balanced], ratio: float, least: Mapping[bool, int]
) -> list[int]:
    """Return the prompts of answers that are too long; see :func:`balance`."""
    sides = {
        side: sorted((a for a in left if a.risky == side), key=lambda a: a.length)
        for side in (True, False)
    }
    for side, mine in sides.items():
        other = [a.length for a in sides[not side]]
        count = trimmed([a.length for a in mine], other, ratio)
        if count and len(mine) - count >= least[side]:
            return [a.row for a in mine[len(mine) - count :]]
    return []


def most_refusals(others: int, share: float) -> int:
    """Return how many refusals may stand beside so many other answers.

    The largest r with r / (r + others) <= share.

    >>> most_refusals(9, 0.1), most_refusals(8, 0.1), most_refusals(0, 0.5)
    (1, 0, 0)
    """
    if share >= 1:
        return 2**62
    return int(share * others / (1 - share) + 1e-9)


def trimmed(lengths: Sequence[int], other: Sequence[int], ratio: float) -> int:
    """Return how many of the longest go so that a mean is no more than another's ratio.

    mean(lengths without the longest) <= ratio * mean(other)

    Args:
      lengths: in any order.
      other: those that it is compared with; where there are none, nothing goes.
      ratio: at least 1.
    Returns:
      The least number; all of them where one alone is too long.
    Example:
      >>> trimmed([10, 20, 90], [10], 1.5)  # (10 + 20) / 2 = 15
      1
    """
    if not other:
        return 0
    ordered = sorted(lengths)
    total = sum(ordered)
    for count in range(len(ordered)):
        left = len(ordered) - count
        if total * len(other) <= ratio * sum(other) * left:
            return count
        total -= ordered[left - 1]
    return len(ordered)
