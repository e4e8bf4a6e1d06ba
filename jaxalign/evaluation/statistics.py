"""How sure a number is: intervals, standard errors, several answers. Pure, in float64.

What compares two runs is in :mod:`.differences`, what asks whether stated confidence is
right in :mod:`.calibration`. A figure of nothing has no value; none is made up.
"""

import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, Literal, TypeVar

import numpy as np

from jaxalign.errors import UserError
from jaxalign.judging.figures import Figure, Z, finite, mean, normal


__all__ = [
    "Z",
    "Clustering",
    "Figure",
    "bootstrap",
    "bootstrap_of_sums",
    "bounds",
    "clustered",
    "majority",
    "mean",
    "pass_all_k",
    "pass_at_k",
    "share",
]

Clustering = Literal["miller", "inspect", "lmms_eval"]
_Label = TypeVar("_Label", bound=Hashable)

_UNDEFINED = 0.05
"""Share of the rounds up to which an interval may leave out undefined ones."""
_DRAWN = 1 << 22
"""Indices that are held at once: 32 MB."""


def share(successes: float | int, n: int) -> Figure:
    """Return a proportion with its Wilson score interval.

    With ``p = successes / n`` the interval is ``(p + z²/2n ± z sqrt(p(1 - p)/n +
    z²/4n²)) / (1 + z²/n)`` (Wilson 1927), which stays inside 0 to 1 and has a width
    where p is 0 or 1 too; the standard error is ``sqrt(p(1 - p)/n)``, which is 0 there.

    Args:
      successes: may be a fraction, where ties were split.
      n: of how many independent ones.
    Raises:
      UserError: successes are not within 0 and n.
    Example:
      >>> figure = share(8, 10)
      >>> figure.value, [round(end, 4) for end in figure.interval]
      (0.8, [0.4902, 0.9433])
      >>> share(0, 0).value is None
      True
    """
    if not 0 <= successes <= n:
        raise UserError(
            f"a share needs 0 <= successes <= n: got {successes} of {n}. Count what is "
            "in the numerator among what is in the denominator"
        )
    if n == 0:
        return Figure(None, None, None, 0)
    p = successes / n
    middle, spread = p + Z * Z / (2 * n), p * (1 - p) / n
    half = Z * math.sqrt(spread + Z * Z / (4 * n * n))
    low, high = ((middle + sign * half) / (1 + Z * Z / n) for sign in (-1, 1))
    # At the ends the formula is exact, the arithmetic is not.
    interval = (0.0 if p == 0 else low, 1.0 if p == 1 else high)
    return Figure(p, math.sqrt(spread), interval, n)


def clustered(
    values: Sequence[float | int] | np.ndarray,
    clusters: Sequence[Hashable],
    formula: Clustering = "miller",
) -> Figure:
    """Return a mean whose values depend on each other within clusters.

    With ``d = value - mean`` and ``S_c`` the sum of d over cluster c of C the standard
    error is (Miller 2024, "Adding error bars to evals", arXiv:2411.00640, eq. 4):

    - ``miller``: ``sqrt(sum_c S_c²) / n``
    - ``inspect``: inspect-ai's, that times ``sqrt(C / (C - 1))``
    - ``lmms_eval``: lmms-eval's, ``sqrt(var(d, ddof 1)/n + sum_c (S_c² - sum d²)/n²)``

    The three differ where clusters are few; say which one a figure has. Of 1 1 0 0 1 0
    in clusters a a b b c c they are 0.235702, 0.288675 and 0.252763.

    Args:
      values: one each row.
      clusters: the rows' clusters: a picture, an item with several answers.
      formula: see above.
    Returns:
      A figure whose n counts rows, not clusters; one cluster gives no standard error.
    Raises:
      UserError: a value is not finite, or the lengths differ.
    Example:
      >>> round(clustered([1, 1, 0, 0, 1, 0], "aabbcc").standard_error, 6)
      0.235702
    """
    numbers = finite(values)
    n = len(numbers)
    members = _numbered(clusters, n)
    if n == 0:
        return Figure(None, None, None, 0)
    value = float(numbers.mean())
    apart = numbers - value
    squares = np.bincount(members, weights=apart) ** 2
    if len(squares) == 1:
        return Figure(value, None, None, n)
    variance = float(squares.sum()) / n**2
    if formula == "inspect":
        variance *= len(squares) / (len(squares) - 1)
    elif formula == "lmms_eval":
        own = float((apart**2).sum())
        variance += own / (n * (n - 1)) - own / n**2
    return normal(value, math.sqrt(max(variance, 0.0)), n)


def bootstrap(
    statistic: Callable[[Any], float | None],
    items: Sequence[Any] | np.ndarray,
    *,
    rounds: int = 2000,
    seed: int = 0,
    clusters: Sequence[Hashable] | None = None,
) -> Figure:
    """Return any statistic of items with its percentile bootstrap interval.

    Items are drawn with replacement, ``rounds`` times (Efron 1979): the interval is the
    2.5 and the 97.5 percentile of what the statistic then is, the standard error its
    standard deviation (ddof 1). The generator is local: the seed decides all.

    Args:
      statistic: of a list of items, or of an array's rows where ``items`` is one; None
        or NaN where it is not defined.
      items: a list, or an array whose first axis they are (faster).
      rounds: how often.
      seed: of the generator.
      clusters: of the items; whole clusters are drawn then, as many as there are.
    Returns:
      A figure without interval where the statistic is undefined in more than one round
      in twenty (fewer are left out), or where all that could be drawn is one unit.
    Example:
      >>> figure = bootstrap(lambda drawn: sum(drawn) / len(drawn), [0, 1, 1, 1])
      >>> figure.value, figure.interval, figure.n
      (0.75, (0.25, 1.0), 4)
    """
    if not len(items):
        return Figure(None, None, None, 0)
    if _alone(len(items), clusters):
        rounds = 0
    found = [
        _number(statistic(_at(items, rows)))
        for rows in _rows_drawn(len(items), rounds, seed, clusters)
    ]
    return _percentile(_number(statistic(items)), np.asarray(found), len(items))


def bootstrap_of_sums(
    statistic: Callable[[np.ndarray], np.ndarray],
    columns: np.ndarray | Sequence[Sequence[float | int]],
    *,
    rounds: int = 2000,
    seed: int = 0,
    clusters: Sequence[Hashable] | None = None,
) -> Figure:
    """Return what :func:`bootstrap` does, for a statistic of the columns' sums, faster.

    Ratios of counts are such statistics. All rounds are one matrix product, and the
    draws those of :func:`bootstrap` with the same seed.

    Args:
      statistic: of sums ``[round, column]`` to values ``[round]``; NaN where undefined.
      columns: ``[row, column]`` of numbers.
      rounds: how often.
      seed: of the generator.
      clusters: of the rows.
    Example:
      >>> def f_score(sums):  # 2A / (2A + 2B + C)
      ...     a, b, c = sums.T
      ...     return 2 * a / (2 * a + 2 * b + c)
      >>> rows = [[1, 0, 0]] * 3 + [[0, 1, 0]] * 2 + [[0, 0, 1]]
      >>> round(bootstrap_of_sums(f_score, rows).value, 6)
      0.545455
    """
    table = np.asarray(columns, np.float64)
    n = len(table)
    if n == 0:
        return Figure(None, None, None, 0)
    if _alone(n, clusters):
        rounds = 0
    units = table
    if clusters is not None:
        members = _numbered(clusters, n)
        units = np.zeros((members.max() + 1, table.shape[1]))
        np.add.at(units, members, table)
    sums = [table.sum(0, keepdims=True)]
    for block in _drawn(len(units), rounds, seed):
        sums.append(_counts(block, len(units)) @ units)
    with np.errstate(divide="ignore", invalid="ignore"):
        found = np.asarray(statistic(np.concatenate(sums)), np.float64)
    return _percentile(float(found[0]), found[1:], n)


def bounds(
    successes: float | int, decided: int, undecided: int
) -> tuple[float, float] | None:
    """Return the share if all that is undecided fell one way, and the other.

    >>> bounds(2, 2, 1)
    (0.6666666666666666, 1.0)
    """
    every = decided + undecided
    if every == 0:
        return None
    return successes / every, (successes + undecided) / every


def pass_at_k(n: int, c: int, k: int) -> float:
    """Return the chance that one of k answers is correct, if c of n drawn ones were.

    ``1 - C(n - c, k) / C(n, k)``, unbiased (Chen et al. 2021, arXiv:2107.03374, eq. 1).

    Args:
      n: answers drawn.
      c: correct ones of them.
      k: at least 1; NaN where n is smaller, never 1.
    Raises:
      UserError: c is not within 0 and n, or k is no positive number.
    Example:
      >>> pass_at_k(5, 2, 1), pass_at_k(5, 2, 2), pass_at_k(2, 1, 3)
      (0.4, 0.7, nan)
    """
    return math.nan if _few(n, c, k) else 1 - math.comb(n - c, k) / math.comb(n, k)


def pass_all_k(n: int, c: int, k: int) -> float:
    """Return the chance that all of k answers are correct (pass^k).

    ``C(c, k) / C(n, k)``, unbiased; see :func:`pass_at_k`.

    >>> pass_all_k(5, 2, 2)
    0.1
    """
    return math.nan if _few(n, c, k) else math.comb(c, k) / math.comb(n, k)


def majority(labels: Sequence[_Label]) -> dict[_Label, float]:
    """Return the most frequent label, with weight 1; ties split it evenly.

    The weights make an expected value: an answer tied between right and wrong counts
    half. Where a tie is to be undecided instead, look whether there are several.

    >>> majority(["a", "b", "a"]), majority(["a", "b"]), majority([])
    ({'a': 1.0}, {'a': 0.5, 'b': 0.5}, {})
    """
    counts = Counter(labels)
    top = max(counts.values(), default=0)
    first = [label for label, count in counts.items() if count == top]
    return {label: 1 / len(first) for label in first}


def _alone(n: int, clusters: Sequence[Hashable] | None) -> bool:
    """Tell whether a draw can have one outcome only, which is no certainty."""
    return len(range(n) if clusters is None else set(clusters)) == 1


def _few(n: int, c: int, k: int) -> bool:
    if not 0 <= c <= n or k < 1:
        raise UserError(
            f"pass@k needs 0 <= c <= n and k >= 1: got n={n}, c={c}, k={k} (answers, "
            "correct ones, answers that one is wanted of)"
        )
    return n < k


def _numbered(clusters: Sequence[Hashable], n: int) -> np.ndarray:
    """Return the number of each row's cluster, by first occurrence."""
    if len(clusters) != n:
        raise UserError(
            f"every row needs its cluster: got {n} rows and {len(clusters)} clusters"
        )
    numbers: dict[Hashable, int] = {}
    return np.asarray([numbers.setdefault(c, len(numbers)) for c in clusters], int)


def _drawn(n: int, rounds: int, seed: int) -> Iterator[np.ndarray]:
    """Yield indices ``[round, n]``, some rounds at a time."""
    generator = np.random.default_rng(seed)
    block = max(1, _DRAWN // n)
    for start in range(0, rounds, block):
        yield generator.integers(0, n, (min(block, rounds - start), n))


def _rows_drawn(
    n: int, rounds: int, seed: int, clusters: Sequence[Hashable] | None
) -> Iterator[np.ndarray]:
    """Yield the rows of each round."""
    if clusters is None:
        for block in _drawn(n, rounds, seed):
            yield from block
        return
    members = _numbered(clusters, n)
    rows = [np.flatnonzero(members == c) for c in range(members.max() + 1)]
    for block in _drawn(len(rows), rounds, seed):
        for drawn in block:
            yield np.concatenate([rows[c] for c in drawn])


def _counts(drawn: np.ndarray, n: int) -> np.ndarray:
    """Return how often each of n was drawn in each round, ``[round, n]``."""
    rounds = len(drawn)
    places = drawn + n * np.arange(rounds)[:, None]
    counts = np.bincount(places.ravel(), minlength=rounds * n)
    return counts.astype(np.float64).reshape(rounds, n)


def _at(items: Sequence[Any] | np.ndarray, rows: np.ndarray) -> Any:
    if isinstance(items, np.ndarray):
        return items[rows]
    return [items[row] for row in rows.tolist()]


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _percentile(value: float, found: np.ndarray, n: int) -> Figure:
    """Return the figure of a statistic and its values in the rounds."""
    if math.isnan(value):
        return Figure(None, None, None, n)
    defined = found[~np.isnan(found)]
    if len(defined) < 2 or len(defined) < (1 - _UNDEFINED) * len(found):
        return Figure(value, None, None, n)
    low, high = np.quantile(defined, (0.025, 0.975))
    return Figure(value, float(defined.std(ddof=1)), (float(low), float(high)), n)
