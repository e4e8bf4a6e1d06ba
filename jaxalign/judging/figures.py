"""A number with what it stands on, and that of a mean. Pure, in float64.

What gates decide by and benchmarks report: :mod:`jaxalign.evaluation.statistics` has
the rest, shares, clusters and the bootstrap.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxalign.errors import UserError


__all__ = ["Figure", "Z", "finite", "mean", "normal"]

Z = 1.959963984540054
"""The normal distribution's quantile of 0.975."""


class Figure(NamedTuple):
    """A number of a benchmark with what it stands on.

    >>> Figure(0.5, None, (0.2, 0.8), 8).n
    8
    """

    value: float | None
    """None where there is nothing to compute it from."""
    standard_error: float | None
    interval: tuple[float, float] | None
    """Of 95 % confidence, unless the figure's description says otherwise."""
    n: int
    """The denominator: what the value is a mean or share of."""


def mean(values: Sequence[float | int] | np.ndarray) -> Figure:
    """Return a mean with its standard error ``sd / sqrt(n)``, ddof 1.

    The interval is normal: ``value ± 1.96 standard_error``; one value has neither.

    Raises:
      UserError: a value is not finite.
    Example:
      >>> mean([1, 2, 3, 4])[:2]
      (2.5, 0.6454972243679028)
    """
    numbers = finite(values)
    n = len(numbers)
    if n == 0:
        return Figure(None, None, None, 0)
    value = float(numbers.mean())
    if n == 1:
        return Figure(value, None, None, 1)
    return normal(value, float(numbers.std(ddof=1)) / math.sqrt(n), n)


def normal(value: float, error: float, n: int) -> Figure:
    """Return a figure with its interval, ``value ± 1.96 error``.

    >>> [round(end, 2) for end in normal(0.5, 0.1, 20).interval]
    [0.3, 0.7]
    """
    return Figure(value, error, (value - Z * error, value + Z * error), n)


def finite(values: Sequence[float | int] | np.ndarray) -> np.ndarray:
    """Return values as an array.

    Raises:
      UserError: one is not finite.
    Example:
      >>> finite([1, 2]).dtype
      dtype('float64')
    """
    numbers = np.asarray(values, np.float64)
    if not np.isfinite(numbers).all():
        row = int(np.flatnonzero(~np.isfinite(numbers))[0])
        raise UserError(
            f"a mean needs finite numbers: value {row} is {numbers[row]}. Leave out, "
            "and count, what has no value"
        )
    return numbers
