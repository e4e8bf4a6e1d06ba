"""Stated confidence: numbers worked out by hand, and slow formulas beside them."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxalign.errors import UserError
from jaxalign.evaluation import calibration
from jaxalign.evaluation.calibration import Bin


STATED, RIGHT = [0.9, 0.9, 0.6, 0.55, 0.1], [1, 0, 1, 1, 0]

TENTHS = st.lists(
    st.tuples(st.integers(0, 10), st.booleans()), min_size=1, max_size=7
).map(lambda rows: ([n / 10 for n, _ in rows], [int(right) for _, right in rows]))


def test_the_worked_example() -> None:
    found = calibration.bins(STATED, RIGHT)
    assert len(found) == 10
    # |.5 - .9| 2/5 + |1 - .6|/5 + |1 - .55|/5 + |0 - .1|/5 = .16 + .08 + .09 + .02
    assert calibration.expected_calibration_error(found) == pytest.approx(0.35)
    assert [b.n for b in found] == [0, 1, 0, 0, 0, 1, 1, 0, 0, 2]
    assert found[0] == Bin(0.0, 0.1, 0, None, None)
    assert found[9] == Bin(0.9, 1.0, 2, pytest.approx(0.9), 0.5)
    assert calibration.brier(STATED, RIGHT).value == pytest.approx(0.2385)
    curve = dict(calibration.risk_coverage(STATED, RIGHT))
    assert [curve[c] for c in (0.2, 0.4, 0.6, 0.8, 1.0)] == pytest.approx(
        [1 / 2, 1 / 2, 1 / 3, 1 / 4, 2 / 5]
    )
    area = (1 / 2 + 1 / 2 + 1 / 3 + 1 / 4 + 2 / 5) / 5
    assert calibration.aurc(STATED, RIGHT) == pytest.approx(area)


def test_a_bin_begins_where_it_says() -> None:
    # 0.3 and 0.7 are just above and below their decimals in binary.
    stated = [k / 10 for k in range(11)]
    found = calibration.bins(stated, [1] * 11)
    assert [b.n for b in found] == [1] * 9 + [2]
    for k, b in enumerate(found):
        assert b.low == k / 10


def test_bins_of_equal_mass() -> None:
    # Middles of ranks .5 1.5 2.5 and, of three alike, 4.5: halves end at 3.
    stated, right = [0.1, 0.2, 0.3, 0.8, 0.8, 0.8], [0, 0, 1, 1, 1, 0]
    assert calibration.bins(stated, right, 2, "mass") == [
        Bin(0.1, 0.3, 3, pytest.approx(0.2), pytest.approx(1 / 3)),
        Bin(0.8, 0.8, 3, pytest.approx(0.8), pytest.approx(2 / 3)),
    ]
    # All alike are one bin, whatever the count.
    (one,) = calibration.bins([0.5] * 4, [1, 0, 1, 1], 10, "mass")
    assert one == Bin(0.5, 0.5, 4, 0.5, 0.75)
    # Without ties the masses are equal.
    spread = calibration.bins(np.linspace(0, 1, 40), [1] * 40, 8, "mass")
    assert [b.n for b in spread] == [5] * 8


@settings(max_examples=40)
@given(TENTHS, st.randoms(use_true_random=False))
def test_the_order_of_rows_changes_nothing(rows, random) -> None:
    stated, right = rows
    order = list(range(len(stated)))
    random.shuffle(order)
    others = [stated[i] for i in order], [right[i] for i in order]
    for kind in ("width", "mass"):
        mine, theirs = (
            [[math.inf if x is None else x for x in b] for b in found]
            for found in (
                calibration.bins(stated, right, 10, kind),
                calibration.bins(*others, 10, kind),
            )
        )
        assert np.asarray(mine) == pytest.approx(np.asarray(theirs))
        assert sum(row[2] for row in mine) == len(stated)
    assert calibration.aurc(*others) == pytest.approx(calibration.aurc(stated, right))


@settings(max_examples=40)
@given(TENTHS)
def test_risk_is_the_mean_over_the_orders_of_ties(rows) -> None:
    stated, right = rows
    n = len(stated)
    if n > 6:
        return
    orders = [
        order
        for order in itertools.permutations(range(n))
        if all(stated[a] >= stated[b] for a, b in itertools.pairwise(order))
    ]
    for k, (coverage, risk) in enumerate(calibration.risk_coverage(stated, right), 1):
        wrong = [sum(1 - right[i] for i in order[:k]) / k for order in orders]
        assert coverage == k / n
        assert risk == pytest.approx(math.fsum(wrong) / len(wrong))


def test_figures() -> None:
    generator = np.random.default_rng(3)
    stated = generator.integers(0, 21, 250) / 20
    right = (generator.random(250) < stated**2).astype(float)
    found = calibration.figures(stated, right, rounds=200, seed=4)
    assert found["n"] == 250
    assert found["accuracy"].value == right.mean()
    assert found["brier"].value == pytest.approx(np.mean((stated - right) ** 2))
    for name, kind in (("equal_width", "width"), ("equal_mass", "mass")):
        figure = found[f"ece_{name}"]
        slow = sum(
            b["n"] / 250 * abs(b["accuracy"] - b["confidence"])
            for b in found["bins"][name]
            if b["n"]
        )
        assert figure.value == pytest.approx(slow)
        assert figure.interval is not None and figure.n == 250
        kept = calibration.bins(stated, right, 10, kind)
        assert found["bins"][name] == [b._asdict() for b in kept]
    # A hundred of 250 points, the last with all rows.
    curve = found["risk_coverage"]
    assert len(curve) == 100
    assert curve[-1] == {"coverage": 1.0, "risk": pytest.approx(1 - right.mean())}
    every = dict(calibration.risk_coverage(stated, right))
    assert all(every[point["coverage"]] == point["risk"] for point in curve)
    assert found["aurc"].value == pytest.approx(math.fsum(every.values()) / 250)


def test_figures_of_nothing_and_of_one() -> None:
    found = calibration.figures([], [])
    assert found["n"] == 0 and found["risk_coverage"] == []
    assert found["ece_equal_width"].value is None and found["aurc"].value is None
    assert found["bins"]["equal_mass"] == []
    one = calibration.figures([0.25], [1.0])
    assert one["ece_equal_width"] == (0.75, None, None, 1)


@pytest.mark.parametrize(
    ("stated", "right", "message"),
    [
        ([0.5, 90], [1, 0], "row 1 has 90. Divide"),
        ([math.nan], [1], "row 0 has nan"),
        ([0.5], [2], "correct must be within 0 and 1"),
        ([0.5, 0.5], [1], "got 2 confidences and 1 answers"),
    ],
)
def test_what_is_no_confidence(stated, right, message) -> None:
    with pytest.raises(UserError, match=message):
        calibration.brier(stated, right)
