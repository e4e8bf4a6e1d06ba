"""AOT: distributions of rewards compared by optimal transport, which is to sort them.

In one dimension the optimal plan pairs the k-th smallest value of the one distribution
with the k-th smallest of the other, so the loss needs all pairs of a batch.
"""

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxalign.objectives.logistic import logistic_loss
from jaxalign.objectives.responses import Responses


__all__ = ["aot_loss", "aot_unpaired_loss"]


def aot_loss(
    chosen: Responses,
    rejected: Responses,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    mask: Bool[Array, "*batch"],
) -> Float[Array, "*batch"]:
    """Compare the policy's margins ``p_w - p_l`` with the reference's, both sorted.

    ``-log s(beta (policy margin of rank k - reference margin of rank k))``, smoothed as
    DPO is. The mask says which pairs there are; a pair has the loss of its rank.
    [Distributional preference alignment](https://arxiv.org/abs/2406.05882), paired.

    >>> import jax.numpy as jnp
    >>> same = jnp.array([-3.0, -7.0])
    >>> sides = Responses(0 * same, same, same, jnp.full(2, 4.0))
    >>> losses = aot_loss(sides, sides, beta=0.1, mask=jnp.array([True, True]))
    >>> print([f"{x:.4f}" for x in losses])  # policy = reference: log 2
    ['0.6931', '0.6931']
    """
    chex.assert_equal_shape([*chosen, *rejected, mask])
    better = chosen.logps - rejected.logps
    worse = chosen.ref_logps - rejected.ref_logps
    return _sorted_loss(better, worse, mask, beta, label_smoothing)


def aot_unpaired_loss(
    chosen: Responses,
    rejected: Responses,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    mask: Bool[Array, "*batch"],
) -> Float[Array, "*batch"]:
    """Compare the sorted ``H_w`` of all chosen with the sorted ``H_l`` of all rejected.

    ``-log s(beta (H_w of rank k - H_l of rank k))``, smoothed as DPO is. The mask says
    which pairs there are; a pair has the loss of its chosen response's rank.
    [Distributional preference alignment](https://arxiv.org/abs/2406.05882), unpaired.

    >>> import jax.numpy as jnp
    >>> two = jnp.array([0.0, 10.0])
    >>> w = Responses(two, two - 20, jnp.full(2, -20.0), jnp.full(2, 4.0))
    >>> losses = aot_unpaired_loss(w, w, beta=0.1, mask=jnp.array([True, True]))
    >>> print([f"{x:.4f}" for x in losses])  # the same distribution: log 2
    ['0.6931', '0.6931']
    """
    chex.assert_equal_shape([*chosen, *rejected, mask])
    return _sorted_loss(
        chosen.logratios, rejected.logratios, mask, beta, label_smoothing
    )


def _sorted_loss(
    better: Array, worse: Array, mask: Array, beta: float, label_smoothing: float
) -> Array:
    """Compare the k-th smallest of one with the k-th smallest of the other."""
    flat = mask.reshape(-1)

    def ascending(values: Array) -> tuple[Array, Array]:
        values = values.reshape(-1)
        keys = jax.lax.stop_gradient(jnp.where(flat, values, jnp.inf))
        order = jnp.argsort(keys)
        return jnp.where(flat, values, 0.0)[order], order

    upper, order = ascending(better)
    lower, _ = ascending(worse)
    losses = logistic_loss(beta * (upper - lower), label_smoothing)
    return jnp.zeros_like(losses).at[order].set(losses).reshape(better.shape)
