"""Pairing: which responses stand against each other, and the fate of every pair."""

import dataclasses
import itertools
import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxalign.data import records
from jaxalign.data.records import Segment
from jaxalign.errors import UserError
from jaxalign.feedback import pair_filters
from jaxalign.feedback.pair_statistics import FATES
from jaxalign.feedback.pairing import (
    PairingConfig,
    ScoredPrompt,
    ScoredResponse,
    Statistics,
    pair,
)


EVERY = PairingConfig(strategy="all", min_gap=0.0, max_pairs_per_prompt=1000)


def scored(**scores: float | None) -> ScoredPrompt:
    """A prompt with these texts and scores."""
    return ScoredPrompt("p", [ScoredResponse(t, s) for t, s in scores.items()])


def segment(at: int, **scores: float) -> Segment:
    return Segment(start=at, end=at + 1, scores=scores)


def pairs_of(prompt: ScoredPrompt, **options: Any) -> list[tuple[str, str]]:
    found, statistics = pair([prompt], dataclasses.replace(EVERY, **options))
    n = len(prompt.responses)
    assert sum(statistics.fates.values()) == n * (n - 1) // 2
    return [(record["chosen"], record["rejected"]) for record in found]


def fates_of(prompt: ScoredPrompt, **options: Any) -> dict[str, int]:
    _, statistics = pair([prompt], dataclasses.replace(EVERY, **options))
    return {fate: n for fate, n in statistics.fates.items() if n}


# What is taken


def test_best_and_worst_then_second_best_and_second_worst() -> None:
    prompt = scored(e=0.0, a=4.0, c=2.0, b=3.0, d=1.0)
    options = {"strategy": "best_worst", "min_gap": 0.5}
    assert pairs_of(prompt, **options) == [("a", "e"), ("b", "d")]
    assert pairs_of(prompt, **options, max_pairs_per_prompt=1) == [("a", "e")]
    # b - d = 2 is below the gap; d and e have only the used ones left beside c.
    assert pairs_of(prompt, **options | {"min_gap": 2.5}) == [("a", "e")]


def test_all_pairs_come_by_falling_gap() -> None:
    prompt = scored(a=4.0, b=3.5, c=1.0)
    found = pairs_of(prompt)
    assert found == [("a", "c"), ("b", "c"), ("a", "b")]  # gaps 3, 2.5, 0.5
    assert pairs_of(prompt, min_gap=0.5) == found
    assert pairs_of(prompt, min_gap=0.51) == found[:2]
    assert pairs_of(prompt, max_pairs_per_prompt=2) == found[:2]
    assert fates_of(prompt, min_gap=0.51, max_pairs_per_prompt=1) == {
        "kept": 1,
        "not_selected": 1,
        "below_gap": 1,
    }


def test_random_pairs_are_any_above_the_gap() -> None:
    prompt = scored(**{f"text {n}": float(n) for n in range(8)})
    taken = [
        pairs_of(
            prompt, strategy="random", min_gap=3.0, max_pairs_per_prompt=2, seed=seed
        )
        for seed in range(40)
    ]
    assert all(len(found) == 2 for found in taken)
    # Gaps of 3 to 7 among 8 scores: 5 + 4 + 3 + 2 + 1 pairs, each of which comes up.
    assert len({one for found in taken for one in found}) == 15
    assert taken[3] == pairs_of(
        prompt, strategy="random", min_gap=3.0, max_pairs_per_prompt=2, seed=3
    )


def test_what_is_equal_is_ordered_by_the_seed_not_by_the_alphabet() -> None:
    prompt = scored(a=1.0, b=1.0, c=1.0, d=1.0, z=0.0)
    options = {"strategy": "best_worst", "max_pairs_per_prompt": 1}
    taken = {pairs_of(prompt, **options, seed=seed)[0] for seed in range(40)}
    assert taken == {(text, "z") for text in "abcd"}


def test_a_gap_that_is_only_rounded_below_is_one() -> None:
    # 0.3 - 0.2 is 0.09999999999999998 in binary; 0.1 + 0.2 is not 0.3.
    assert pairs_of(scored(a=0.3, b=0.2), min_gap=0.1) == [("a", "b")]
    assert fates_of(scored(a=0.1 + 0.2, b=0.3)) == {"tie": 1}


def test_negative_scores_are_scores() -> None:
    # Claims and risks score 0 and below: fewer rejected claims are better.
    assert pairs_of(scored(a=-3.0, b=-1.0), min_gap=2.0) == [("b", "a")]


# What is dropped


def test_the_first_fate_that_applies_is_counted() -> None:
    same = [ScoredResponse("a", 3.0), ScoredResponse("a", 3.0)]
    others = [ScoredResponse("b", 1.0), ScoredResponse("c", None)]
    # aa identical; ab kept, and once more repeated; ac, ac, bc failed.
    assert fates_of(ScoredPrompt("p", [*same, *others])) == {
        "failed": 3,
        "identical": 1,
        "repeated": 1,
        "kept": 1,
    }


def test_one_text_with_two_scores_is_in_no_pair() -> None:
    twice = [ScoredResponse("a", 3.0), ScoredResponse("a", 1.0)]
    prompt = ScoredPrompt("p", [*twice, ScoredResponse("b", 2.0)])
    assert fates_of(prompt) == {"identical": 1, "inconsistent": 2}
    # A failure is no second score: the text that was judged stays.
    once = [ScoredResponse("a", 3.0), ScoredResponse("a", None)]
    prompt = ScoredPrompt("p", [*once, ScoredResponse("b", 2.0)])
    assert fates_of(prompt) == {"failed": 2, "kept": 1}


def test_near_duplicates_are_dropped_above_the_bound() -> None:
    # abc bcd of abcd against abc bce of abce: one of three trigrams is shared.
    prompt = scored(abcd=1.0, abce=0.0)
    assert fates_of(prompt, max_similarity=0.34) == {"kept": 1}
    assert fates_of(prompt, max_similarity=0.33) == {"near_duplicate": 1}
    assert fates_of(prompt) == {"kept": 1}, "off by default"
    # The same words in other case, width and spaces are not the same text, but alike.
    prompt = scored(**{"Ｏne  two": 1.0, "one TWO": 0.0})
    assert fates_of(prompt, max_similarity=0.99) == {"near_duplicate": 1}
    assert fates_of(scored(**{"": 1.0, "好": 0.0}), max_similarity=0.0) == {"kept": 1}


@given(st.text(max_size=30), st.text(max_size=30))
def test_similarity_is_a_symmetric_share(one, other) -> None:
    a, b = pair_filters.grams(one), pair_filters.grams(other)
    assert pair_filters.similarity(a, a) == 1
    found = pair_filters.similarity(a, b)
    assert 0 <= found <= 1 and found == pair_filters.similarity(b, a)
    shared = sum(min(a[gram], b[gram]) for gram in a)
    assert math.isclose(found, shared / (a.total() + b.total() - shared))


def test_grams_are_counted_as_often_as_they_occur() -> None:
    # aaa twice in aaaa and four times in aaaaaa: 2 / 4, where plain sets would say 1.
    four, six = pair_filters.grams("aaaa"), pair_filters.grams("aaaaaa")
    assert pair_filters.similarity(four, six) == 0.5


def test_contradictory_segments_against_their_score() -> None:
    high = (segment(0, x=4.0, y=2.0), segment(1, x=1.0, y=1.0))  # r = 3, 1
    low = (segment(0, x=2.0, y=2.0), segment(1, x=1.0, y=0.0))  # r = 2, 0.5
    # Rank by rank: 3 against 0.5 holds, 1 against 2 contradicts.
    assert pair_filters.contradictory_share(high, low) == 0.5
    # One segment against two: only 3 against 0.5 is selected.
    assert pair_filters.contradictory_share(high[:1], low) == 0
    # 0.5 and 2 against 1 and 3: 2 against 1 holds, 0.5 against 3 contradicts.
    assert pair_filters.contradictory_share(low, high) == 0.5
    # The best is not above the worst: equal is not above.
    assert pair_filters.contradictory_share(low[1:], high) == 1
    assert pair_filters.contradictory_share(low[:1], low[:1]) == 1
    assert pair_filters.contradictory_share(high, ()) == 0

    def fate(chosen: tuple[Segment, ...], **options: float) -> dict[str, int]:
        responses = [ScoredResponse("aa", 9.0, chosen), ScoredResponse("bb", 1.0, low)]
        return fates_of(ScoredPrompt("p", responses), **options)

    assert fate(high) == {"kept": 1}
    assert fate(high, contradictory_share=0.5) == {"contradictory": 1}
    assert fate(high, contradictory_share=0.51) == {"kept": 1}
    assert fate(low[1:]) == {"contradictory": 1}, "always dropped where all contradict"
    assert fate(()) == {"kept": 1}


@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=6),
    st.lists(st.integers(0, 4), min_size=1, max_size=6),
)
def test_all_contradict_where_the_best_is_not_above_the_worst(one, other) -> None:
    chosen, rejected = (
        [segment(at, x=float(score)) for at, score in enumerate(row)]
        for row in (one, other)
    )
    share = pair_filters.contradictory_share(chosen, rejected)
    assert (share == 1) == (max(one) <= min(other))


def test_texts_of_too_different_length_are_dropped() -> None:
    prompt = scored(aaaa=1.0, bb=0.0)
    assert fates_of(prompt, max_length_ratio=2.0) == {"kept": 1}
    assert fates_of(prompt, max_length_ratio=1.9) == {"length_ratio": 1}
    # An empty text is shorter than any by every ratio.
    assert fates_of(scored(**{"": 1.0, "b": 0.0}), max_length_ratio=9.0) == {
        "length_ratio": 1
    }


# Length balance


def lengths(*pairs: tuple[int, int]) -> list[ScoredPrompt]:
    return [
        ScoredPrompt(
            f"p{n}", [ScoredResponse("a" * c, 1.0), ScoredResponse("b" * r, 0.0)]
        )
        for n, (c, r) in enumerate(pairs)
    ]


@pytest.mark.parametrize("flip", [False, True])
def test_length_balance_drops_the_side_that_is_longer(flip) -> None:
    # Differences 80, 10, -10; shares of the longer text 0.8, 0.1, -0.1. A bound from
    # 0.8 on keeps all (mean 80/3), from 0.1 to 0.78 the last two (mean 0), below 0.1
    # the last (-10). The widest with a mean of 0 is 0.78.
    sizes = [(100, 20), (100, 90), (90, 100)]
    prompts = lengths(*((r, c) if flip else (c, r) for c, r in sizes))
    config = dataclasses.replace(EVERY, length_balance=True)
    found, statistics = pair(prompts, config)
    assert statistics.length_balance == (("rejected" if flip else "chosen"), 0.78)
    assert [record["prompt"] for record in found] == ["p1", "p2"]
    assert statistics.fates["length_balance"] == 1 and statistics.fates["kept"] == 2
    before, after = statistics.before, statistics.after
    assert before.chosen_length == pytest.approx(210 / 3 if flip else 290 / 3)
    assert after.chosen_length == after.rejected_length == 95


def test_length_balance_of_balanced_pairs_keeps_them() -> None:
    config = dataclasses.replace(EVERY, length_balance=True)
    found, statistics = pair(lengths((3, 3), (5, 2), (2, 5)), config)
    assert len(found) == 3 and statistics.length_balance == ("chosen", 1.0)
    found, statistics = pair([scored(a=1.0)], config)
    assert not found and statistics.length_balance is None


@given(
    st.lists(
        st.tuples(st.integers(0, 60), st.integers(0, 60)).filter(
            lambda p: p[0] != p[1]
        ),
        min_size=1,
        max_size=12,
    )
)
def test_length_balance_never_makes_it_worse(sizes) -> None:
    def mean(found: list[dict[str, Any]]) -> float:
        return sum(len(r["chosen"]) - len(r["rejected"]) for r in found) / len(found)

    plain, _ = pair(lengths(*sizes), EVERY)
    even, statistics = pair(
        lengths(*sizes), dataclasses.replace(EVERY, length_balance=True)
    )
    assert even and all(record in plain for record in even)
    assert abs(mean(even)) <= abs(mean(plain))
    # No bound of the grid is better, found here by trying each.
    assert statistics.length_balance is not None
    sign = 1 if statistics.length_balance.longer == "chosen" else -1
    for step in range(50):
        kept = [(c, r) for c, r in sizes if sign * (c - r) / max(c, r) <= step / 50]
        if kept:
            other = sum(c - r for c, r in kept) / len(kept)
            assert abs(mean(even)) <= abs(other) + 1e-12


# Records and statistics


def test_a_record_holds_segments_and_scores_as_they_are() -> None:
    turns = [{"role": "user", "content": "Why?"}]
    good = (segment(0, clarity=4.0, safety=3.5), segment(2, clarity=3.0, safety=4.0))
    bad = (segment(0, clarity=0.0, safety=1.0),)
    prompt = ScoredPrompt(
        turns, [ScoredResponse("no", 0.5, bad), ScoredResponse("yes", 3.625, good)]
    )
    ((record,), _) = pair([prompt], EVERY)
    assert record == {
        "prompt": turns,
        "chosen": "yes",
        "rejected": "no",
        "chosen_segments": [
            {"start": 0, "end": 1, "scores": {"clarity": 4, "safety": 3.5}},
            {"start": 2, "end": 3, "scores": {"clarity": 3, "safety": 4}},
        ],
        "rejected_segments": [
            {"start": 0, "end": 1, "scores": {"clarity": 0, "safety": 1}}
        ],
        "chosen_score": 3.625,
        "rejected_score": 0.5,
    }
    read = records.parse(json.loads(json.dumps(record)))
    assert (read.chosen_segments, read.rejected_segments) == (good, bad)
    # Claims have no segments: sequence-level objectives read such a record.
    ((record,), _) = pair([scored(a=0.0, b=-2.0)], EVERY)
    assert set(record) == {
        *("prompt", "chosen", "rejected", "chosen_score", "rejected_score")
    }
    assert records.parse(record).chosen_segments is None
    pictured = scored(a=0.0, b=-2.0)._replace(images=("a.png",))
    ((record,), _) = pair([pictured], EVERY)
    assert record["images"] == ["a.png"]


def test_statistics_say_what_became_of_everything() -> None:
    prompts = [
        scored(aaaa=4.0, bb=2.0, c=None),  # kept: gap 2
        scored(dd=3.0, eeee=3.0),  # a tie
        scored(f=1.0, g=None),  # only one is judged
        scored(hh=2.0, iiii=1.0, j=0.8),  # gaps 1.2, 1, and 0.2, which is below
        ScoredPrompt("none", []),
    ]
    config = PairingConfig(min_gap=0.5, max_pairs_per_prompt=1, strategy="all")
    found, statistics = pair(prompts, config)
    assert [(r["chosen"], r["rejected"]) for r in found] == [
        ("aaaa", "bb"),
        ("hh", "j"),
    ]
    assert statistics.prompts == 5 and statistics.paired == 2
    assert statistics.unpaired == 2  # the third and the last
    assert statistics.responses == 10 and statistics.failed == 2
    assert statistics.fates == dict.fromkeys(FATES, 0) | {
        "failed": 3,
        "tie": 1,
        "below_gap": 1,
        "not_selected": 1,
        "kept": 2,
    }
    # Before: aaaa/bb, hh/j, hh/iiii; after: the first two.
    before, after = statistics.before, statistics.after
    assert (before.pairs, after.pairs) == (3, 2)
    assert before.chosen_length == pytest.approx((4 + 2 + 2) / 3)
    assert before.rejected_length == pytest.approx((2 + 1 + 4) / 3)
    assert (after.chosen_length, after.rejected_length) == (3, 1.5)
    assert before.gaps == pytest.approx((1, 1.1, 1.2, 1.6, 2))
    assert after.gaps == pytest.approx((1.2, 1.4, 1.6, 1.8, 2))
    shown = json.loads(json.dumps(statistics.to_dict()))
    assert shown["before"]["pairs"] == 3 and shown["length_balance"] is None
    assert pair([], config)[1].after.gaps == ()


@pytest.mark.parametrize(
    "options, match",
    [
        (
            {"strategy": "best"},
            "option strategy: Input should be 'best_worst', 'all' or",
        ),
        ({"min_gap": -0.1}, "pairing.min_gap: expected a number of at least 0"),
        ({"min_gap": math.nan}, "got nan"),
        ({"max_pairs_per_prompt": 0}, "max_pairs_per_prompt: expected at least 1"),
        ({"max_length_ratio": 0.9}, "max_length_ratio: expected at least 1"),
        ({"max_similarity": 1.0}, "max_similarity: expected 0 or more and below 1"),
        ({"contradictory_share": 0.0}, "contradictory_share: expected above 0"),
    ],
)
def test_options_out_of_range_are_refused(options, match) -> None:
    if "strategy" in options:
        config = PairingConfig()
        object.__setattr__(config, "strategy", options["strategy"])
        check = config.__post_init__
    else:

        def check() -> None:
            PairingConfig(**options)

    with pytest.raises(UserError, match=match):
        check()


@pytest.mark.parametrize("score", [math.nan, math.inf])
def test_a_score_that_is_no_number_is_refused(score) -> None:
    with pytest.raises(UserError, match="expected a finite number"):
        pair([scored(a=score, b=0.0)], EVERY)


# Properties


SCORES = st.none() | st.integers(-3, 4).map(float) | st.floats(-4, 4)
SEGMENTS = st.lists(st.integers(0, 4), max_size=3).map(
    lambda row: tuple(segment(at, x=float(score)) for at, score in enumerate(row))
)


@st.composite
def responses(draw: st.DrawFn) -> ScoredResponse:
    segments = draw(SEGMENTS)
    text = draw(st.sampled_from("abcdef")) * len(segments) + draw(st.text(max_size=4))
    return ScoredResponse(text, draw(SCORES), segments)


PROMPTS = st.lists(
    st.lists(responses(), max_size=7).map(lambda found: ScoredPrompt("p", found)),
    max_size=3,
)
CONFIGS = st.builds(
    PairingConfig,
    strategy=st.sampled_from(("best_worst", "all", "random")),
    min_gap=st.sampled_from((0.0, 0.5, 1.0)),
    max_pairs_per_prompt=st.integers(1, 4),
    max_length_ratio=st.none() | st.floats(1, 4),
    length_balance=st.booleans(),
    max_similarity=st.none() | st.floats(0, 0.9),
    contradictory_share=st.floats(0.1, 1),
    seed=st.integers(0, 3),
)


@given(PROMPTS, CONFIGS)
def test_what_holds_for_all_pairs(prompts, config) -> None:
    found, statistics = pair(prompts, config)
    assert len(found) == statistics.fates["kept"] == statistics.after.pairs
    assert tuple(statistics.fates) == FATES
    assert sum(statistics.fates.values()) == sum(
        math.comb(len(prompt.responses), 2) for prompt in prompts
    )
    assert len(found) <= config.max_pairs_per_prompt * statistics.paired
    judged = {r.text for p in prompts for r in p.responses if r.score is not None}
    for record in found:
        read = records.parse(json.loads(json.dumps(record)))
        assert read.chosen != read.rejected
        assert {read.chosen, read.rejected} <= judged
        gap = record["chosen_score"] - record["rejected_score"]
        assert gap > 0 and gap >= config.min_gap - 1e-9


@given(st.lists(responses(), max_size=7), CONFIGS, st.randoms(use_true_random=False))
def test_the_order_of_the_responses_changes_nothing(found, config, shuffle) -> None:
    def made(given_: list[ScoredResponse]) -> tuple[list[dict[str, Any]], Statistics]:
        return pair([ScoredPrompt("p", given_)], config)

    mixed = list(found)
    shuffle.shuffle(mixed)
    assert made(found) == made(mixed)


@given(st.lists(responses(), max_size=6), CONFIGS)
def test_best_worst_uses_no_text_twice(found, config) -> None:
    config = dataclasses.replace(config, strategy="best_worst", length_balance=False)
    made, _ = pair([ScoredPrompt("p", found)], config)
    used = [record[side] for record in made for side in ("chosen", "rejected")]
    assert len(used) == len(set(used))


@given(st.lists(st.integers(0, 9), max_size=8, unique=True))
def test_all_pairs_of_different_scores_are_taken(scores) -> None:
    prompt = scored(**{f"text {n}": float(n) for n in scores})
    expected = {
        (f"text {max(two)}", f"text {min(two)}")
        for two in itertools.combinations(scores, 2)
    }
    found = pairs_of(prompt)
    assert set(found) == expected and len(found) == len(expected)
