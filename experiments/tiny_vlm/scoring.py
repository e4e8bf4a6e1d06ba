"""Right or wrong, shares with their intervals, and the neighbour in the tower."""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from jaxalign.judging.exact_match import normalised


__all__ = ["Share", "is_right", "nearest", "share"]

_Z = 1.959964  # of 95 %


class Share(NamedTuple):
    """How many were right, with Wilson's 95 % interval."""

    right: int
    of: int

    @property
    def value(self) -> float:
        """Return the share, 0 of none."""
        return self.right / self.of if self.of else 0.0

    @property
    def interval(self) -> tuple[float, float]:
        """Return Wilson's interval.

        >>> [round(x, 3) for x in Share(8, 10).interval]
        [0.49, 0.943]
        """
        if not self.of:
            return 0.0, 1.0
        p, n, z2 = self.value, self.of, _Z**2
        middle = p + z2 / (2 * n)
        half = _Z * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
        return (middle - half) / (1 + z2 / n), (middle + half) / (1 + z2 / n)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.value:.3f} ({low:.3f} to {high:.3f}, n = {self.of})"


def share(marks: Iterable[bool]) -> Share:
    """Return the share of what is true."""
    found = list(marks)
    return Share(sum(found), len(found))


def is_right(text: str, accepted: Sequence[str]) -> bool:
    """Tell whether an answer is one of those accepted, and nothing else.

    Case, punctuation, articles and blanks do not count.

    >>> is_right("The red apple.", ["red apple"]), is_right("apple", ["red apple"])
    (True, False)
    """
    return normalised(text) in {normalised(name) for name in accepted}


def nearest(known: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """Return for each row of features the known row of the largest cosine.

    Each set is centred by its own mean, which takes away what a maker's style adds to
    all of its drawings.

    Args:
      known: features [k, d].
      asked: features [n, d].
    """
    rows = []
    for features in (known, asked):
        centred = features - features.mean(0)
        rows.append(centred / np.linalg.norm(centred, axis=1, keepdims=True))
    return (rows[1] @ rows[0].T).argmax(1)
