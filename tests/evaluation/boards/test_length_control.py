"""AlpacaEval's figures: against the published board, and against worked-out cases."""

import csv
import gzip
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxalign.evaluation.boards import length_control
from jaxalign.evaluation.boards.length_control import Coefficients


MODELS = ("claude-2.1", "gemma-7b-it", "vicuna-7b-v1.5")
COSTS = dict(zip(MODELS, (2.782559402, 2.782559402, 21.544346900), strict=True))


def table(path: Path) -> dict[str, dict[str, str]]:
    if not path.exists():
        pytest.skip(f"{path} is absent")
    with path.open(newline="", encoding="utf-8") as file:
        return {row[""]: row for row in csv.DictReader(file)}


@pytest.fixture
def folder(shared_data: Path) -> Path:
    folder = shared_data / "alpaca_eval"
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent")
    return folder


@pytest.fixture
def features(folder: Path) -> dict[str, np.ndarray]:
    with (folder / "lc_features.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {name: np.array([float(row[name]) for row in rows]) for name in rows[0]}


def annotations(folder: Path, model: str) -> list[dict[str, Any]]:
    with gzip.open(folder / f"{model}.annotations.json.gz", "rt") as file:
        return json.load(file)


def terms_of(rows: list[dict[str, Any]]) -> np.ndarray:
    lengths = ([len(row[f"output_{side}"]) for row in rows] for side in (1, 2))
    return length_control.length_term(*lengths)


# --- by hand -----------------------------------------------------------------------


def test_win_rate_of_four_preferences() -> None:
    # w = 0, 1, 0.5, 0.25: mean 7/16; sum of squares 1.3125 - 4·(7/16)² = 0.546875,
    # divided by 3 and by 4. One win, two losses, one draw.
    found = length_control.win_rate([0.0, 1.0, 0.5, 0.25])
    error = math.sqrt(0.546875 / 12)
    assert found.win_rate.value == 7 / 16
    assert found.win_rate.standard_error == pytest.approx(error, abs=1e-15)
    assert found.win_rate.interval == pytest.approx(
        (7 / 16 - 1.96 * error, 7 / 16 + 1.96 * error), abs=1e-4
    )
    assert (found.wins, found.losses, found.draws) == (1, 2, 1)
    assert found.discrete_win_rate.value == 1.5 / 4


def test_nothing_and_one() -> None:
    nothing = length_control.win_rate([])
    assert nothing.win_rate == (None, None, None, 0)
    one = length_control.win_rate([0.75]).win_rate
    assert (one.value, one.standard_error, one.n) == (0.75, None, 1)


def test_predictions_between_two_models() -> None:
    difficulty = np.array([0.0, 1.0])
    first, second = Coefficients(9.0, 2.0, 1.0), Coefficients(-9.0, 1.0, 0.5)
    value, spread = length_control.predict(first, difficulty, second)
    low, high = 1 / (1 + math.exp(-0.5)), 1 / (1 + math.exp(-1.5))
    assert value == pytest.approx((low + high) / 2, abs=1e-15)
    # sd (ddof 1) of two values is their distance / sqrt(2); over sqrt(2) again.
    assert spread == pytest.approx((high - low) / 2, abs=1e-15)
    assert length_control.predict(first, difficulty, first) == (0.5, 0.0)


def test_a_row_without_a_preference_is_predicted() -> None:
    terms = np.linspace(-1, 1, 10)
    w = [0.2, 0.4, 0.9, 0.1, 0.3, 0.6, 0.2, 0.8, 0.5, None]
    found = length_control.control(w, terms, cost=1e4, rounds=0)
    assert found.win_rate.n == 10 and found.variant == "minimal"
    shorter = length_control.control(w[:9], terms[:9], cost=1e4, rounds=0)
    assert found.win_rate.value == pytest.approx(shorter.win_rate.value, abs=1e-12)


def test_what_cannot_be_fitted() -> None:
    with pytest.raises(ValueError, match="needs 5 preferences"):
        length_control.control([0.5, None, 1.0, 1.0, 0.0], np.zeros(5))
    with pytest.raises(ValueError, match="give them of all rows"):
        made_up = length_control.likely_gamed(np.zeros(2))
        length_control.control([0.5, 1.0], np.zeros(2), gamed=made_up, cost=1.0)


def test_the_interval_is_a_bootstrap_s() -> None:
    rng = np.random.default_rng(0)
    w, lengths = rng.uniform(size=300), rng.integers(10, 90, size=(2, 300))
    terms = length_control.length_term(*lengths)
    found = length_control.control(w.tolist(), terms, cost=1e3).win_rate
    assert found.interval is not None and found.standard_error is not None
    # Lengths that say nothing of w cost next to no certainty.
    raw = length_control.win_rate(w.tolist()).win_rate
    assert found.standard_error == pytest.approx(raw.standard_error, rel=0.25)
    assert found.interval[0] < raw.value < found.interval[1]


# --- the board ---------------------------------------------------------------------


@pytest.mark.data
@pytest.mark.parametrize("model", MODELS)
def test_win_rates_are_the_board_s(folder: Path, model: str) -> None:
    board = table(folder / "leaderboard.csv")[model]
    found = length_control.win_rate(
        [row["preference"] - 1 for row in annotations(folder, model)]
    )
    for figure, name in (
        (found.win_rate, "win_rate"),
        (found.discrete_win_rate, "discrete_win_rate"),
    ):
        assert figure.value is not None
        assert 100 * figure.value == pytest.approx(float(board[name]), abs=1e-9)
    error = found.win_rate.standard_error
    assert error is not None
    assert 100 * error == pytest.approx(float(board["standard_error"]), abs=1e-9)
    counts = (found.wins, found.losses, found.draws)
    assert counts == tuple(int(board[n]) for n in ("n_wins", "n_wins_base", "n_draws"))


@pytest.mark.data
@pytest.mark.parametrize(
    "model, win_rate, error, counts, discrete",
    [
        ("claude-2.1", 15.733506736, 1.120315865, (115, 688, 2), 14.409938),
        ("gemma-7b-it", 6.937294380, 0.786966573, (50, 754, 1), 6.273292),
        ("vicuna-7b-v1.5", 4.797493939, 0.665596068, (35, 767, 3), 4.534161),
    ],
)
def test_win_rates_literally(
    folder: Path, model: str, win_rate, error, counts, discrete
) -> None:
    found = length_control.win_rate(
        [row["preference"] - 1 for row in annotations(folder, model)]
    )
    value, standard_error = found.win_rate[:2]
    assert value is not None and standard_error is not None
    assert 100 * value == pytest.approx(win_rate, abs=1e-6)
    assert 100 * standard_error == pytest.approx(error, abs=1e-6)
    assert (found.wins, found.losses, found.draws) == counts
    assert found.discrete_win_rate.value is not None
    assert 100 * found.discrete_win_rate.value == pytest.approx(discrete, abs=1e-6)


@pytest.mark.data
def test_published_weights_give_the_published_rates(folder, features) -> None:
    board, weights = (table(folder / f"{n}.csv") for n in ("leaderboard", "lc_weights"))
    difficulty = features["instruction_difficulty"]
    near = spreads = given = 0
    for model, row in weights.items():
        if model not in board:
            continue
        _, *values = row.values()
        coefficients = Coefficients(*map(float, values))
        value, spread = length_control.predict(coefficients, difficulty)
        want = board[model]
        near += abs(100 * value - float(want["length_controlled_winrate"])) < 1e-6
        if published := want["lc_standard_error"]:
            given += 1
            spreads += abs(100 * spread - float(published)) < 1e-6
    assert near == 189
    assert (spreads, given) == (36, 37)


@pytest.mark.data
@pytest.mark.parametrize("model", MODELS)
def test_own_fit_at_the_board_s_cost(folder, features, model) -> None:
    want = float(table(folder / "leaderboard.csv")[model]["length_controlled_winrate"])
    rows = annotations(folder, model)
    difficulty = features["instruction_difficulty"]
    lengths = (features[f"len_{name}"] for name in ("baseline", "concise", "verbose"))
    found = length_control.control(
        [row["preference"] - 1 for row in rows],
        terms_of(rows),
        difficulty=difficulty,
        gamed=length_control.gamed(difficulty, *lengths),
        cost=COSTS[model],
        rounds=0,
    )
    assert found.variant == "full"
    assert 100 * found.win_rate.value == pytest.approx(want, abs=0.01)
    weights = list(table(folder / "lc_weights.csv")[model].values())[1:]
    np.testing.assert_allclose(
        found.coefficients, [float(w) for w in weights], atol=1e-3
    )


@pytest.mark.data
@pytest.mark.parametrize("model", MODELS)
def test_cross_validation_finds_the_board_s_cost(folder, features, model) -> None:
    rows = annotations(folder, model)
    difficulty = features["instruction_difficulty"]
    lengths = (features[f"len_{name}"] for name in ("baseline", "concise", "verbose"))
    found = length_control.control(
        [row["preference"] - 1 for row in rows],
        terms_of(rows),
        difficulty=difficulty,
        gamed=length_control.gamed(difficulty, *lengths),
        rounds=0,
    )
    assert found.cost == pytest.approx(COSTS[model])
    want = float(table(folder / "leaderboard.csv")[model]["length_controlled_winrate"])
    assert 100 * found.win_rate.value == pytest.approx(want, abs=0.01)


@pytest.mark.data
@pytest.mark.parametrize("model", MODELS)
def test_difficulties_alone_come_within_a_tenth(folder, features, model) -> None:
    rows = annotations(folder, model)
    difficulty = features["instruction_difficulty"]
    found = length_control.control(
        [row["preference"] - 1 for row in rows],
        terms_of(rows),
        difficulty=difficulty,
        gamed=length_control.likely_gamed(difficulty),
        cost=COSTS[model],
        rounds=0,
    )
    want = float(table(folder / "leaderboard.csv")[model]["length_controlled_winrate"])
    assert 100 * found.win_rate.value == pytest.approx(want, abs=0.1)


@pytest.mark.data
@pytest.mark.parametrize(
    "model, noreg, minimal",
    [
        ("claude-2.1", -0.475, 7.156),
        ("gemma-7b-it", -1.164, 2.577),
        ("vicuna-7b-v1.5", -1.142, 3.611),
    ],
)
def test_how_far_the_other_variants_are(
    folder, features, model, noreg, minimal
) -> None:
    rows = annotations(folder, model)
    w, terms = [row["preference"] - 1 for row in rows], terms_of(rows)
    want = float(table(folder / "leaderboard.csv")[model]["length_controlled_winrate"])
    without = length_control.control(
        w, terms, difficulty=features["instruction_difficulty"], rounds=0
    )
    assert without.variant == "noreg"
    # The table's are liblinear's, at what its cross-validation chose.
    assert 100 * without.win_rate.value - want == pytest.approx(noreg, abs=0.03)
    alone = length_control.control(w, terms, rounds=0)
    assert alone.variant == "minimal" and alone.spread < 1e-12
    assert 100 * alone.win_rate.value - want == pytest.approx(minimal, abs=0.03)
