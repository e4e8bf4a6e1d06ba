"""Losses of pairs that compare with no reference: SimPO, CPO, ORPO.

``p = log pi(y|x)``, ``NLL_w = -p_w / |y_w|``; ``s`` is the logistic function.
"""

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxalign.objectives.logistic import logistic_loss
from jaxalign.objectives.responses import Responses


__all__ = ["cpo_loss", "orpo_loss", "simpo_loss"]


def simpo_loss(
    chosen: Responses,
    rejected: Responses,
    *,
    beta: float,
    gamma: float,
    label_smoothing: float = 0.0,
) -> Float[Array, "*batch"]:
    """Return ``-log s(beta (p_w / |y_w| - p_l / |y_l|) - gamma)``, smoothed as DPO is.

    [SimPO](https://arxiv.org/abs/2405.14734), eq. 6.

    >>> import jax.numpy as jnp
    >>> w = Responses(*jnp.array([0.0, -4.0, 0.0, 4.0]))  # H, p, p_ref, |y|
    >>> l = Responses(*jnp.array([0.0, -8.0, 0.0, 4.0]))
    >>> print(f"{simpo_loss(w, l, beta=2.0, gamma=1.0):.4f}")  # -log s(2 - 1)
    0.3133
    """
    chex.assert_equal_shape([*chosen, *rejected])
    margin = beta * (chosen.mean_logps - rejected.mean_logps)
    return logistic_loss(margin - gamma, label_smoothing)


def cpo_loss(
    chosen: Responses,
    rejected: Responses,
    *,
    beta: float,
    alpha: float,
    label_smoothing: float = 0.0,
) -> Float[Array, "*batch"]:
    """Return ``-log s(beta (p_w - p_l)) + alpha NLL_w``, smoothed as DPO is.

    [Contrastive preference optimization](https://arxiv.org/abs/2401.08417).

    >>> import jax.numpy as jnp
    >>> w = Responses(*jnp.array([0.0, -4.0, 0.0, 4.0]))  # H, p, p_ref, |y|
    >>> l = Responses(*jnp.array([0.0, -14.0, 0.0, 4.0]))
    >>> print(f"{cpo_loss(w, l, beta=0.1, alpha=0.0):.4f}")  # -log s(1)
    0.3133
    """
    chex.assert_equal_shape([*chosen, *rejected])
    logits = beta * (chosen.logps - rejected.logps)
    return logistic_loss(logits, label_smoothing) - alpha * chosen.mean_logps


def orpo_loss(
    chosen: Responses, rejected: Responses, *, beta: float
) -> Float[Array, "*batch"]:
    """Return ``NLL_w - beta log s(o_w - o_l)``.

    o is the log-odds of the mean token log-probability; beta is the paper's lambda.
    [ORPO](https://arxiv.org/abs/2403.07691), eq. 6 and 7.

    >>> import jax.numpy as jnp
    >>> w = Responses(*jnp.array([0.0, -4.0, 0.0, 4.0]))  # H, p, p_ref, |y|
    >>> print(f"{orpo_loss(w, w, beta=1.0):.4f}")  # 4 / 4 + log 2
    1.6931
    """
    chex.assert_equal_shape([*chosen, *rejected])
    mean_w, mean_l = chosen.mean_logps, rejected.mean_logps
    odds = _log_odds(mean_w) - _log_odds(mean_l)
    return -mean_w - beta * jax.nn.log_sigmoid(odds)


def _log_odds(logp: Array) -> Array:
    """Return log(p / (1 - p)); a probability of 1 counts as the largest below it."""
    logp = jnp.minimum(logp, -1e-7)
    return logp - jnp.log(-jnp.expm1(logp))
