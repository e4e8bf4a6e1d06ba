"""TDPO: DPO with the divergence of whole distributions, token by token."""

import dataclasses
import functools
from typing import Literal

import chex
import jax
from jaxtyping import Array, Float

from jaxalign.configs import check_fields
from jaxalign.errors import UserError
from jaxalign.objectives import logps
from jaxalign.objectives.options import check_common, fill, refuse_others
from jaxalign.objectives.policy import TokenLogps, pair_logps
from jaxalign.objectives.record import Aspects, Losses, Needs, Objective, Term
from jaxalign.types import PreferenceBatch


__all__ = ["TDPOConfig", "make", "tdpo1_loss", "tdpo2_loss"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TDPOConfig:
    """Options of TDPO.

    Attributes:
      name: ``tdpo1`` or ``tdpo2``.
      beta: temperature.
      alpha: tdpo2 only: weight of the difference of divergences, at least 0.

    >>> TDPOConfig(name="tdpo2").alpha
    0.5
    """

    name: Literal["tdpo1", "tdpo2"] = "tdpo2"
    beta: float = 0.1
    alpha: float | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        check_common(self.beta, 0.0)
        if self.name == "tdpo1":
            refuse_others(self, ("beta",))
        else:
            fill(self, {"alpha": 0.5})
        if self.alpha is not None and not 0 <= self.alpha < float("inf"):
            raise UserError(f"objective.alpha must be at least 0: got {self.alpha}")


def tdpo1_loss(
    chosen_logratios: Float[Array, "*batch"],
    rejected_logratios: Float[Array, "*batch"],
    chosen_kl: Float[Array, "*batch"],
    rejected_kl: Float[Array, "*batch"],
    *,
    beta: float,
) -> Float[Array, "*batch"]:
    """Return ``-log s(beta (H_w - H_l - (K_l - K_w)))`` of every pair.

    H is log pi - log pi_ref of a response (``*_logratios``), and
    ``K = sum_t KL(pi_ref(.|s_t) || pi(.|s_t))`` its sequential divergence over the
    whole vocabulary (``*_kl``).
    [Token-level DPO](https://arxiv.org/abs/2404.11999), eq. 15.

    Returns:
      One loss a pair; not averaged, not masked.
    Example:
      >>> import jax.numpy as jnp
      >>> ten, two, none = jnp.array(10.0), jnp.array(2.0), jnp.array(0.0)
      >>> print(f"{tdpo1_loss(ten + 2, none, none, two, beta=0.1):.4f}")  # -log s(1)
      0.3133
    """
    chex.assert_equal_shape(
        [chosen_logratios, rejected_logratios, chosen_kl, rejected_kl]
    )
    margin = chosen_logratios - rejected_logratios
    margin = margin - (rejected_kl - chosen_kl)
    return -jax.nn.log_sigmoid(beta * margin)


def tdpo2_loss(
    chosen_logratios: Float[Array, "*batch"],
    rejected_logratios: Float[Array, "*batch"],
    chosen_kl: Float[Array, "*batch"],
    rejected_kl: Float[Array, "*batch"],
    *,
    beta: float,
    alpha: float,
) -> Float[Array, "*batch"]:
    """Return ``-log s(beta (H_w - H_l - alpha (K_l - stop_gradient(K_w))))``.

    H and K are those of :func:`tdpo1_loss`.
    [Token-level DPO](https://arxiv.org/abs/2404.11999), eq. 16.

    >>> import jax.numpy as jnp
    >>> ten, two, none = jnp.array(10.0), jnp.array(2.0), jnp.array(0.0)
    >>> loss = tdpo2_loss(ten + 1, none, none, two, beta=0.1, alpha=0.5)
    >>> print(f"{loss:.4f}")  # -log s(1)
    0.3133
    """
    chex.assert_equal_shape(
        [chosen_logratios, rejected_logratios, chosen_kl, rejected_kl]
    )
    margin = chosen_logratios - rejected_logratios
    margin = margin - alpha * (rejected_kl - jax.lax.stop_gradient(chosen_kl))
    return -jax.nn.log_sigmoid(beta * margin)


def make(config: TDPOConfig, aspects: Aspects = None) -> Objective:
    """Return the objective of TDPO 1 or 2.

    >>> make(TDPOConfig()).needs.kl
    True
    """
    del aspects
    loss = functools.partial(tdpo1_loss, beta=config.beta)
    if config.alpha is not None:
        loss = functools.partial(tdpo2_loss, beta=config.beta, alpha=config.alpha)

    def losses(tokens: TokenLogps, batch: PreferenceBatch) -> Losses:
        assert tokens.kl is not None
        ratios = pair_logps(tokens, batch).logratios
        pairs = batch.pair_mask.shape[1]
        kl = logps.response_sums(tokens.kl, batch.completions, pairs)
        return Losses(loss(ratios[..., 0], ratios[..., 1], kl[..., 0], kl[..., 1]))

    return Objective(Needs(kl=True), (Term(losses),), beta=config.beta)
