"""Arena-Hard's scores: the authors' numbers, and comparisons worked out by hand."""

import csv
import gzip
import json
import math
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from jaxalign.errors import UserError
from jaxalign.evaluation.boards.bradley_terry import (
    Battle,
    controlled_share,
    elo_of,
    ratings,
    share_of_elo,
    weighted_share,
)
from jaxalign.evaluation.boards.style import difference, style_of
from jaxalign.evaluation.statistics import Figure


@pytest.fixture
def folder(shared_data: Path) -> Path:
    folder = shared_data / "arena_hard"
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent")
    return folder


def vision_battles(folder: Path) -> dict[str, list[Battle]]:
    """Return the battles of each model; the baseline is the first side in the file."""
    found = defaultdict(list)
    scores = {"model_a": 0.0, "model_b": 1.0}
    with gzip.open(folder / "vision_battles_120.jsonl.gz", "rt") as file:
        for row in map(json.loads, file):
            model, baseline = row["model_b"], row["model_a"]
            score = scores.get(row["winner"], 0.5)
            battle = Battle(row["question_id"], model, baseline, score)
            found[model].append(battle)
    return found


WANT = {
    "claude-3-5-sonnet-20240620": 88.694853,
    "claude-3-opus-20240229": 75.972763,
    "gpt-4o": 86.823105,
    "gpt-4o-mini": 80.057252,
}


# --- by hand -----------------------------------------------------------------------


def test_a_round_robin_meets_its_stationarity() -> None:
    # At the optimum each model's expected score is its score.
    rng = np.random.default_rng(0)
    names = ["a", "b", "c", "d"]
    battles = [
        Battle(
            q, first, second, float(rng.choice([0, 0.5, 1])), float(rng.choice([1, 3]))
        )
        for q in range(30)
        for first, second in (("a", "b"), ("b", "c"), ("c", "d"), ("a", "d"))
    ]
    found = ratings(battles, "a")
    assert found["a"] == 0.0
    for name in names:
        expected = scored = 0.0
        for battle in battles:
            chance = 1 / (1 + math.exp(found[battle.second] - found[battle.first]))
            if battle.first == name:
                expected += battle.weight * chance
                scored += battle.weight * battle.score
            elif battle.second == name:
                expected += battle.weight * (1 - chance)
                scored += battle.weight * (1 - battle.score)
        assert expected == pytest.approx(scored, abs=1e-8)


def test_the_anchor_moves_all_ratings_alike() -> None:
    battles = [
        Battle(q, *pair, score)
        for q, (pair, score) in enumerate(
            [(("a", "b"), 1), (("b", "a"), 1), (("b", "c"), 1), (("c", "a"), 1)]
        )
    ]
    by_a, by_c = ratings(battles, "a"), ratings(battles, "c")
    for name in "abc":
        assert by_a[name] - by_a["c"] == pytest.approx(by_c[name], abs=1e-10)


@pytest.mark.parametrize(
    "rows, apart",
    [
        ([("m", "b", 1.0)], "b only won, only lost, or never met|m only won"),
        ([("m", "b", 0.5), ("x", "y", 0.5)], "x, y only won"),
        ([("m", "b", 0.5), ("m", "x", 1.0)], "only lost, or never met"),
    ],
)
def test_ratings_that_are_not_finite(rows, apart) -> None:
    battles = [Battle(0, *row) for row in rows]
    with pytest.raises(UserError, match=apart):
        ratings(battles, "b")


def test_an_unknown_baseline() -> None:
    with pytest.raises(UserError, match="the baseline x is in no comparison"):
        ratings([Battle(0, "m", "b", 0.5)], "x")


def test_a_perfect_share_has_no_finite_rating_but_is_a_share() -> None:
    battles = [Battle(q, "m", "b", 1.0) for q in range(3)]
    assert weighted_share(battles).value == 1.0
    assert elo_of(1.0) == math.inf and elo_of(0.0) == -math.inf


def test_elo_both_ways() -> None:
    for share in (0.01, 0.5, 0.7):
        assert share_of_elo(elo_of(share, 1114.0), 1114.0) == pytest.approx(share)


def test_nothing_and_one_question() -> None:
    assert weighted_share([]) == Figure(None, None, None, 0)
    assert controlled_share([]) == (Figure(None, None, None, 0), [])
    one = weighted_share([Battle(0, "m", "b", 1.0, 3.0), Battle(0, "m", "b", 0.0)])
    assert one == Figure(0.75, None, None, 1)


def test_a_weight_is_so_many_rows() -> None:
    one = [Battle(0, "m", "b", 1.0, 3.0), Battle(1, "m", "b", 0.0)]
    rows = [Battle(0, "m", "b", 1.0)] * 3 + [Battle(1, "m", "b", 0.0)]
    for unit in ("battle", "question"):
        assert weighted_share(one, unit=unit) == weighted_share(rows, unit=unit)


# --- style -------------------------------------------------------------------------


def test_counts_of_a_text() -> None:
    text = (
        "## Head\n\n1. one\n- two\n  * three\n**a** and __b__\n```py\n# no\n- no\n```"
    )
    assert style_of(text, len) == (len(text), 1, 3, 2)
    assert style_of("#no header\n-no item\n** no **\nbold**", len)[1:] == (0, 0, 1)


def test_differences_by_hand() -> None:
    a, b = style_of("# x", lambda _: 9), style_of("plain", lambda _: 4)
    first, headers, *rest = difference(a, b)
    assert first == 5 / 13
    assert headers == pytest.approx((1 / 10) / (1 / 10 + 1))
    assert rest == [0, 0]
    assert difference(a, b, "count") == (5 / 14, 1 / 2, 0, 0)
    empty = style_of("")
    assert difference(empty, empty) == (0, 0, 0, 0)


def styled(n: int, seed: int = 0) -> list[Battle]:
    """Return battles of a model that is better, and longer, which is liked too."""
    rng = np.random.default_rng(seed)
    found = []
    for question in range(n):
        style = rng.normal(0.4, 0.3, size=2)
        chance = 1 / (1 + math.exp(-(0.5 + 3 * style[0])))
        for _ in range(2):
            score = float(rng.uniform() < chance)
            found.append(Battle(question, "m", "b", score, 1.0, tuple(style)))
    return found


def test_style_control_takes_the_style_out() -> None:
    battles = styled(2000)
    figure, coefficients = controlled_share(battles, rounds=20)
    assert figure.value == pytest.approx(1 / (1 + math.exp(-0.5)), abs=0.04)
    assert coefficients == pytest.approx([0.9, 0.0], abs=0.1)
    raw = weighted_share(battles, rounds=20).value
    assert raw is not None and raw > figure.value + 0.12
    # Centred on a single model, what is to be controlled for is taken out instead.
    centred, again = controlled_share(battles, centred=True, rounds=2)
    assert centred.value == pytest.approx(raw, abs=0.05)
    assert again == pytest.approx(coefficients, abs=1e-9)


def test_style_control_is_scikit_learns_fit() -> None:
    battles = styled(200, seed=1)
    styles = np.array([b.style for b in battles])
    x = np.column_stack([np.ones(len(styles)), styles / styles.std(axis=0, ddof=1)])
    y = [b.score for b in battles]
    want = (
        LogisticRegression(C=np.inf, fit_intercept=False, tol=1e-10).fit(x, y).coef_[0]
    )
    figure, coefficients = controlled_share(battles, rounds=2)
    assert figure.value == pytest.approx(1 / (1 + np.exp(-want[0])), abs=1e-6)
    np.testing.assert_allclose(coefficients, want[1:], atol=1e-5)


def test_a_style_that_tells_all_apart_gives_no_figure() -> None:
    battles = [Battle(q, "m", "b", q % 2, 1.0, (q % 2 - 0.5,)) for q in range(10)]
    assert controlled_share(battles) == (Figure(None, None, None, 10), [])


# --- the authors' numbers ----------------------------------------------------------


@pytest.mark.data
def test_elo_file_gives_the_board_s_scores(folder: Path) -> None:
    with (folder / "v0.1_bt_elo_bootstrap.jsonl").open() as file:
        elo = {row["model"]: row for row in map(json.loads, file)}
    with (folder / "leaderboard_20240731.csv").open(newline="") as file:
        board = {row["model"]: float(row["score"]) for row in csv.DictReader(file)}
    base = elo["gpt-4-0314"]["score"]
    found = {
        model: 100 * share_of_elo(row["score"], base)
        for model, row in elo.items()
        if model in board
    }
    assert len(found) == 23
    for model, value in found.items():
        assert value == pytest.approx(board[model], abs=0.011), model
    assert found["gpt-3.5-turbo-0125"] == pytest.approx(23.34, abs=0.011)
    assert found["gpt-4-0613"] == pytest.approx(37.90, abs=0.011)


@pytest.mark.data
def test_a_star_s_ratings_are_weighted_shares(folder: Path) -> None:
    battles = vision_battles(folder)
    assert sum(map(len, battles.values())) == 2136
    assert battles.keys() == WANT.keys()
    every = [battle for rows in battles.values() for battle in rows]
    found = ratings(every, "claude-3-haiku-20240307")
    for model, want in WANT.items():
        value = weighted_share(battles[model], rounds=2).value
        assert value is not None
        assert 100 * value == pytest.approx(want, abs=1e-6)
        by_rating = share_of_elo(400 / math.log(10) * found[model], 0.0)
        assert 100 * by_rating == pytest.approx(want, abs=1e-6)


@pytest.mark.data
def test_intervals_over_questions_are_twice_as_wide(folder: Path) -> None:
    for model, rows in vision_battles(folder).items():
        widths = []
        for unit in ("battle", "question"):
            figure = weighted_share(rows, unit=unit)
            assert figure.interval is not None and figure.n == 120
            widths.append(figure.interval[1] - figure.interval[0])
            if model.startswith("claude-3-5"):
                want = (85.95, 91.15) if unit == "battle" else (83.71, 93.23)
                ends = [100 * end for end in figure.interval]
                # Those were of fewer rounds, whose ends move by half a point.
                assert ends == pytest.approx(want, abs=0.6)
        assert 1.7 < widths[1] / widths[0] < 2.2
