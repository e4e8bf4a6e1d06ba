"""Figures against numbers worked out by hand and against slow float64 formulas."""

import itertools
import math
import statistics as plain
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxalign.errors import UserError
from jaxalign.evaluation import statistics
from jaxalign.evaluation.statistics import Figure


NOTHING = Figure(None, None, None, 0)


def scores(sums: np.ndarray) -> np.ndarray:
    """F of counts (A, B, C)."""
    a, b, c = sums.T
    return 2 * a / (2 * a + 2 * b + c)


def one_hot(labels: str) -> np.ndarray:
    return np.asarray([[label == name for name in "ABC"] for label in labels], float)


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        # Newcombe 1998, table I, method 3.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_intervals_are_the_published_ones(successes, n, low, high) -> None:
    figure = statistics.share(successes, n)
    assert figure.interval == pytest.approx((low, high), abs=6e-5)
    p = successes / n
    assert figure.standard_error == pytest.approx(math.sqrt(p * (1 - p) / n))
    assert figure.n == n


@settings(max_examples=40)
@given(st.integers(1, 2000), st.floats(0, 1))
def test_wilson_ends_solve_the_score_equation(n, part) -> None:
    successes = round(part * n)
    p, interval = successes / n, statistics.share(successes, n).interval
    assert interval is not None
    for end in interval:
        # |p - end| = z sqrt(end (1 - end) / n), which defines both ends.
        want = statistics.Z * math.sqrt(end * (1 - end) / n)
        assert abs(p - end) == pytest.approx(want, abs=1e-9)
    assert 0 <= interval[0] <= p <= interval[1] <= 1


def test_shares_of_nothing_and_of_too_many() -> None:
    assert statistics.share(0, 0) == NOTHING
    # A fraction, where a majority's tie was split.
    assert statistics.share(1.5, 3).value == 0.5
    with pytest.raises(UserError, match="got 3 of 2"):
        statistics.share(3, 2)


def test_means() -> None:
    values = [0.3, 1.7, -2.0, 4.25, 0.3]
    figure = statistics.mean(values)
    error = plain.stdev(values) / math.sqrt(5)
    assert figure.value == pytest.approx(plain.fmean(values), abs=1e-15)
    assert figure.standard_error == pytest.approx(error, abs=1e-15)
    assert figure.interval == pytest.approx(
        (0.91 - 1.959964 * error, 0.91 + 1.959964 * error)
    )
    assert statistics.mean([]) == NOTHING
    assert statistics.mean([2]) == Figure(2.0, None, None, 1)
    with pytest.raises(UserError, match="value 1 is nan"):
        statistics.mean([1.0, math.nan])


def test_three_tools_three_clustered_standard_errors() -> None:
    values, clusters = [1, 1, 0, 0, 1, 0], "aabbcc"
    # d = .5 .5 | -.5 -.5 | .5 -.5; sums 1, -1, 0: sqrt(2)/6.
    miller = statistics.clustered(values, clusters)
    assert miller.standard_error == pytest.approx(0.235702, abs=5e-7)
    assert miller.interval == pytest.approx((0.5 - 0.461968, 0.5 + 0.461968), abs=1e-6)
    assert miller.n == 6
    inspect = statistics.clustered(values, clusters, "inspect")
    assert inspect.standard_error == pytest.approx(0.288675, abs=5e-7)
    harness = statistics.clustered(values, clusters, "lmms_eval")
    assert harness.standard_error == pytest.approx(0.252763, abs=5e-7)
    assert statistics.mean(values).standard_error == pytest.approx(0.223607, abs=5e-7)


def test_clusters_of_one_are_no_clusters() -> None:
    values = [0.2, 1.0, 0.4, 0.9, 0.1]
    plain_error = statistics.mean(values).standard_error
    for formula in ("inspect", "lmms_eval"):
        figure = statistics.clustered(values, range(5), formula)
        assert figure.standard_error == pytest.approx(plain_error)
    # Without a correction it is the plug-in one: n for n - 1.
    figure = statistics.clustered(values, range(5))
    assert figure.standard_error == pytest.approx(plain_error * math.sqrt(4 / 5))
    assert statistics.clustered(values, "aaaaa") == (pytest.approx(0.52), None, None, 5)
    assert statistics.clustered([], []) == NOTHING
    with pytest.raises(UserError, match="got 5 rows and 3 clusters"):
        statistics.clustered(values, "abc")


@pytest.mark.parametrize(
    ("labels", "want"),
    [("AAABBC", 6 / 11), ("AAAABCCC", 8 / 13), ("AAB", 2 / 3), ("BBBC", 0.0)],
)
def test_a_ratio_of_counts(labels, want) -> None:
    figure = statistics.bootstrap_of_sums(scores, one_hot(labels), rounds=50)
    assert figure.value == pytest.approx(want, abs=1e-15)
    assert figure.n == len(labels)


@pytest.mark.parametrize("clusters", [None, "aabbcdd"])
def test_both_bootstraps_draw_the_same(clusters) -> None:
    labels = "AABBCAC"
    fast = statistics.bootstrap_of_sums(
        scores, one_hot(labels), rounds=300, seed=5, clusters=clusters
    )
    of_array = statistics.bootstrap(
        lambda rows: scores(rows.sum(0)),
        one_hot(labels),
        rounds=300,
        seed=5,
        clusters=clusters,
    )
    of_list = statistics.bootstrap(
        lambda drawn: scores(one_hot("".join(drawn)).sum(0)),
        list(labels),
        rounds=300,
        seed=5,
        clusters=clusters,
    )
    assert fast == of_array == of_list
    assert fast != statistics.bootstrap_of_sums(scores, one_hot(labels), rounds=300)


def test_a_bootstrap_has_the_percentiles_of_its_own_draws() -> None:
    values = np.asarray([0.1, 0.5, 0.7, 2.0, 3.5, 0.0])
    draws = np.random.default_rng(11).integers(0, 6, (400, 6))
    means = sorted(math.fsum(values[row]) / 6 for row in draws)
    figure = statistics.bootstrap(np.mean, values, rounds=400, seed=11)
    # Linear interpolation between order statistics: 0.025 * 399 = 9.975.
    low = means[9] + 0.975 * (means[10] - means[9])
    high = means[389] + 0.025 * (means[390] - means[389])
    assert figure.interval == pytest.approx((low, high), abs=1e-12)
    assert figure.standard_error == pytest.approx(plain.stdev(means), abs=1e-12)


def test_a_bootstrap_of_a_mean_is_near_the_exact_distribution() -> None:
    # All 5^5 resamples of five values, each as probable.
    values = [0.0, 1.0, 3.0, 4.0, 9.0]
    every = [math.fsum(drawn) / 5 for drawn in itertools.product(values, repeat=5)]
    figure = statistics.bootstrap(np.mean, np.asarray(values), rounds=20_000, seed=2)
    assert figure.standard_error == pytest.approx(plain.pstdev(every), rel=0.02)
    assert figure.interval == pytest.approx(np.quantile(every, (0.025, 0.975)), abs=0.2)


def test_clusters_are_drawn_whole() -> None:
    # Two clusters of three equal rows: a mean of 0, 1/2 or 1, never a third.
    rows, clusters = [1, 1, 1, 0, 0, 0], "aaabbb"
    seen = set()

    def record(drawn):
        seen.add(sum(drawn) / len(drawn))
        return 0.0

    statistics.bootstrap(record, rows, rounds=60, clusters=clusters)
    assert seen == {0.0, 0.5, 1.0}


def test_where_a_bootstrap_has_nothing_to_say() -> None:
    assert statistics.bootstrap(np.mean, []) == NOTHING
    assert statistics.bootstrap_of_sums(scores, np.zeros((0, 3))) == NOTHING
    # One unit can be drawn in one way only, which is no certainty.
    assert statistics.bootstrap(np.mean, [3.0]) == Figure(3.0, None, None, 1)
    alone = statistics.bootstrap_of_sums(scores, one_hot("AB"), clusters="xx")
    assert alone == Figure(0.5, None, None, 2)

    def of_attempted(sums):  # A / (A + B)
        return sums[:, 0] / (sums[:, 0] + sums[:, 1])

    assert statistics.bootstrap_of_sums(of_attempted, one_hot("CC")).value is None
    # One attempt in four rows is not drawn in (3/4)^4 = 32 % of the rounds.
    rare = statistics.bootstrap_of_sums(of_attempted, one_hot("ACCC"))
    assert rare == Figure(1.0, None, None, 4)
    # Three of six are missing in 1/64 of the rounds, which are left out.
    most = statistics.bootstrap_of_sums(of_attempted, one_hot("AAACCC"))
    assert most.interval == (1.0, 1.0)
    assert statistics.bootstrap(lambda drawn: None, [1, 2]) == (None, None, None, 2)


def test_eleven_hundred_rows_take_less_than_a_second() -> None:
    labels = "".join(np.random.default_rng(0).choice(list("ABC"), 1100))
    started = time.perf_counter()
    statistics.bootstrap_of_sums(scores, one_hot(labels))
    assert time.perf_counter() - started < 1


def test_bounds() -> None:
    # SIUO: safe 2 of 2 decided, one undecided; both 1 of 2 decided, one undecided.
    assert statistics.bounds(2, 2, 1) == (2 / 3, 1.0)
    assert statistics.bounds(1, 2, 1) == (1 / 3, 2 / 3)
    assert statistics.bounds(3, 4, 0) == (0.75, 0.75)
    assert statistics.bounds(0, 0, 0) is None


def test_several_answers() -> None:
    assert [statistics.pass_at_k(5, 2, k) for k in (1, 2, 3)] == pytest.approx(
        [0.4, 0.7, 0.9], abs=1e-15
    )
    assert statistics.pass_all_k(5, 2, 2) == pytest.approx(0.1, abs=1e-15)
    assert math.isnan(statistics.pass_at_k(2, 2, 3))
    assert math.isnan(statistics.pass_all_k(2, 2, 3))
    with pytest.raises(UserError, match="n=2, c=3, k=1"):
        statistics.pass_at_k(2, 3, 1)


@settings(max_examples=40)
@given(st.integers(1, 7), st.data())
def test_pass_at_k_counts_subsets(n, data) -> None:
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
    some = sum(map(any, subsets)) / len(subsets)
    whole = sum(map(all, subsets)) / len(subsets)
    assert statistics.pass_at_k(n, c, k) == pytest.approx(some, abs=1e-15)
    assert statistics.pass_all_k(n, c, k) == pytest.approx(whole, abs=1e-15)


def test_majority_splits_ties() -> None:
    assert statistics.majority(["巴黎", "里昂", "巴黎"]) == {"巴黎": 1.0}
    assert statistics.majority([1, 0, 1, 0, 2]) == {1: 0.5, 0: 0.5}
    assert statistics.majority([]) == {}
