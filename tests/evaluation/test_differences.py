"""Paired comparisons: numbers worked out by hand, and every pattern counted."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxalign.errors import UserError
from jaxalign.evaluation import differences, statistics


GRADES, BASELINE = "AAABBCAA", "AABBBCAC"


def right(grades: str) -> list[int]:
    return [int(grade == "A") for grade in grades]


def one_hot(grades: str) -> np.ndarray:
    return np.asarray([[grade == name for name in "ABC"] for grade in grades], float)


def scores(sums: np.ndarray) -> np.ndarray:
    a, b, c = sums.T
    return 2 * a / (2 * a + 2 * b + c)


def test_the_worked_example_of_mcnemar() -> None:
    # C(10, 0) + C(10, 1) + C(10, 2) = 56 of 1024, twice; mid-p less 45.
    assert differences.mcnemar(8, 2) == (112 / 1024, 67 / 1024, 2.5)
    assert differences.mcnemar(2, 8) == differences.mcnemar(8, 2)
    assert differences.mcnemar(3, 3) == (1.0, 1.0, 0.0)
    assert differences.mcnemar(0, 0) == (1.0, 1.0, None)
    assert differences.mcnemar(5, 0) == (2 / 32, 1 / 32, 16 / 5)
    with pytest.raises(UserError, match="b=-1"):
        differences.mcnemar(-1, 2)


@settings(max_examples=40)
@given(st.integers(0, 40), st.integers(0, 40))
def test_mcnemar_counts_outcomes(b, c) -> None:
    n = b + c
    chances = [math.comb(n, i) / 2**n for i in range(n + 1)]
    far = [p for i, p in enumerate(chances) if abs(2 * i - n) >= abs(b - c)]
    found = differences.mcnemar(b, c)
    assert found.p_value == pytest.approx(min(1, math.fsum(far)))
    # Half of all outcomes that are exactly as far as what was seen.
    same = [p for i, p in enumerate(chances) if abs(2 * i - n) == abs(b - c)]
    assert found.mid_p == pytest.approx(math.fsum(far) - math.fsum(same) / 2) or b == c


def test_mcnemar_of_thousands_of_rows() -> None:
    # Normal approximation with continuity correction: z = 119 / sqrt(3120).
    want = math.erfc(119 / math.sqrt(3120) / math.sqrt(2))
    assert differences.mcnemar(1620, 1500).p_value == pytest.approx(want, rel=1e-3)


def test_the_worked_example_of_paired_differences() -> None:
    figure = differences.paired(right(GRADES), right(BASELINE))
    assert figure.value == 0.25 and figure.n == 8
    assert figure.standard_error == pytest.approx(0.163663, abs=5e-7)
    errors = [statistics.mean(right(g)).standard_error for g in (GRADES, BASELINE)]
    assert math.hypot(*errors) == pytest.approx(0.258775, abs=5e-7)
    whole = differences.paired(right(GRADES), right(BASELINE), range(8))
    assert whole.standard_error == pytest.approx(0.163663 * math.sqrt(7 / 8), abs=1e-6)
    with pytest.raises(UserError, match="got 8 and 7"):
        differences.paired(right(GRADES), right(BASELINE)[:7])
    with pytest.raises(UserError, match="row 1 has nan and 1"):
        differences.paired([1, math.nan], [1, 1])


@settings(max_examples=40)
@given(st.integers(0, 13), st.integers(0, 13), st.integers(0, 5))
def test_flipped_signs_of_single_answers_are_mcnemar(b, c, same) -> None:
    if b + c > 13:
        return
    apart = [1] * b + [-1] * c + [0] * same
    assert differences.sign_flip(apart) == differences.mcnemar(b, c).p_value


def test_every_sign_is_tried() -> None:
    apart = [0.5, 1.25, -0.25, 2.0, 0.75]
    seen = abs(sum(apart))
    means = [
        abs(sum(sign * d for sign, d in zip(signs, apart, strict=True)))
        for signs in itertools.product((-1, 1), repeat=5)
    ]
    want = sum(m >= seen - 1e-12 for m in means) / 32
    assert differences.sign_flip(apart) == want
    # Rows of a cluster have one sign: two clusters, four patterns, two as far.
    assert differences.sign_flip(apart, clusters="aaabb") == 0.5
    assert differences.sign_flip([0, 0, 0]) == 1.0
    assert differences.sign_flip([]) == 1.0


def test_drawn_signs_are_near_all_signs() -> None:
    generator = np.random.default_rng(0)
    apart = generator.normal(0.35, 1, 13)
    exact = differences.sign_flip(apart)
    drawn = differences.sign_flip(apart, rounds=8000, seed=1)
    # Four standard errors of a share of 8,000.
    assert drawn == pytest.approx(exact, abs=4 * math.sqrt(exact / 8000))
    assert drawn == differences.sign_flip(apart, rounds=8000, seed=1)
    assert drawn != differences.sign_flip(apart, rounds=8000, seed=2)
    # What never happens in the draws has the smallest p-value that they can show.
    assert differences.sign_flip([1.0] * 60, rounds=999) == 1 / 1000


def test_rows_are_exchanged_for_a_ratio() -> None:
    run, baseline = one_hot(GRADES), one_hot(BASELINE)
    # A A A B B C A A: 10/(10 + 4 + 1); A A B B B C A C: 6/(6 + 6 + 2).
    seen = 10 / 15 - 6 / 14
    found = []
    for taken in itertools.product((False, True), repeat=8):
        one = np.where(np.asarray(taken)[:, None], run, baseline).sum(0)
        other = run.sum(0) + baseline.sum(0) - one
        found.append(abs(float(scores(one) - scores(other))))
    want = sum(value >= seen - 1e-12 for value in found) / 256
    assert differences.swap(scores, run, baseline) == want
    figure = differences.paired_of_sums(scores, run, baseline, rounds=100)
    assert figure.value == pytest.approx(seen)
    assert figure.interval is not None
    nothing = np.zeros((8, 3))
    assert math.isnan(differences.swap(scores, run, nothing))


def test_both_runs_are_drawn_by_the_same_rows() -> None:
    # A run that is its baseline differs from it in no round.
    run = one_hot(GRADES)
    figure = differences.paired_of_sums(scores, run, run, rounds=100)
    assert figure == (0.0, 0.0, (0.0, 0.0), 8)


def test_holm() -> None:
    # Sorted .005 .01 .03 .04: x4 .02, x3 .03, x2 .06, x1 .04 after .06.
    assert differences.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx(
        [0.03, 0.06, 0.06, 0.02]
    )
    assert differences.holm([0.9, 0.8]) == [1.0, 1.0]
    assert differences.holm([]) == []
