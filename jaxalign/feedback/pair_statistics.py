"""What pairing reports: the fate of every pair, lengths and gaps."""

from collections import Counter
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from jaxalign.data.records import Segment
from jaxalign.feedback.pair_filters import LengthBalance


__all__ = [
    "FATES",
    "Pair",
    "ScoredPrompt",
    "ScoredResponse",
    "Spread",
    "Statistics",
    "statistics_of",
]

FATES = (
    "failed",  # one of the two has no score
    "identical",  # the two texts are equal
    "inconsistent",  # one of the texts was given several scores
    "repeated",  # the same two texts are another pair already
    "tie",  # equal scores
    "below_gap",
    "near_duplicate",
    "contradictory",  # segments speak against the scores
    "length_ratio",
    "not_selected",  # by the strategy, or more than max_pairs_per_prompt
    "length_balance",
    "kept",
)
_ABOVE_GAP = FATES[FATES.index("near_duplicate") :]


class ScoredResponse(NamedTuple):
    """A response as pairing sees it."""

    text: str
    score: float | None
    """None where a judgement failed."""
    segments: tuple[Segment, ...] = ()
    """With scores by aspect; none where the score does not come from segments."""


class ScoredPrompt(NamedTuple):
    """The responses to one prompt."""

    prompt: str | Sequence[Mapping[str, Any]]
    """As records are to hold it."""
    responses: Sequence[ScoredResponse]
    images: Sequence[str] = ()
    """Paths, as records are to hold them."""
    columns: Mapping[str, Any] = MappingProxyType({})
    """What else records are to hold of the prompt's row, such as ``tools``."""


class Pair(NamedTuple):
    """Two responses to one prompt, and what becomes of them."""

    chosen: ScoredResponse
    """The one with the higher score, where both have one."""
    rejected: ScoredResponse
    gap: float
    """Difference of the scores; 0 where one has none."""
    fate: str
    """One of ``FATES``."""

    @property
    def texts(self) -> tuple[str, str]:
        """The chosen text and the rejected one."""
        return self.chosen.text, self.rejected.text


class Spread(NamedTuple):
    """Lengths and gaps of some pairs."""

    pairs: int
    chosen_length: float | None
    """Mean number of characters; None without pairs."""
    rejected_length: float | None
    gaps: tuple[float, ...]
    """Least, lower quartile, median, upper quartile, largest; empty without pairs."""


class Statistics(NamedTuple):
    """What became of the responses and of all pairs of them."""

    prompts: int
    unpaired: int
    """Prompts with fewer than two responses that have a score."""
    paired: int
    """Prompts with a record."""
    responses: int
    failed: int
    """Responses without a score."""
    fates: dict[str, int]
    """Number of pairs by fate; the sum is that of n (n - 1) / 2 over the prompts."""
    before: Spread
    """Of the pairs at or above the gap, before any further rule."""
    after: Spread
    """Of the pairs kept."""
    length_balance: LengthBalance | None

    def to_dict(self) -> dict[str, Any]:
        """Return the same as plain objects, for JSON."""
        balance = self.length_balance
        return {
            **self._asdict(),
            "before": self.before._asdict(),
            "after": self.after._asdict(),
            "length_balance": None if balance is None else balance._asdict(),
        }


def statistics_of(
    groups: Sequence[tuple[ScoredPrompt, list[Pair]]], balance: LengthBalance | None
) -> Statistics:
    """Count the fates of all pairs of all prompts.

    >>> statistics_of([], None).prompts
    0
    """
    every = [p for _, pairs in groups for p in pairs]
    fates = Counter(p.fate for p in every)
    failed = [sum(r.score is None for r in prompt.responses) for prompt, _ in groups]
    sizes = [len(prompt.responses) for prompt, _ in groups]
    return Statistics(
        prompts=len(groups),
        unpaired=sum(n - f < 2 for n, f in zip(sizes, failed, strict=True)),
        paired=sum(any(p.fate == "kept" for p in pairs) for _, pairs in groups),
        responses=sum(sizes),
        failed=sum(failed),
        fates={fate: fates[fate] for fate in FATES},
        before=_spread([p for p in every if p.fate in _ABOVE_GAP]),
        after=_spread([p for p in every if p.fate == "kept"]),
        length_balance=balance,
    )


def _spread(pairs: Sequence[Pair]) -> Spread:
    if not pairs:
        return Spread(0, None, None, ())
    chosen, rejected = (
        float(np.mean([len(p.texts[side]) for p in pairs])) for side in (0, 1)
    )
    gaps = np.quantile([p.gap for p in pairs], (0, 0.25, 0.5, 0.75, 1))
    return Spread(len(pairs), chosen, rejected, tuple(map(float, gaps)))
