"""Losses of pairs that move each response against the reference by itself.

The reference anchors both; see :class:`~jaxalign.objectives.responses.Responses` for H.
``s`` is the logistic function.
"""

import chex
import jax
from jaxtyping import Array, Float

from jaxalign.objectives.responses import Responses


__all__ = ["apo_down_loss", "apo_zero_loss", "bco_pair_loss", "nca_pair_loss"]


def nca_pair_loss(
    chosen: Responses, rejected: Responses, *, beta: float
) -> Float[Array, "*batch"]:
    """Return ``-log s(b H_w) - [log s(-b H_w) + log s(-b H_l)] / 2`` with b = beta.

    [Noise contrastive alignment](https://arxiv.org/abs/2402.05369) of two responses.

    >>> import jax.numpy as jnp
    >>> w = Responses(*jnp.array([0.0, -7.0, -7.0, 4.0]))  # H, p, p_ref, |y|
    >>> print(f"{nca_pair_loss(w, w, beta=0.1):.4f}")  # the reference itself: 2 log 2
    1.3863
    """
    chex.assert_equal_shape([*chosen, *rejected])
    log_s = jax.nn.log_sigmoid
    h_w, h_l = chosen.logratios, rejected.logratios
    return -log_s(beta * h_w) - 0.5 * log_s(-beta * h_w) - 0.5 * log_s(-beta * h_l)


def bco_pair_loss(
    chosen: Responses, rejected: Responses, *, beta: float
) -> Float[Array, "*batch"]:
    """Return ``-log s(beta H_w) - log s(-beta H_l)``.

    [Binary classifier optimization](https://arxiv.org/abs/2404.04656) of both responses
    of a pair, without its reward shift.

    >>> import jax.numpy as jnp
    >>> w = Responses(*jnp.array([10.0, -5.0, -15.0, 4.0]))  # H, p, p_ref, |y|
    >>> l = Responses(*jnp.array([0.0, -7.0, -7.0, 4.0]))
    >>> print(f"{bco_pair_loss(w, l, beta=0.1):.4f}")  # -log s(1) + log 2
    1.0064
    """
    chex.assert_equal_shape([*chosen, *rejected])
    log_s = jax.nn.log_sigmoid
    return -log_s(beta * chosen.logratios) - log_s(-beta * rejected.logratios)


def apo_zero_loss(
    chosen: Responses, rejected: Responses, *, beta: float
) -> Float[Array, "*batch"]:
    """Return ``1 - s(beta H_w) + s(beta H_l)``: chosen up, rejected down.

    [Anchored preference optimization](https://arxiv.org/abs/2408.06266), eq. 7.

    >>> import jax.numpy as jnp
    >>> w = Responses(*jnp.array([10.0, -5.0, -15.0, 4.0]))  # H, p, p_ref, |y|
    >>> l = Responses(*jnp.array([0.0, -7.0, -7.0, 4.0]))
    >>> print(f"{apo_zero_loss(w, l, beta=0.1):.4f}")  # 1 - s(1) + s(0)
    0.7689
    """
    chex.assert_equal_shape([*chosen, *rejected])
    s = jax.nn.sigmoid
    return 1 - s(beta * chosen.logratios) + s(beta * rejected.logratios)


def apo_down_loss(
    chosen: Responses, rejected: Responses, *, beta: float
) -> Float[Array, "*batch"]:
    """Return ``s(beta H_w) + 1 - s(beta (H_w - H_l))``: both down, rejected further.

    [Anchored preference optimization](https://arxiv.org/abs/2408.06266), eq. 8.

    >>> import jax.numpy as jnp
    >>> w = Responses(*jnp.array([10.0, -5.0, -15.0, 4.0]))  # H, p, p_ref, |y|
    >>> l = Responses(*jnp.array([0.0, -7.0, -7.0, 4.0]))
    >>> print(f"{apo_down_loss(w, l, beta=0.1):.4f}")  # s(1) + 1 - s(1)
    1.0000
    """
    chex.assert_equal_shape([*chosen, *rejected])
    s = jax.nn.sigmoid
    z = beta * (chosen.logratios - rejected.logratios)
    return s(beta * chosen.logratios) + 1 - s(z)
