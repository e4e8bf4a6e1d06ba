"""DPO of parts of a response: single steps (Step-DPO), segments in order (SDPO)."""

import dataclasses
from typing import Literal

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxalign.configs import check_fields
from jaxalign.objectives import logps
from jaxalign.objectives.logistic import dpo_loss
from jaxalign.objectives.options import check_common
from jaxalign.objectives.policy import TokenLogps, pair_logps
from jaxalign.objectives.record import Aspects, Losses, Needs, Objective, Term
from jaxalign.types import PreferenceBatch


__all__ = ["SDPOConfig", "StepDPOConfig", "make_sdpo", "make_step_dpo", "sdpo_loss"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepDPOConfig:
    """Options of Step-DPO: DPO on single steps, which end without an end of turn.

    Attributes:
      name: the objective.
      beta: temperature.

    >>> StepDPOConfig().beta
    0.1
    """

    name: Literal["step_dpo"] = "step_dpo"
    beta: float = 0.1

    def __post_init__(self) -> None:
        check_fields(self)
        check_common(self.beta, 0.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SDPOConfig:
    """Options of SDPO: DPO over equally many segments of both responses.

    Attributes:
      name: the objective.
      beta: temperature.

    >>> SDPOConfig().beta
    0.1
    """

    name: Literal["sdpo"] = "sdpo"
    beta: float = 0.1

    def __post_init__(self) -> None:
        check_fields(self)
        check_common(self.beta, 0.0)


def sdpo_loss(
    chosen_logratios: Float[Array, "*batch s"],
    rejected_logratios: Float[Array, "*batch s"],
    *,
    chosen_mask: Bool[Array, "*batch s"],
    rejected_mask: Bool[Array, "*batch s"],
    beta: float,
) -> Float[Array, "*batch"]:
    """Return ``-log s(beta sum_{k<N} (H_k^w - H_k^l))``, N segments of either side.

    N is the smaller number of segments: what cancels in the derivation cancels only
    between segments at the same depth.
    [SDPO](https://arxiv.org/abs/2501.01821), eq. 7.

    Args:
      chosen_logratios: sums of log-ratios over each segment, in text order.
      rejected_logratios: the same of the other response.
      chosen_mask: which segments there are; a place counts where both sides have one.
      rejected_mask: the same of the other response.
      beta: temperature.
    Example:
      >>> import jax.numpy as jnp
      >>> w, l = jnp.array([4.0, 6.0, 9.0]), jnp.array([0.0, 0.0, 0.0])
      >>> two, three = jnp.array([True, True, False]), jnp.array([True, True, True])
      >>> loss = sdpo_loss(w, l, chosen_mask=three, rejected_mask=two, beta=0.1)
      >>> print(f"{loss:.4f}")  # the third has no counterpart: -log s(1)
      0.3133
    """
    chex.assert_equal_shape(
        [chosen_logratios, rejected_logratios, chosen_mask, rejected_mask]
    )
    both = chosen_mask & rejected_mask
    difference = jnp.where(both, chosen_logratios - rejected_logratios, 0.0)
    return -jax.nn.log_sigmoid(beta * difference.sum(-1))


def make_step_dpo(config: StepDPOConfig, aspects: Aspects = None) -> Objective:
    """Return the objective of Step-DPO.

    >>> make_step_dpo(StepDPOConfig()).needs.segments
    False
    """
    del aspects

    def losses(tokens: TokenLogps, batch: PreferenceBatch) -> Losses:
        ratios = pair_logps(tokens, batch).logratios
        return Losses(dpo_loss(ratios[..., 0], ratios[..., 1], beta=config.beta))

    return Objective(Needs(end_of_turn=False), (Term(losses),), beta=config.beta)


def make_sdpo(config: SDPOConfig, aspects: Aspects = None) -> Objective:
    """Return the objective of SDPO.

    >>> make_sdpo(SDPOConfig()).needs.segments
    True
    """
    del aspects

    def losses(tokens: TokenLogps, batch: PreferenceBatch) -> Losses:
        mask = batch.segment_mask
        shape = mask.shape[1], mask.shape[3]
        sums = logps.segment_sums(tokens.logratios, batch.completions, shape)
        values = sdpo_loss(
            sums[..., 0, :],
            sums[..., 1, :],
            chosen_mask=mask[..., 0, :],
            rejected_mask=mask[..., 1, :],
            beta=config.beta,
        )
        return Losses(values)

    return Objective(Needs(segments=True), (Term(losses),), beta=config.beta)
