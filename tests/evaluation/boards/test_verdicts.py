"""Verdicts in prose, by hand and against 1,450 stored ratings."""

import gzip
import json
import math
from collections import Counter
from pathlib import Path

import pytest

from jaxalign.errors import UserError
from jaxalign.evaluation.boards.verdicts import (
    arena_verdict,
    points,
    preference,
    rating,
    winner,
)


@pytest.mark.parametrize(
    "text, old, new",
    [
        ("[[A>>B]]", "A>>B", "A>>B"),
        ("[[A>B]] ... [[A>B]]", "A>B", "A>B"),
        ("[[A>B]] ... [[B>A]]", None, "B>A"),
        ("[[a>b]]", None, "A>B"),
        ("[A=B]", None, "A=B"),
        ("[[A<<B]]", None, "A<<B"),  # no label of v0.1
        ("[[B=A]]", None, "B=A"),
        ("[[A>B]] as [B>A] is not in two brackets", "A>B", "A>B"),
        ("[[A>>>B]]", None, None),
        ("[[A]]", None, None),
        ("no verdict", None, None),
        ("", None, None),
    ],
)
def test_labels_of_arena_hard(text, old, new) -> None:
    assert arena_verdict(text, "v0.1") == old
    assert arena_verdict(text) == new


@pytest.mark.parametrize(
    "label, score, weight",
    [
        ("A>>B", 1.0, 3),
        ("A>B", 1.0, 1),
        ("A=B", 0.5, 1),
        ("B=A", 0.5, 1),
        ("B>A", 0.0, 1),
        ("A<B", 0.0, 1),
        ("B>>A", 0.0, 3),
        ("A<<B", 0.0, 3),
        ("B<A", 1.0, 1),
        ("B<<A", 1.0, 3),
    ],
)
def test_points_of_both_sides(label, score, weight) -> None:
    assert points(label, "A") == (score, weight)
    assert points(label, "B") == (1 - score, weight)


def test_points_of_no_label() -> None:
    with pytest.raises(UserError, match="one of A=B, A>>B.*got 'A>C'"):
        points("A>C", "A")


def test_preferences_from_first_tokens() -> None:
    tokens = [["A", math.log(0.5)], [" A", math.log(0.1)], ['"B', math.log(0.2)]]
    assert preference(tokens, "A", "B") == pytest.approx(0.75)
    assert preference(tokens, "B", "A") == pytest.approx(0.25)
    assert preference([["m", -1.0], ["M", -1.0]], "M", "m") == 0.5
    assert preference([["m", -1.0]], "M", "m") == 0.0
    assert preference([["And", -0.1], ["a", -1.0]], "A", "B") is None
    assert preference([], "A", "B") is None


@pytest.mark.parametrize(
    "text, want",
    [
        ("[[10]]", 10.0),
        ("[[1]] then [[9]]", 1.0),
        ("[5] then [[9]]", 9.0),
        ("[[7.]]", 7.0),
        ("[[0]]", None),
        ("[[10.5]]", None),
        ("[[rating: 7]]", None),
        ("Rating: 7/10", None),
        ("$ERROR$", None),
    ],
)
def test_ratings(text, want) -> None:
    assert rating(text) == want


def test_the_unbounded_rating_is_the_official_one() -> None:
    assert rating("[[0]]", bounded=False) == 0.0
    assert rating("[[11]]", bounded=False) == 11.0


def test_winners_are_looked_for_in_a_fixed_order() -> None:
    assert winner("[[C]] or [[B]]") == "B"
    assert winner("[[B]], no, [[A]]") == "A"
    assert winner("[[c]]") is None


@pytest.mark.data
def test_all_stored_ratings(shared_data: Path) -> None:
    path = shared_data / "mt_bench" / "judgments_single.jsonl.gz"
    if not path.exists():
        pytest.skip(f"{path} is absent")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    outcomes = Counter()
    for row in rows:
        read = rating(row["judgment"], bounded=False)
        outcomes["equal"] += row["score"] == (-1 if read is None else read)
        outcomes["failed"] += read is None
        outcomes["out of range"] += read is not None and rating(row["judgment"]) is None
    assert outcomes == {"equal": 1450, "failed": 5, "out of range": 0}
