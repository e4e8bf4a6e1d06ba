"""Objectives that look below whole completions: TDPO, TIS-DPO, Step-DPO, SDPO, SePO.

``h_t`` is log pi - log pi_ref of a token, ``H`` its sum over a completion.
"""

import dataclasses
from typing import Literal

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxalign.errors import UserError
from jaxalign.objectives import logps
from jaxalign.objectives.pairwise import check_common


__all__ = [
    "SDPOConfig",
    "SePOConfig",
    "StepDPOConfig",
    "TDPOConfig",
    "TISConfig",
    "sdpo_loss",
    "select_tokens",
    "sepo_loss",
    "tdpo_loss",
    "tis_dpo_loss",
    "tis_weights",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TDPOConfig:
    """Options of TDPO.

    Attributes:
      name: ``tdpo1`` or ``tdpo2``.
      beta: temperature.
      alpha: tdpo2 only: weight of the difference of divergences, at least 0.
    """

    name: Literal["tdpo1", "tdpo2"] = "tdpo2"
    beta: float = 0.1
    alpha: float | None = None

    def __post_init__(self) -> None:
        check_common(self.beta, 0.0)
        if self.name == "tdpo1" and self.alpha is not None:
            raise UserError(
                f"objective.alpha has no effect for tdpo1: got {self.alpha}. "
                "Its options are beta"
            )
        if self.name == "tdpo2" and self.alpha is None:
            object.__setattr__(self, "alpha", 0.5)
        if self.alpha is not None and not 0 <= self.alpha < float("inf"):
            raise UserError(f"objective.alpha must be at least 0: got {self.alpha}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TISConfig:
    """Options of TIS-DPO. Weights come with the data or from two models.

    Attributes:
      name: the objective.
      beta: temperature.
      positive_model: checkpoint that likes good tokens (trained on chosen responses).
      negative_model: checkpoint that likes bad ones. Without both, records must have
        ``chosen_token_weights`` and ``rejected_token_weights``.
      mu: exponent; its sign is turned round for rejected responses.
      lower: least log-ratio of the two models.
      upper: largest one.
      scale: factor of all weights.
    """

    name: Literal["tis_dpo"] = "tis_dpo"
    beta: float = 0.1
    positive_model: str | None = None
    negative_model: str | None = None
    mu: float | None = None
    lower: float | None = None
    upper: float | None = None
    scale: float | None = None

    def __post_init__(self) -> None:
        check_common(self.beta, 0.0)
        estimated = _check_models(self)
        defaults = {"mu": 1.0, "lower": -0.5, "upper": 1.5, "scale": 1.0}
        for field, default in defaults.items():
            value = getattr(self, field)
            if value is not None and not estimated:
                raise UserError(
                    f"objective.{field} has no effect without objective.positive_model "
                    f"and negative_model, as the data gives the weights: got {value}"
                )
            if value is None and estimated:
                object.__setattr__(self, field, default)
        if self.lower is not None and self.upper is not None:
            if not -80 <= self.lower <= self.upper <= 80:
                raise UserError(
                    "objective.lower and upper must lie between -80 and 80, lower "
                    f"first: got {self.lower} and {self.upper}"
                )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SePOConfig:
    """Options of SePO. Token scores come with the data or from two models.

    Attributes:
      name: the objective.
      beta: factor of the mean log-probabilities.
      chosen_share: share of a chosen response's tokens that is kept, the best ones.
      rejected_share: share of a rejected response's tokens, the worst ones.
      positive_model: the oracle's checkpoint.
      negative_model: the checkpoint that the oracle was trained from. Without both,
        records must have ``chosen_token_weights`` and ``rejected_token_weights``.
    """

    name: Literal["sepo"] = "sepo"
    beta: float = 1.0
    chosen_share: float = 0.3
    rejected_share: float = 0.3
    positive_model: str | None = None
    negative_model: str | None = None

    def __post_init__(self) -> None:
        check_common(self.beta, 0.0)
        _check_models(self)
        for field in ("chosen_share", "rejected_share"):
            if not 0 < getattr(self, field) <= 1:
                raise UserError(
                    f"objective.{field} must lie in (0, 1]: got {getattr(self, field)}"
                )


def _check_models(config: TISConfig | SePOConfig) -> bool:
    given = (config.positive_model is not None, config.negative_model is not None)
    if any(given) and not all(given):
        missing = "positive_model" if not given[0] else "negative_model"
        raise UserError(
            f"objective.{missing} is missing: token weights are estimated from two "
            "models. Give both, or neither and token weights in the records"
        )
    return all(given)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepDPOConfig:
    """Options of Step-DPO: DPO on single steps, which end without an end of turn.

    Attributes:
      name: the objective.
      beta: temperature.
    """

    name: Literal["step_dpo"] = "step_dpo"
    beta: float = 0.1

    def __post_init__(self) -> None:
        check_common(self.beta, 0.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SDPOConfig:
    """Options of SDPO: DPO over equally many segments of both responses.

    Attributes:
      name: the objective.
      beta: temperature.
    """

    name: Literal["sdpo"] = "sdpo"
    beta: float = 0.1

    def __post_init__(self) -> None:
        check_common(self.beta, 0.0)


def tdpo_loss(
    chosen_logratios: Float[Array, "*batch"],
    rejected_logratios: Float[Array, "*batch"],
    chosen_kl: Float[Array, "*batch"],
    rejected_kl: Float[Array, "*batch"],
    *,
    config: TDPOConfig,
) -> Float[Array, "*batch"]:
    """Return the TDPO loss of every pair.

    With the sequential divergences ``K = sum_t KL(pi_ref(.|s_t) || pi(.|s_t))``::

        tdpo1  -log s(beta (H_w - H_l - (K_l - K_w)))
        tdpo2  -log s(beta (H_w - H_l - alpha (K_l - stop_gradient(K_w))))

    [Token-level DPO](https://arxiv.org/abs/2404.11999), eq. 15 and 16.

    Args:
      chosen_logratios: H of the preferred response.
      rejected_logratios: H of the other one.
      chosen_kl: K of the preferred response, over the whole vocabulary.
      rejected_kl: K of the other one.
      config: options.
    Returns:
      One loss a pair; not averaged, not masked.
    """
    chex.assert_equal_shape(
        [chosen_logratios, rejected_logratios, chosen_kl, rejected_kl]
    )
    margin = chosen_logratios - rejected_logratios
    if config.name == "tdpo1":
        margin = margin - (rejected_kl - chosen_kl)
    else:
        assert config.alpha is not None
        fixed = jax.lax.stop_gradient(chosen_kl)
        margin = margin - config.alpha * (rejected_kl - fixed)
    return -jax.nn.log_sigmoid(config.beta * margin)


def tis_dpo_loss(
    chosen_weighted: Float[Array, "*batch"],
    rejected_weighted: Float[Array, "*batch"],
    *,
    beta: float,
) -> Float[Array, "*batch"]:
    """Return ``-log s(beta sum_t w_t h_t^w - beta sum_t w_t h_t^l)`` of every pair.

    [TIS-DPO](https://arxiv.org/abs/2410.04350), without its optional divergence term.

    Args:
      chosen_weighted: sum of weight × log-ratio over the preferred response.
      rejected_weighted: the same of the other one.
      beta: temperature.
    """
    return -jax.nn.log_sigmoid(beta * (chosen_weighted - rejected_weighted))


def tis_weights(
    logratios: Float[Array, "*n"], *, chosen: bool, config: TISConfig
) -> Float[Array, "*n"]:
    """Return ``scale exp(±mu clip(log pi+ - log pi-, lower, upper))`` of every token.

    Plus for chosen responses, minus for rejected ones, whose low-reward tokens are
    then the important ones ([TIS-DPO](https://arxiv.org/abs/2410.04350), eq. 10).
    """
    assert config.mu is not None and config.scale is not None
    clipped = jnp.clip(logratios, config.lower, config.upper)
    sign = 1.0 if chosen else -1.0
    return config.scale * jnp.exp(sign * config.mu * clipped)


def sepo_loss(
    chosen_mean: Float[Array, "*batch"],
    rejected_mean: Float[Array, "*batch"],
    *,
    beta: float,
) -> Float[Array, "*batch"]:
    """Return ``-log s(beta (mean log pi of kept chosen - of kept rejected tokens))``.

    [Selective preference optimization](https://arxiv.org/abs/2408.13518); it has no
    reference.
    """
    return -jax.nn.log_sigmoid(beta * (chosen_mean - rejected_mean))


def select_tokens(
    scores: Float[Array, "b c"], response: Int[Array, "b c"], config: SePOConfig
) -> Bool[Array, "b c"]:
    """Keep the best tokens of each chosen and the worst of each rejected response.

    Of n tokens ``ceil(share × n)`` are kept; ties keep text order.
    """
    rejected = response % 2 == 1
    worst_first = jnp.where(rejected, scores, -scores)

    def row(keys: Array, of: Array) -> Array:
        order = jnp.lexsort((keys, of))
        ranks = logps.token_positions(of[order][None])[0]
        return jnp.zeros_like(ranks).at[order].set(ranks)

    rank = jax.vmap(row)(worst_first, response)
    ones = jnp.ones(response.shape, jnp.float32)
    count = jnp.take_along_axis(
        logps.bucket_sums(ones, response, response.shape[1]),
        jnp.maximum(response, 0),
        axis=1,
    )
    share = jnp.where(rejected, config.rejected_share, config.chosen_share)
    # Rounded first: 0.3 × 10 is a little more than 3 in floating point.
    kept = jnp.maximum(jnp.ceil(jnp.round(share * count, 4)), 1)
    return (response >= 0) & (rank < kept)


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
    """
    both = chosen_mask & rejected_mask
    difference = jnp.where(both, chosen_logratios - rejected_logratios, 0.0)
    return -jax.nn.log_sigmoid(beta * difference.sum(-1))
