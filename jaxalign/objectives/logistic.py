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
    """Return ``-(1 - e) log sigmoid(z) - e log sigmoid(-z)``.

    >>> print(f"{logistic_loss(jnp.array(1.0), 0.0):.4f}")  # log(1 + 1/e)
    0.3133
    """
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

    >>> w = Responses(*jnp.array([10.0, -5.0, -15.0, 4.0]))  # H, p, p_ref, |y|
    >>> l = Responses(*jnp.array([0.0, -7.0, -7.0, 4.0]))
    >>> print(f"{sigmoid_loss(w, l, beta=0.1):.4f}")
    0.3133
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

    >>> w = Responses(*jnp.array([0.0, -7.0, -7.0, 4.0]))  # H, p, p_ref, |y|
    >>> print(f"{exo_pair_loss(w, w, beta=0.1, label_smoothing=0.5):.4f}")  # equal
    0.0000
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

    >>> w = Responses(*jnp.array([10.0, -5.0, -15.0, 4.0]))  # H, p, p_ref, |y|
    >>> l = Responses(*jnp.array([0.0, -7.0, -7.0, 4.0]))
    >>> print(f"{robust_loss(w, l, beta=0.1, label_smoothing=0.1):.4f}")
    0.1883
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

    >>> w = Responses(*jnp.array([10.0, -5.0, -15.0, 4.0]))  # H, p, p_ref, |y|
    >>> l = Responses(*jnp.array([0.0, -7.0, -7.0, 4.0]))
    >>> print(f"{discopop_loss(w, l, beta=0.1, discopop_tau=0.05):.4f}")  # exp(-1)
    0.3679
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

    >>> w = Responses(*jnp.array([10.0, -5.0, -15.0, 10.0]))  # H, p, p_ref, |y|
    >>> l = Responses(*jnp.array([0.0, -7.0, -7.0, 4.0]))
    >>> print(f"{sigmoid_norm_loss(w, l, beta=1.0):.4f}")  # -log s(10 / 10)
    0.3133
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

    >>> w = Responses(*jnp.array([-10.0, -25.0, -15.0, 4.0]))  # H, p, p_ref, |y|
    >>> l = Responses(*jnp.array([-20.0, -27.0, -7.0, 4.0]))
    >>> print(f"{dpop_loss(w, l, beta=0.1, lambda_=2.0):.4f}")  # -log s(1 - 2)
    1.3133
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

    >>> w = Responses(*jnp.array([10.0, -5.0, -15.0, 4.0]))  # H, p, p_ref, |y|
    >>> l = Responses(*jnp.array([0.0, -7.0, -7.0, 4.0]))
    >>> print(f"{rpo_loss(w, l, beta=0.1, alpha=1.0):.4f}")  # 0.3133 + 5 / 4
    1.5633
    """
    chex.assert_equal_shape([*chosen, *rejected])
    z = beta * (chosen.logratios - rejected.logratios)
    return -jax.nn.log_sigmoid(z) - alpha * chosen.logps / chosen.lengths


def r_dpo_loss(
    chosen: Responses, rejected: Responses, *, beta: float, alpha: float
) -> Float[Array, "*batch"]:
    """Return ``-log s(z + alpha (|y_w| - |y_l|))``.

    A length regulariser. [R-DPO](https://arxiv.org/abs/2403.19159).

    >>> w = Responses(*jnp.array([10.0, -5.0, -15.0, 14.0]))  # H, p, p_ref, |y|
    >>> l = Responses(*jnp.array([0.0, -7.0, -7.0, 4.0]))
    >>> print(f"{r_dpo_loss(w, l, beta=0.1, alpha=-0.1):.4f}")  # log 2
    0.6931
    """
    chex.assert_equal_shape([*chosen, *rejected])
    z = beta * (chosen.logratios - rejected.logratios)
    longer = chosen.tokens - rejected.tokens
    return -jax.nn.log_sigmoid(z + alpha * longer)
