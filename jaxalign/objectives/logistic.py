"""Logistic losses of the difference of two responses: DPO and its kin.

``z = beta (H_w - H_l)`` and ``s`` is the logistic function; see
:class:`~jaxalign.objectives.responses.Responses` for H, p and ``|y|``.
"""

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxalign.objectives.responses import Responses


__all__ = [
    "discopop_loss",
    "dpo_loss",
    "dpop_loss",
    "exo_pair_loss",
    "logistic_loss",
    "r_dpo_loss",
    "robust_loss",
    "rpo_loss",
    "sigmoid_loss",
    "sigmoid_norm_loss",
]


def logistic_loss(
    logits: Float[Array, "*batch"], label_smoothing: float
) -> Float[Array, "*batch"]:
    """Return ``-(1 - e) log sigmoid(z) - e log sigmoid(-z)``."""
    positive = -jax.nn.log_sigmoid(logits)
    if label_smoothing == 0:
        return positive
    negative = -jax.nn.log_sigmoid(-logits)
    return (1 - label_smoothing) * positive + label_smoothing * negative


def dpo_loss(
    chosen_logratios: Float[Array, "*batch"],
    rejected_logratios: Float[Array, "*batch"],
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> Float[Array, "*batch"]:
    """Return the DPO loss of every pair.

    ``L = -log sigmoid(beta (H_w - H_l))`` with ``H = log pi(y|x) - log pi_ref(y|x)``;
    with smoothing e, ``-(1 - e) log sigmoid(z) - e log sigmoid(-z)``.
    [DPO](https://arxiv.org/abs/2305.18290), eq. 7; smoothing from its authors'
    [cDPO note](https://ericmitchell.ai/cdpo.pdf), eq. 3.

    Args:
      chosen_logratios: H of the preferred response, natural log, summed over tokens.
      rejected_logratios: H of the other one.
      beta: temperature, positive.
      label_smoothing: in [0, 0.5].
    Returns:
      One loss a pair; not averaged, not masked. ln 2 where the two ratios are equal.
    Example:
      >>> print(f"{dpo_loss(jnp.array(10.0), jnp.array(0.0), beta=0.1):.4f}")
      0.3133
    """
    chex.assert_equal_shape([chosen_logratios, rejected_logratios])
    return logistic_loss(
        beta * (chosen_logratios - rejected_logratios), label_smoothing
    )


def sigmoid_loss(
    chosen: Responses,
    rejected: Responses,
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> Float[Array, "*batch"]:
    """Return ``-(1 - e) log s(z) - e log s(-z)``: DPO, with smoothing e cDPO.

    [DPO](https://arxiv.org/abs/2305.18290), eq. 7, see :func:`dpo_loss`.
    [LD-DPO](https://arxiv.org/abs/2409.06411) is the same where the tokens beyond the
    shorter response weigh less, see ``policy.tail_weights``.
    """
    chex.assert_equal_shape([*chosen, *rejected])
    return dpo_loss(
        chosen.logratios,
        rejected.logratios,
        beta=beta,
        label_smoothing=label_smoothing,
    )


def exo_pair_loss(
    chosen: Responses, rejected: Responses, *, beta: float, label_smoothing: float
) -> Float[Array, "*batch"]:
    """Return ``s(z) (log s(z) - log(1 - e)) + s(-z) (log s(-z) - log e)``.

    The reverse KL from the label's distribution, e > 0.
    [EXO](https://arxiv.org/abs/2402.00856), eq. 16.
    """
    chex.assert_equal_shape([*chosen, *rejected])
    z = beta * (chosen.logratios - rejected.logratios)
    log_s = jax.nn.log_sigmoid
    return jax.nn.sigmoid(z) * (
        log_s(z) - jnp.log1p(-label_smoothing)
    ) + jax.nn.sigmoid(-z) * (log_s(-z) - jnp.log(label_smoothing))


def robust_loss(
    chosen: Responses, rejected: Responses, *, beta: float, label_smoothing: float
) -> Float[Array, "*batch"]:
    """Return ``[-(1 - e) log s(z) + e log s(-z)] / (1 - 2 e)``.

    Unbiased where a share e < 0.5 of the labels is the wrong way round.
    [Provably robust DPO](https://arxiv.org/abs/2403.00409).
    """
    chex.assert_equal_shape([*chosen, *rejected])
    z = beta * (chosen.logratios - rejected.logratios)
    clean, flipped = -jax.nn.log_sigmoid(z), -jax.nn.log_sigmoid(-z)
    e = label_smoothing
    return ((1 - e) * clean - e * flipped) / (1 - 2 * e)


def discopop_loss(
    chosen: Responses, rejected: Responses, *, beta: float, discopop_tau: float
) -> Float[Array, "*batch"]:
    """Return ``(1 - m) (-log s(z)) + m exp(-z)`` with ``m = s(z / tau)``.

    [DiscoPOP](https://arxiv.org/abs/2406.08414), eq. 5.
    """
    chex.assert_equal_shape([*chosen, *rejected])
    z = beta * (chosen.logratios - rejected.logratios)
    scaled = z / discopop_tau
    # exp(-z) s(z / tau) in one exponent: neither factor alone stays finite.
    exponential = jnp.exp(jax.nn.log_sigmoid(scaled) - z)
    return -jax.nn.log_sigmoid(z) * jax.nn.sigmoid(-scaled) + exponential


def sigmoid_norm_loss(
    chosen: Responses, rejected: Responses, *, beta: float
) -> Float[Array, "*batch"]:
    """Return ``-log s(beta (H_w / |y_w| - H_l / |y_l|))``.

    DPO a token, TRL's loss type of that name; from
    [Tulu 3](https://arxiv.org/abs/2411.15124).
    """
    chex.assert_equal_shape([*chosen, *rejected])
    mean_w = chosen.logratios / chosen.lengths
    mean_l = rejected.logratios / rejected.lengths
    return -jax.nn.log_sigmoid(beta * (mean_w - mean_l))


def dpop_loss(
    chosen: Responses, rejected: Responses, *, beta: float, lambda_: float
) -> Float[Array, "*batch"]:
    """Return ``-log s(beta (H_w - H_l - lambda max(0, -H_w)))``.

    A chosen response must not fall below the reference.
    [DPO-Positive](https://arxiv.org/abs/2402.13228).
    """
    chex.assert_equal_shape([*chosen, *rejected])
    z = beta * (chosen.logratios - rejected.logratios)
    fall = jax.nn.relu(-chosen.logratios)
    return -jax.nn.log_sigmoid(z - beta * lambda_ * fall)


def rpo_loss(
    chosen: Responses, rejected: Responses, *, beta: float, alpha: float
) -> Float[Array, "*batch"]:
    """Return ``-log s(z) - alpha p_w / |y_w|``.

    [Iterative reasoning preference optimization](https://arxiv.org/abs/2404.19733).
    """
    chex.assert_equal_shape([*chosen, *rejected])
    z = beta * (chosen.logratios - rejected.logratios)
    return -jax.nn.log_sigmoid(z) - alpha * chosen.logps / chosen.lengths


def r_dpo_loss(
    chosen: Responses, rejected: Responses, *, beta: float, alpha: float
) -> Float[Array, "*batch"]:
    """Return ``-log s(z + alpha (|y_w| - |y_l|))``.

    A length regulariser. [R-DPO](https://arxiv.org/abs/2403.19159).
    """
    chex.assert_equal_shape([*chosen, *rejected])
    z = beta * (chosen.logratios - rejected.logratios)
    longer = chosen.tokens - rejected.tokens
    return -jax.nn.log_sigmoid(z + alpha * longer)
