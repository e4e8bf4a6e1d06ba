"""How far several votes on the same thing agree."""

from typing import Any, NamedTuple


__all__ = ["Agreement", "agreement_of"]


class Agreement(NamedTuple):
    """How far several votes on the same thing agree; sums, see :func:`agreement_of`."""

    equal: int
    """Pairs of votes with the same score, over segments and aspects."""
    pairs: int
    distance: float
    """Sum of the absolute differences over the pairs."""

    def plus(self, other: "Agreement") -> "Agreement":
        """Return the sums of both."""
        return Agreement(
            self.equal + other.equal,
            self.pairs + other.pairs,
            self.distance + other.distance,
        )


def agreement_of(one: Any, other: Any) -> Agreement:
    """Return how far two values of a ``scores`` request agree.

    >>> agreement_of({"segments": [{"a": 1, "b": 4}]}, {"segments": [{"a": 3, "b": 4}]})
    Agreement(equal=1, pairs=2, distance=2)
    """
    distances = [
        abs(left[aspect] - right[aspect])
        for left, right in zip(one["segments"], other["segments"], strict=True)
        for aspect in left
    ]
    return Agreement(distances.count(0), len(distances), sum(distances))
