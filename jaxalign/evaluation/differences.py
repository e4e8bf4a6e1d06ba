"""Whether two runs differ on the rows that both have: paired differences and tests.

Differences are a run's minus its baseline's. Rows that either lacks are left out, and
counted, by who calls.
"""

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from jaxalign.errors import UserError
from jaxalign.evaluation.statistics import (
    Figure,
    bootstrap_of_sums,
    clustered,
    mean,
)


__all__ = [
    "McNemar",
    "holm",
    "mcnemar",
    "paired",
    "paired_of_sums",
    "sign_flip",
    "swap",
]

Numbers = Sequence[float | int] | np.ndarray

_CELLS = 1 << 21
"""Signs that are held at once: 16 MB."""


class McNemar(NamedTuple):
    """The exact test of :func:`mcnemar`, and what other tools print.

    >>> mcnemar(8, 2).p_value
    0.109375
    """

    p_value: float
    """Exact, two-sided."""
    mid_p: float
    """Half of what was seen counted: less conservative (Fagerland et al. 2013)."""
    chi_square: float | None
    """With continuity correction, ``(|b - c| - 1)² / (b + c)``; None of no row."""


def mcnemar(b: int, c: int) -> McNemar:
    """Return whether as many rows got right as got wrong.

    Of ``n = b + c`` rows that changed each is equally likely to be of either kind if
    the runs are alike: ``p = min(1, 2 sum_{i <= min(b, c)} C(n, i) / 2^n)`` (McNemar
    1947, exact).

    Args:
      b: rows that the run has right and its baseline wrong.
      c: the reverse.
    Raises:
      UserError: one is negative.
    Example:
      >>> found = mcnemar(8, 2)
      >>> found.p_value == 112 / 1024, found.mid_p == 67 / 1024, found.chi_square
      (True, True, 2.5)
    """
    if b < 0 or c < 0:
        raise UserError(f"counts of rows are not negative: got b={b}, c={c}")
    n = b + c
    if n == 0:
        return McNemar(1.0, 1.0, None)
    term = tail = 1
    for i in range(min(b, c)):
        term = term * (n - i) // (i + 1)
        tail += term
    exact, middle = min(1.0, 2 * tail / 2**n), (2 * tail - term) / 2**n
    return McNemar(exact, middle, max(0, abs(b - c) - 1) ** 2 / n)


def paired(
    values: Numbers, baseline: Numbers, clusters: Sequence[Hashable] | None = None
) -> Figure:
    """Return the mean of ``values - baseline`` with its paired standard error.

    That is ``sd(differences) / sqrt(n)``, ddof 1, or the clustered one ("miller" of
    :func:`.statistics.clustered`); two runs' rows are hard and easy together, so it is
    mostly smaller than that of two independent means.

    Args:
      values: of a run's rows.
      baseline: of the same rows.
      clusters: of the rows.
    Raises:
      UserError: lengths differ, or a value is not finite.
    Example:
      >>> run, baseline = [1, 1, 1, 0, 0, 0, 1, 1], [1, 1, 0, 0, 0, 0, 1, 0]
      >>> paired(run, baseline)[:2]
      (0.25, 0.16366341767699427)
    """
    apart = _differences(values, baseline)
    return mean(apart) if clusters is None else clustered(apart, clusters)


def paired_of_sums(
    statistic: Callable[[np.ndarray], np.ndarray],
    columns: np.ndarray,
    baseline: np.ndarray,
    *,
    rounds: int = 2000,
    seed: int = 0,
    clusters: Sequence[Hashable] | None = None,
) -> Figure:
    """Return the difference of a statistic of sums, drawing rows of both together.

    Args:
      statistic: as of :func:`.statistics.bootstrap_of_sums`.
      columns: ``[row, column]`` of a run.
      baseline: the same of the same rows.
      rounds: of the bootstrap.
      seed: of the bootstrap.
      clusters: of the rows.
    Example:
      >>> ratio = lambda sums: sums[:, 0] / sums[:, 1]
      >>> run, baseline = np.asarray([[1, 2], [2, 2]]), np.asarray([[1, 2], [1, 2]])
      >>> paired_of_sums(ratio, run, baseline).value
      0.25
    """
    width = np.shape(columns)[1]

    def difference(sums: np.ndarray) -> np.ndarray:
        return statistic(sums[:, :width]) - statistic(sums[:, width:])

    both = np.concatenate([columns, baseline], axis=1)
    return bootstrap_of_sums(
        difference, both, rounds=rounds, seed=seed, clusters=clusters
    )


def sign_flip(
    differences: Numbers,
    *,
    rounds: int = 10_000,
    seed: int = 0,
    clusters: Sequence[Hashable] | None = None,
) -> float:
    """Return the two-sided p-value of a mean difference by flipping signs.

    If the runs are alike each row's difference is as likely to have the other sign. All
    sign patterns are tried where there are no more than ``rounds``, else that many are
    drawn and ``p = (1 + extreme) / (1 + rounds)``, which is never 0.

    Args:
      differences: of the rows; of 1 and -1 the exact test is that of :func:`mcnemar`.
      rounds: see above.
      seed: of the draws.
      clusters: of the rows, which are flipped together.
    Raises:
      UserError: a difference is not finite.
    Example:
      >>> sign_flip([1] * 8 + [-1] * 2)
      0.109375
    """
    numbers = _differences(differences, np.zeros(len(differences)))
    return swap(
        lambda sums: sums[:, 0],
        numbers[:, None],
        np.zeros((len(numbers), 1)),
        rounds=rounds,
        seed=seed,
        clusters=clusters,
    )


def swap(
    statistic: Callable[[np.ndarray], np.ndarray],
    columns: np.ndarray,
    baseline: np.ndarray,
    *,
    rounds: int = 10_000,
    seed: int = 0,
    clusters: Sequence[Hashable] | None = None,
) -> float:
    """Return the two-sided p-value of a difference by exchanging the runs' rows.

    If the runs are alike each row could as well be the other's. For ratios such as F,
    of which a row has none; patterns as of :func:`sign_flip`.

    Args:
      statistic: as of :func:`.statistics.bootstrap_of_sums`.
      columns: ``[row, column]`` of a run.
      baseline: the same of the same rows.
      rounds: patterns.
      seed: of the draws.
      clusters: of the rows, which are exchanged together.
    Returns:
      NaN where the statistic of either run is undefined; patterns where it is are
      counted as extreme.
    Example:
      >>> ratio = lambda sums: sums[:, 0] / sums[:, 1]
      >>> swap(ratio, np.asarray([[2, 2], [2, 2]]), np.asarray([[1, 2], [1, 2]]))
      0.5
    """
    one, other = (np.asarray(x, np.float64) for x in (columns, baseline))
    apart = one - other
    if clusters is not None:
        numbers: dict[Hashable, int] = {}
        members = [numbers.setdefault(c, len(numbers)) for c in clusters]
        merged = np.zeros((len(numbers), apart.shape[1]))
        np.add.at(merged, members, apart)
        apart = merged
    apart = apart[(apart != 0).any(axis=1)]
    total = one.sum(0) + other.sum(0)

    def difference(runs: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.abs(statistic(runs) - statistic(total - runs))

    seen = float(difference(one.sum(0, keepdims=True))[0])
    if math.isnan(seen):
        return math.nan
    # What is equal but for rounding is as extreme.
    least = seen - 1e-9 * max(1e-3, seen)
    extreme = tried = 0
    for kept in _patterns(len(apart), rounds, seed):
        found = difference(other.sum(0) + kept @ apart)
        extreme += int((~(found < least)).sum())
        tried += len(kept)
    if 2 ** len(apart) <= rounds:
        return extreme / tried
    return (1 + extreme) / (1 + tried)


def holm(p_values: Sequence[float | int]) -> list[float]:
    """Return p-values adjusted for that several are looked at, in their order.

    The i-th smallest of m (from 0) becomes the largest so far of ``(m - i) p``, at most
    1 (Holm 1979): the chance of any false finding is kept, whatever their dependence.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    adjusted, largest = [0.0] * len(p_values), 0.0
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def _differences(values: Numbers, baseline: Numbers) -> np.ndarray:
    one, other = (np.asarray(x, np.float64) for x in (values, baseline))
    if one.shape != other.shape:
        raise UserError(
            f"a paired difference needs the same rows: got {len(one)} and {len(other)}"
        )
    apart = one - other
    if not np.isfinite(apart).all():
        row = int(np.flatnonzero(~np.isfinite(apart))[0])
        raise UserError(
            f"a difference needs finite numbers: row {row} has {one[row]} and "
            f"{other[row]}. Leave out, and count, what has no value"
        )
    return apart


def _patterns(n: int, rounds: int, seed: int) -> Iterator[np.ndarray]:
    """Yield 0 and 1, ``[pattern, n]``: all that there are, or as many as drawn."""
    block = max(1, _CELLS // max(1, n))
    if 2**n <= rounds:
        for start in range(0, 2**n, block):
            numbers = np.arange(start, min(2**n, start + block))
            yield ((numbers[:, None] >> np.arange(n)) & 1).astype(np.float64)
        return
    generator = np.random.default_rng(seed)
    for start in range(0, rounds, block):
        size = min(block, rounds - start), n
        yield generator.integers(0, 2, size, dtype=np.int8).astype(np.float64)
