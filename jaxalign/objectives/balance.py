"""How evenly a mixture of experts uses its experts."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxalign.types import RouterSums


__all__ = ["balance_loss"]


def balance_loss(sums: RouterSums) -> Float[Array, ""]:
    """Return ``E sum_e f_e P_e`` of a batch, equations 4 to 6 of Switch Transformers.

    Of E experts, f_e is how many of its k choices a token gives to e on average, over
    all tokens and layers, and P_e the mean probability of e: k where all are used
    alike, up to E where one takes all. Only P has a derivative. The same as the
    auxiliary loss of transformers. Source: https://arxiv.org/abs/2101.03961, section
    2.2.

    >>> two_each = jnp.full((1, 4), 2.0)
    >>> even = RouterSums(two_each, two_each / 2, jnp.full(1, 4.0))
    >>> float(balance_loss(even))
    2.0
    """
    tokens = jnp.maximum(sums.tokens.sum(), 1)
    share, probability = sums.counts.sum(0) / tokens, sums.probs.sum(0) / tokens
    return share.size * (share * probability).sum()
