"""Rules on a teacher's answers, by hand and against counting."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxalign.feedback.distill_filters import (
    ALLUSIONS,
    Balanced,
    answer_fault,
    balance,
    most_refusals,
    quotes,
    trimmed,
)


TOLD = "Somebody saw that the old green door near the river is locked for good reason."


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        # Eight words of the context in a row, from "the" to "is".
        ("Note: the OLD, green door near the river is shut.", True),
        ("The old green door near the river was shut.", False),  # seven
        ("It is locked for good reason.", False),
        ("These remarks tell me to be careful.", True),
        ("My System Prompt forbids it.", True),
        ("", False),
    ],
)
def test_eight_words_in_a_row_or_a_word_about_them_are_a_quotation(
    answer, expected
) -> None:
    assert quotes(answer, TOLD) is expected


def test_words_of_the_prompt_are_no_quotation() -> None:
    said = "The old green door near the river is shut."
    assert quotes(said, TOLD)
    assert not quotes(said, TOLD, ["Why is the old green door near the river is it?"])
    asked = "What is a system prompt?"
    assert not quotes("A system prompt is a text.", TOLD, [asked])
    assert quotes("A system prompt is a text.", TOLD, ["What is a text?"])


def test_without_spaces_characters_are_words() -> None:
    told = "有人看了用户发送的内容并发现其中可能造成伤害的东西"
    assert quotes("我注意到用户发送的内容并发现问题", told)  # nine in a row
    assert not quotes("我注意到用户发送的内容有问题", told)  # seven


def test_allusions_are_in_the_form_that_answers_are_compared_in() -> None:
    assert all(phrase == " ".join(phrase.lower().split()) for phrase in ALLUSIONS)
    assert all(quotes(f"Well, {phrase} this.", "told") for phrase in ALLUSIONS)


@pytest.mark.parametrize(
    ("text", "ended", "expected"),
    [
        ("Four.", "stop", None),
        ("Four.", "length", "cut off"),
        ("", "content_filter", "filtered"),
        (" \n", "stop", "empty"),
        ("<think>2 + 2</think> \n", "stop", "empty"),
        ("<think>2 + 2", "stop", "empty"),
        ("<think>2 + 2</think> 4", "stop", None),
        ("I would not.", "refusal", None),
    ],
)
def test_what_is_no_answer(text, ended, expected) -> None:
    assert answer_fault(text, ended) == expected


@given(st.integers(0, 60), st.sampled_from([0.0, 0.05, 0.1, 0.2, 0.25, 0.5, 0.9]))
def test_as_many_refusals_as_the_share_allows(others: int, share: float) -> None:
    most = most_refusals(others, share)
    shares = [r / max(r + others, 1) for r in (most, most + 1)]
    assert most == 0 or shares[0] <= share + 1e-9
    assert shares[1] > share - 1e-9


def answers(risky, refused=(), benign=()) -> list[Balanced]:
    """Return answers of these lengths: risky, then risky that refuse, then benign."""
    found = [(True, False, n) for n in risky]
    found += [(True, True, n) for n in refused] + [(False, False, n) for n in benign]
    return [Balanced(index, *one) for index, one in enumerate(found)]


def test_the_surplus_of_refusals_goes() -> None:
    some = answers([10] * 9, refused=[10] * 4)
    options: Any = {"max_refusal_share": 0.1, "max_length_ratio": None}
    gone = balance(some, **options)
    # Beside nine others one refusal is a tenth; three of four go.
    assert len(gone) == 3 and set(gone) < {9, 10, 11, 12}
    assert set(gone.values()) == {"refusal share"}
    assert balance(some[::-1], **options) == gone
    drawn = {frozenset(balance(some, **options, seed=seed)) for seed in range(20)}
    assert drawn == set(map(frozenset, itertools.combinations(range(9, 13), 3)))


@pytest.mark.parametrize(("share", "left"), [(0.0, 0), (0.5, 2), (1.0, 3)])
def test_shares_at_the_ends(share: float, left: int) -> None:
    some = answers([10, 10], refused=[10, 10, 10])
    gone = balance(some, max_refusal_share=share, max_length_ratio=None)
    assert len(gone) == 3 - left


def test_the_longest_of_the_longer_side_go() -> None:
    # Means 50 and 10; without 110 they are 30 and 10, without 50 too, 20 and 10.
    some = answers([10, 110, 30, 50], benign=[10, 10])
    options: Any = {"max_refusal_share": 1.0}
    assert balance(some, **options, max_length_ratio=3.0) == {1: "length"}
    both = {1: "length", 3: "length"}
    assert balance(some, **options, max_length_ratio=2.0) == both
    # 1.5 would take three of four.
    assert balance(some, **options, max_length_ratio=1.5) == {}
    assert balance(some, **options, max_length_ratio=None) == {}


def test_the_longer_side_may_be_the_benign_one() -> None:
    some = answers([10, 10], benign=[10, 90])
    gone = balance(some, max_refusal_share=0.1, max_length_ratio=2.0)
    assert gone == {3: "length"}


def test_one_answer_too_long_stays_where_it_is_alone() -> None:
    some = answers([100], benign=[10])
    assert balance(some, max_refusal_share=0.1, max_length_ratio=2.0) == {}


def test_both_hold_in_the_end() -> None:
    # One of nine others may refuse. Both refusals are short; when the longest of the
    # others have gone there is room for none.
    some = answers([10] * 6 + [100] * 3, refused=[10, 10], benign=[10] * 5)
    gone = balance(some, max_refusal_share=0.1, max_length_ratio=2.0)
    left = [one for one in some if one.row not in gone]
    risky = [one.length for one in left if one.risky]
    assert sum(one.refused for one in left) <= 0.1 * len(risky)
    assert np.mean(risky) <= 2 * np.mean([one.length for one in left if not one.risky])
    # With one refusal, 7 of 10 and 3 of 100: without two of 100 the mean is 170 / 8, so
    # all three go, and beside six others one refusal is more than a tenth.
    assert sorted(gone) == [6, 7, 8, 9, 10]


@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=8),
    st.lists(st.integers(1, 50), min_size=1, max_size=8),
    st.sampled_from([1.0, 1.5, 2.0]),
)
def test_the_least_number_is_trimmed(lengths, other, ratio) -> None:
    count = trimmed(lengths, other, ratio)
    ordered = np.sort(np.asarray(lengths, np.float64))
    bound = ratio * np.asarray(other, np.float64).mean()
    means = [ordered[: len(ordered) - n].mean() for n in range(len(ordered))]
    fits = [n for n, mean in enumerate(means) if mean <= bound + 1e-9]
    assert count == (fits[0] if fits else len(lengths))


def test_nothing_is_trimmed_against_nothing() -> None:
    assert trimmed([1000], [], 1.0) == 0
    assert balance([], max_refusal_share=0.1, max_length_ratio=2.0) == {}
    assert math.isfinite(most_refusals(3, 1.0))
