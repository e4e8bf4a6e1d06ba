"""How far several votes on the same thing agree, and a judge's labels with people's."""

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxalign.errors import UserError


__all__ = ["Agreement", "agreement_of", "cohens_kappa"]


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


def cohens_kappa(truths: Sequence[Any], guesses: Sequence[Any]) -> float | None:
    """Return the agreement of two raters beyond chance.

    ``(p_o - p_e) / (1 - p_e)`` with p_o the share of equal labels and ``p_e = sum_c
    p_c q_c``, what two raters with these shares of labels would have in common by
    chance (Cohen 1960, https://doi.org/10.1177/001316446002000104): 1 is perfect, 0
    chance.

    Args:
      truths: labels of one rater.
      guesses: of the other, for the same things.
    Returns:
      None where chance alone is perfect (both gave one and the same label), or where
      there are no labels.
    Raises:
      UserError: there is not one guess for each truth.
    Example:
      >>> round(cohens_kappa("aaabb", "aabbb"), 6)  # p_o = 4/5, p_e = 6/25 + 6/25
      0.615385
    """
    n = len(truths)
    if len(guesses) != n:
        raise UserError(
            f"kappa needs a guess for each truth: got {n} truths and {len(guesses)} "
            "guesses"
        )
    if n == 0:
        return None
    equal = sum(a == b for a, b in zip(truths, guesses, strict=True))
    of_truths, of_guesses = Counter(truths), Counter(guesses)
    chance = sum(count * of_guesses[label] for label, count in of_truths.items())
    # In integers: of one label alone the difference is exactly 0.
    beyond = n * n - chance
    return None if beyond == 0 else (n * equal - chance) / beyond
