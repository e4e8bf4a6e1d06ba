"""The two sides of a batch of pairs, as the sums that pairwise losses are made of."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxalign.objectives.policy import TokenLogps, pair_logps, tail_weights
from jaxalign.types import PreferenceBatch


__all__ = ["Responses", "make_responses", "responses_of_batch"]


class Responses(NamedTuple):
    """One side of a batch of pairs, as sums over the completion tokens.

    In the losses' formulas the two sides are w (chosen) and l (rejected); of each side
    ``H`` is its ``logratios``, ``p`` its ``logps`` and ``|y|`` its ``tokens``.
    """

    logratios: Float[Array, "*batch"]
    """log pi(y|x) - log pi_ref(y|x), or what an f-divergence makes of it."""
    logps: Float[Array, "*batch"]
    ref_logps: Float[Array, "*batch"]
    tokens: Float[Array, "*batch"]

    @property
    def lengths(self) -> Float[Array, "*batch"]:
        """Tokens, 1 for an empty response."""
        return jnp.maximum(self.tokens, 1)

    @property
    def mean_logps(self) -> Float[Array, "*batch"]:
        """log pi(y|x) / |y|."""
        return self.logps / self.lengths


def make_responses(
    logps: Float[Array, "*batch"],
    ref_logps: Float[Array, "*batch"],
    tokens: Float[Array, "*batch"],
    divergence: Callable[[Array], Array] | None = None,
) -> Responses:
    """Return one side of the pairs, see :mod:`divergences` for the last argument."""
    ratios = logps - ref_logps
    return Responses(
        ratios if divergence is None else divergence(ratios), logps, ref_logps, tokens
    )


def responses_of_batch(
    tokens: TokenLogps,
    batch: PreferenceBatch,
    *,
    tail_weight: float | None = None,
    divergence: Callable[[Array], Array] | None = None,
) -> tuple[Responses, Responses]:
    """Return the chosen and the rejected responses of a batch.

    Args:
      tokens: log-probabilities of the completion tokens.
      batch: which response each token is of.
      tail_weight: of the tokens beyond the shorter response; None is 1.
      divergence: f' of an f-divergence as a function of the log-ratio.
    """
    weights = None if tail_weight is None else tail_weights(batch, tail_weight)
    pair = pair_logps(tokens, batch, weights)
    chosen, rejected = (
        make_responses(
            pair.logps[..., side],
            pair.ref_logps[..., side],
            pair.tokens[..., side],
            divergence,
        )
        for side in (0, 1)
    )
    return chosen, rejected
