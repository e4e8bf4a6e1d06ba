"""The exact logistic fit against optimality conditions, scipy and scikit-learn's."""

import numpy as np
import pytest
from scipy.optimize import minimize

from jaxalign.evaluation.boards.logistic_fit import fit, log_loss, sigmoid


def rows(seed: int, n: int = 200, k: int = 3) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, k)), rng.uniform(size=n), rng.uniform(0.1, 2, size=n)


@pytest.mark.parametrize("l2", [0.0, 0.7])
@pytest.mark.parametrize("seed", range(3))
def test_without_l1_it_is_what_a_general_optimiser_finds(seed, l2) -> None:
    x, w, weights = rows(seed)

    def loss(c):
        return (weights * log_loss(x @ c, w)).sum() + l2 / 2 * c @ c

    want = minimize(loss, np.zeros(3), method="BFGS", options={"gtol": 1e-9}).x
    got = fit(x, w, weights=weights, l2=l2)
    assert got.converged
    np.testing.assert_allclose(got.coefficients, want, atol=2e-6)
    slope = x.T @ (weights * (sigmoid(x @ got.coefficients) - w)) + l2 * (
        got.coefficients
    )
    np.testing.assert_allclose(slope, 0, atol=1e-9)


@pytest.mark.parametrize("l1", [0.01, 1.0, 5.0, 15.0])
@pytest.mark.parametrize("seed", range(3))
def test_l1_meets_its_optimality_conditions(seed, l1) -> None:
    x, w, weights = rows(seed)
    c = fit(x, w, weights=weights, l1=l1).coefficients
    slope = x.T @ (weights * (sigmoid(x @ c) - w))
    for value, each in zip(c, slope, strict=True):
        if value:
            assert each == pytest.approx(-l1 * np.sign(value), abs=1e-8)
        else:
            assert abs(each) <= l1 + 1e-8


def test_a_large_penalty_leaves_nothing() -> None:
    x, w, _ = rows(0)
    assert fit(x, w, l1=1e6).coefficients.tolist() == [0, 0, 0]


def test_labels_enter_through_their_moments_alone() -> None:
    x, w, weights = rows(4)
    by_labels = fit(x, w, weights=weights, l1=2.0).coefficients
    moments = x.T @ (weights * w)
    by_moments = fit(x, weights=weights, moments=moments, l1=2.0).coefficients
    np.testing.assert_array_equal(by_labels, by_moments)


def test_separated_classes_have_no_optimum() -> None:
    x = np.array([[1.0], [2.0], [-1.0]])
    assert not fit(x, np.array([1.0, 1.0, 0.0])).converged
    assert fit(x, np.array([1.0, 1.0, 0.0]), l2=1.0).converged


def test_a_column_twice_shares_the_coefficient() -> None:
    x, w, _ = rows(5, k=1)
    once = fit(x, w).coefficients
    twice = fit(np.concatenate([x, x], 1), w)
    assert twice.converged
    assert twice.coefficients.sum() == pytest.approx(once[0], abs=1e-6)
