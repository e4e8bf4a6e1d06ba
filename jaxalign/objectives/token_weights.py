"""Objectives that tell a response's tokens apart by weights: TIS-DPO and SePO.

The weights come with the data, or from two models that like different tokens.
``h_t`` is log pi - log pi_ref of a token.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxalign.configs import check_fields
from jaxalign.errors import UserError
from jaxalign.objectives import logps
from jaxalign.objectives.options import check_common, fill
from jaxalign.objectives.policy import TokenLogps, pair_logps
from jaxalign.objectives.record import (
    Aspects,
    Losses,
    Needs,
    Objective,
    Term,
    WeightModels,
)
from jaxalign.types import PreferenceBatch


__all__ = [
    "SePOConfig",
    "TISConfig",
    "make_sepo",
    "make_tis_dpo",
    "select_tokens",
    "sepo_loss",
    "tis_dpo_loss",
    "tis_weights",
]


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

    >>> config = TISConfig(positive_model="good", negative_model="bad")
    >>> config.mu, config.lower, config.upper
    (1.0, -0.5, 1.5)
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
        check_fields(self)
        check_common(self.beta, 0.0)
        defaults = {"mu": 1.0, "lower": -0.5, "upper": 1.5, "scale": 1.0}
        if _check_models(self):
            fill(self, defaults)
        else:
            _refuse_estimation(self, tuple(defaults))
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

    >>> SePOConfig(chosen_share=0.5).rejected_share
    0.3
    """

    name: Literal["sepo"] = "sepo"
    beta: float = 1.0
    chosen_share: float = 0.3
    rejected_share: float = 0.3
    positive_model: str | None = None
    negative_model: str | None = None

    def __post_init__(self) -> None:
        check_fields(self)
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


def _refuse_estimation(config: TISConfig, fields: tuple[str, ...]) -> None:
    for field in fields:
        value = getattr(config, field)
        if value is not None:
            raise UserError(
                f"objective.{field} has no effect without objective.positive_model "
                f"and negative_model, as the data gives the weights: got {value}"
            )


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
    Example:
      >>> import jax.numpy as jnp
      >>> loss = tis_dpo_loss(jnp.array(12.0), jnp.array(2.0), beta=0.1)
      >>> print(f"{loss:.4f}")  # -log s(1)
      0.3133
    """
    chex.assert_equal_shape([chosen_weighted, rejected_weighted])
    return -jax.nn.log_sigmoid(beta * (chosen_weighted - rejected_weighted))


def tis_weights(
    logratios: Float[Array, "*n"], *, chosen: bool, config: TISConfig
) -> Float[Array, "*n"]:
    """Return ``scale exp(±mu clip(log pi+ - log pi-, lower, upper))`` of every token.

    Plus for chosen responses, minus for rejected ones, whose low-reward tokens are
    then the important ones ([TIS-DPO](https://arxiv.org/abs/2410.04350), eq. 10).

    >>> import jax.numpy as jnp
    >>> config = TISConfig(positive_model="good", negative_model="bad", mu=1.0)
    >>> weights = tis_weights(jnp.array([0.0, 0.5]), chosen=False, config=config)
    >>> print([f"{w / weights[0]:.4f}" for w in weights])  # exp(-mu clip(0.5))
    ['1.0000', '0.6065']
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

    >>> import jax.numpy as jnp
    >>> loss = sepo_loss(jnp.array(-1.0), jnp.array(-2.0), beta=1.0)
    >>> print(f"{loss:.4f}")  # -log s(1)
    0.3133
    """
    chex.assert_equal_shape([chosen_mean, rejected_mean])
    return -jax.nn.log_sigmoid(beta * (chosen_mean - rejected_mean))


def select_tokens(
    scores: Float[Array, "b c"], response: Int[Array, "b c"], config: SePOConfig
) -> Bool[Array, "b c"]:
    """Keep the best tokens of each chosen and the worst of each rejected response.

    Of n tokens ``ceil(share × n)`` are kept; ties keep text order.

    >>> import jax.numpy as jnp
    >>> scores = jnp.array([[3.0, 1.0, 2.0, 5.0, 4.0]])
    >>> response = jnp.array([[0, 0, 0, 1, 1]])  # three chosen tokens, two rejected
    >>> config = SePOConfig(chosen_share=0.5, rejected_share=0.5)
    >>> select_tokens(scores, response, config).tolist()
    [[True, False, True, False, True]]
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


def make_tis_dpo(config: TISConfig, aspects: Aspects = None) -> Objective:
    """Return the objective of TIS-DPO.

    >>> make_tis_dpo(TISConfig()).needs.reference
    True
    """
    del aspects

    def losses(tokens: TokenLogps, batch: PreferenceBatch) -> Losses:
        ratios = pair_logps(tokens, batch, _token_weights(batch)).logratios
        return Losses(tis_dpo_loss(ratios[..., 0], ratios[..., 1], beta=config.beta))

    weights = functools.partial(tis_weights, config=config)
    return Objective(
        Needs(token_weights=True),
        (Term(losses),),
        beta=config.beta,
        weight_models=_weight_models(config, weights),
    )


def make_sepo(config: SePOConfig, aspects: Aspects = None) -> Objective:
    """Return the objective of SePO.

    >>> make_sepo(SePOConfig()).needs.token_weights
    True
    """
    del aspects

    def losses(tokens: TokenLogps, batch: PreferenceBatch) -> Losses:
        mine, pairs = batch.completions, batch.pair_mask.shape[1]
        kept = select_tokens(_token_weights(batch), mine.response, config)
        sums = logps.response_sums(jnp.where(kept, tokens.policy, 0.0), mine, pairs)
        counts = logps.response_sums(kept.astype(jnp.float32), mine, pairs)
        means = sums / jnp.maximum(counts, 1)
        return Losses(sepo_loss(means[..., 0], means[..., 1], beta=config.beta))

    return Objective(
        Needs(reference=False, token_weights=True),
        (Term(losses),),
        beta=config.beta,
        weight_models=_weight_models(config, lambda logratios, *, chosen: logratios),
    )


def _token_weights(batch: PreferenceBatch) -> Float[Array, "b c"]:
    if batch.token_weights is None:
        raise ValueError(
            "the objective needs a weight for every completion token: give the records "
            "chosen_token_weights and rejected_token_weights, or the batch "
            "token_weights"
        )
    return batch.token_weights


def _weight_models(
    config: TISConfig | SePOConfig, weights: Callable[..., Array]
) -> WeightModels | None:
    if config.positive_model is None or config.negative_model is None:
        return None
    return WeightModels(config.positive_model, config.negative_model, weights)
