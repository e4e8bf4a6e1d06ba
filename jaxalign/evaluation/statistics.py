"""How sure a number is: intervals, standard errors, comparisons. Pure, in float64."""

from typing import NamedTuple


__all__ = ["Figure"]


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
