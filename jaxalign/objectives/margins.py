"""Losses that want a margin between two responses: a hinge, and regression to a target.

``z = beta (H_w - H_l)``; see :class:`~jaxalign.objectives.responses.Responses` for H
and ``|y|``.
"""

import chex
import jax
from jaxtyping import Array, Float

from jaxalign.objectives.responses import Responses


__all__ = ["hinge_loss", "ipo_loss", "sppo_hard_loss"]


def hinge_loss(
    chosen: Responses, rejected: Responses, *, beta: float
) -> Float[Array, "*batch"]:
    """Return ``max(0, 1 - z)``.

    [SLiC-HF](https://arxiv.org/abs/2305.10425) with a reference, as TRL has it.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxalign.objectives.responses import make_responses
      >>> four = jnp.array(4.0)
      >>> w = make_responses(jnp.array(-5.0), jnp.array(-15.0), four)
      >>> l = make_responses(jnp.array(-7.0), jnp.array(-7.0), four)
      >>> print(f"{hinge_loss(w, l, beta=0.05):.4f}")
      0.5000
    """
    chex.assert_equal_shape([*chosen, *rejected])
    return jax.nn.relu(1 - beta * (chosen.logratios - rejected.logratios))


def ipo_loss(
    chosen: Responses, rejected: Responses, *, beta: float
) -> Float[Array, "*batch"]:
    """Return ``(H_w / |y_w| - H_l / |y_l| - 1 / (2 beta))^2``.

    Averaged over tokens as in TRL; beta is the paper's tau.
    [IPO](https://arxiv.org/abs/2310.12036), eq. 17.

    >>> import jax.numpy as jnp
    >>> w = Responses(*jnp.array([20.0, -5.0, -25.0, 4.0]))  # H, p, p_ref, |y|
    >>> l = Responses(*jnp.array([0.0, -7.0, -7.0, 4.0]))
    >>> float(ipo_loss(w, l, beta=0.1))  # 20 / 4 is the margin asked for, 1 / 0.2
    0.0
    """
    chex.assert_equal_shape([*chosen, *rejected])
    mean_w = chosen.logratios / chosen.lengths
    mean_l = rejected.logratios / rejected.lengths
    return (mean_w - mean_l - 1 / (2 * beta)) ** 2


def sppo_hard_loss(
    chosen: Responses, rejected: Responses, *, beta: float
) -> Float[Array, "*batch"]:
    """Return ``(H_w - 1 / (2 beta))^2 + (H_l + 1 / (2 beta))^2``.

    The chosen response is taken to win with certainty.
    [SPPO](https://arxiv.org/abs/2405.00675), eq. 4.7.

    >>> import jax.numpy as jnp
    >>> w = Responses(*jnp.array([5.0, -5.0, -10.0, 4.0]))  # H, p, p_ref, |y|
    >>> l = Responses(*jnp.array([-3.0, -10.0, -7.0, 4.0]))
    >>> float(sppo_hard_loss(w, l, beta=0.1))  # (5 - 5)^2 + (-3 + 5)^2
    4.0
    """
    chex.assert_equal_shape([*chosen, *rejected])
    target = 0.5 / beta
    return (chosen.logratios - target) ** 2 + (rejected.logratios + target) ** 2
