"""From scored responses to feedback records, and what became of every other pair.

Each unordered pair of responses to one prompt meets exactly one fate, the first that
applies of ``pair_statistics.FATES``, so that the counts of the fates add up to all
pairs there are. The order in which the responses are given changes nothing.
"""

import hashlib
import itertools
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from jaxalign.configs import check_fields
from jaxalign.errors import UserError
from jaxalign.feedback import pair_filters
from jaxalign.feedback.pair_filters import TOLERANCE, LengthBalance
from jaxalign.feedback.pair_statistics import (
    Pair,
    ScoredPrompt,
    ScoredResponse,
    Statistics,
    statistics_of,
)


__all__ = ["PairingConfig", "ScoredPrompt", "ScoredResponse", "Statistics", "pair"]


Strategy: TypeAlias = Literal["best_worst", "all", "random"]


@dataclass(frozen=True, kw_only=True)
class PairingConfig:
    """Which pairs of responses to one prompt become records.

    Attributes:
      strategy: ``best_worst`` takes the pair with the largest gap, then the largest
        among responses not used yet (second best and second worst), and so on; ``all``
        takes pairs by falling gap, a response as often as it comes; ``random`` takes
        any, as RLAIF-V does. What is equal is ordered by a hash of texts and ``seed``.
      min_gap: least difference of scores, chosen - rejected. Ties are never paired.
        Default 0.5; in rounds with the graded score of risks, which lies in 0..1, 0.1.
      max_pairs_per_prompt: how many are taken at most.
      max_length_ratio: longer text / shorter text, in characters; pairs above it are
        dropped.
      length_balance: at last, drop pairs in which the side that is longer on average
        is longer by more than a share of the longer text: the share that brings the
        mean difference of lengths nearest to zero.
      max_similarity: pairs of texts more alike than this are dropped: Jaccard index of
        the character trigrams, counted as often as they occur. Off by default, since
        answers that differ in one fact are alike and teach most.
      contradictory_share: of the segment pairs that the loss selects; from this share
        of contradictory ones on a pair is dropped. At 1: if its best chosen segment is
        not above the worst rejected one.
      seed: of the hash.

    >>> PairingConfig().strategy
    'best_worst'
    """

    strategy: Strategy = "best_worst"
    min_gap: float | None = None
    max_pairs_per_prompt: int = 2
    max_length_ratio: float | None = None
    length_balance: bool = False
    max_similarity: float | None = None
    contradictory_share: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(self)
        ratio, alike = self.max_length_ratio, self.max_similarity
        for name, fine, expected in (
            ("min_gap", 0 <= self.least_gap < math.inf, "a number of at least 0"),
            ("max_pairs_per_prompt", self.max_pairs_per_prompt >= 1, "at least 1"),
            (
                "max_length_ratio",
                ratio is None or 1 <= ratio < math.inf,
                "at least 1 (equal lengths), or null for no bound",
            ),
            (
                "max_similarity",
                alike is None or 0 <= alike < 1,
                "0 or more and below 1, or null for no bound",
            ),
            (
                "contradictory_share",
                0 < self.contradictory_share <= 1,
                "above 0 and at most 1",
            ),
        ):
            if not fine:
                got = getattr(self, name)
                raise UserError(f"pairing.{name}: expected {expected}: got {got}")

    @property
    def least_gap(self) -> float:
        """The least difference of scores that makes a pair."""
        return 0.5 if self.min_gap is None else self.min_gap


def pair(
    prompts: Iterable[ScoredPrompt], config: PairingConfig
) -> tuple[list[dict[str, Any]], Statistics]:
    """Return the feedback records of DESIGN 4.1, in the prompts' order, and statistics.

    A record holds the prompt and two texts, their segments with the scores as they are
    (``chosen_segments``, ``rejected_segments``, where there are any), ``images`` where
    there are any, and the overall ``chosen_score`` and ``rejected_score``.

    The short way from scores of one's own to training: whatever scored them, responses
    with a number each are enough, and the records train as they are.

    Raises:
      UserError: a score is not finite.

    >>> answers = [("Air scatters blue.", 3.5), ("Sea.", 1.0)]
    >>> scored = ScoredPrompt("Sky?", [ScoredResponse(*answer) for answer in answers])
    >>> (made,), statistics = pair([scored], PairingConfig(min_gap=1.0))
    >>> made["chosen"], made["rejected"], made["chosen_score"] - made["rejected_score"]
    ('Air scatters blue.', 'Sea.', 2.5)
    >>> statistics.fates["kept"]
    1
    """
    groups = [(prompt, _select(_fates(prompt, config), config)) for prompt in prompts]
    balance = None
    kept = [p.texts for _, pairs in groups for p in pairs if p.fate == "kept"]
    if config.length_balance and kept:
        balance = pair_filters.balance(kept)
        groups = [(prompt, _balanced(pairs, balance)) for prompt, pairs in groups]
    records = [
        _record(prompt, found)
        for prompt, pairs in groups
        for found in pairs
        if found.fate == "kept"
    ]
    return records, statistics_of(groups, balance)


def _fates(prompt: ScoredPrompt, config: PairingConfig) -> list[Pair]:
    """Return all pairs with their fate so far: "kept" means that it may be selected."""
    responses = sorted(prompt.responses, key=_canonical)
    scores: dict[str, list[float]] = {}
    for text, score, _ in responses:
        if score is not None:
            if not math.isfinite(score):
                raise UserError(
                    f"a response has the score {score}: expected a finite number, or "
                    "None where its judgement failed"
                )
            scores.setdefault(text, []).append(score)
    unsure = {t for t, found in scores.items() if max(found) - min(found) > TOLERANCE}
    alike = config.max_similarity is not None
    grams = {text: pair_filters.grams(text) for text in scores} if alike else {}
    met: set[tuple[str, str]] = set()
    pairs = []
    for one, other in itertools.combinations(responses, 2):
        if one.score is None or other.score is None:
            pairs.append(Pair(one, other, 0.0, "failed"))
            continue
        first, second = (one, other) if one.score > other.score else (other, one)
        gap = abs(one.score - other.score)
        found = Pair(first, second, gap, "kept")
        # The texts in the order of the sorted responses: equal for equal pairs.
        both = (one.text, other.text)
        if one.text == other.text:
            fate = "identical"
        elif unsure.intersection(both):
            fate = "inconsistent"
        elif both in met:
            fate = "repeated"
        else:
            fate = _fate(found, config, grams)
            met.add(both)
        pairs.append(found._replace(fate=fate))
    return pairs


def _canonical(response: ScoredResponse) -> tuple[str, bool, float, str]:
    score = response.score
    return response.text, score is None, score or 0.0, repr(response.segments)


def _fate(found: Pair, config: PairingConfig, grams: Mapping[str, Counter[str]]) -> str:
    chosen, rejected = found.texts
    if found.gap <= TOLERANCE:
        return "tie"
    if found.gap < config.least_gap - TOLERANCE:
        return "below_gap"
    if config.max_similarity is not None:
        alike = pair_filters.similarity(grams[chosen], grams[rejected])
        if alike > config.max_similarity:
            return "near_duplicate"
    against = pair_filters.contradictory_share(
        found.chosen.segments, found.rejected.segments
    )
    if against >= config.contradictory_share:
        return "contradictory"
    ratio = pair_filters.length_ratio(chosen, rejected)
    if config.max_length_ratio is not None and ratio > config.max_length_ratio:
        return "length_ratio"
    return "kept"


def _select(pairs: list[Pair], config: PairingConfig) -> list[Pair]:
    """Return the pairs, those first that are kept, in the order of their selection."""
    ready = [p for p in pairs if p.fate == "kept"]
    ready.sort(key=lambda p: _hash(p, config.seed))
    if config.strategy != "random":
        ready.sort(key=lambda p: -round(p.gap / TOLERANCE))
    kept: list[Pair] = []
    left: list[Pair] = []
    used: set[str] = set()
    for found in ready:
        once = config.strategy == "best_worst"
        if len(kept) == config.max_pairs_per_prompt or (
            once and used.intersection(found.texts)
        ):
            left.append(found._replace(fate="not_selected"))
        else:
            kept.append(found)
            used.update(found.texts)
    return [*kept, *left, *(p for p in pairs if p.fate != "kept")]


def _hash(found: Pair, seed: int) -> bytes:
    text = json.dumps([seed, *found.texts])
    return hashlib.sha256(text.encode("ascii")).digest()


def _balanced(pairs: list[Pair], balance: LengthBalance) -> list[Pair]:
    return [
        p
        if p.fate != "kept" or pair_filters.within(balance, *p.texts)
        else p._replace(fate="length_balance")
        for p in pairs
    ]


def _record(prompt: ScoredPrompt, found: Pair) -> dict[str, Any]:
    given = prompt.prompt
    record: dict[str, Any] = {
        "prompt": given if isinstance(given, str) else [dict(turn) for turn in given]
    }
    record |= prompt.columns
    if prompt.images:
        record["images"] = list(prompt.images)
    sides = (("chosen", found.chosen), ("rejected", found.rejected))
    record |= {side: response.text for side, response in sides}
    for side, response in sides:
        if response.segments:
            record[f"{side}_segments"] = [
                s.model_dump(exclude_defaults=True) for s in response.segments
            ]
    return record | {f"{side}_score": response.score for side, response in sides}
