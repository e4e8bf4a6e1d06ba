"""Objectives over single completions with a label: KTO and BCO."""

import dataclasses
from typing import Literal

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxalign.configs import check_fields
from jaxalign.errors import UserError
from jaxalign.objectives.diagnostics import mismatched_kl
from jaxalign.objectives.options import check_common
from jaxalign.objectives.policy import TokenLogps, pair_logps
from jaxalign.objectives.record import Aspects, Losses, Needs, Objective, Term
from jaxalign.types import PreferenceBatch


__all__ = ["BCOConfig", "KTOConfig", "bco_loss", "kto_loss", "make_bco", "make_kto"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class KTOConfig:
    """Options of KTO.

    Attributes:
      name: the objective.
      beta: temperature.
      desirable_weight: weight of desirable completions.
      undesirable_weight: weight of undesirable ones.

    >>> KTOConfig(undesirable_weight=1.5).desirable_weight
    1.0
    """

    name: Literal["kto"] = "kto"
    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    def __post_init__(self) -> None:
        check_fields(self)
        check_common(self.beta, 0.0)
        for field in ("desirable_weight", "undesirable_weight"):
            if not 0 <= getattr(self, field) < float("inf"):
                raise UserError(
                    f"objective.{field} must be at least 0: got {getattr(self, field)}"
                )


@dataclasses.dataclass(frozen=True, kw_only=True)
class BCOConfig:
    """Options of BCO.

    Attributes:
      name: the objective.
      beta: temperature.

    >>> BCOConfig().beta
    0.1
    """

    name: Literal["bco"] = "bco"
    beta: float = 0.1

    def __post_init__(self) -> None:
        check_fields(self)
        check_common(self.beta, 0.0)


def kto_loss(
    logratios: Float[Array, "*batch"],
    labels: Bool[Array, "*batch"],
    kl: Float[Array, ""],
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Float[Array, "*batch"]:
    """Return the KTO loss of every completion.

    ``w_D (1 - s(beta (H - z0)))`` for a desirable completion and
    ``w_U (1 - s(beta (z0 - H)))`` for an undesirable one, with the constant
    ``z0 = max(0, mean H of mismatched prompts and completions)``.
    [KTO](https://arxiv.org/abs/2402.01306), eq. 8.

    Args:
      logratios: H of each completion.
      labels: whether it is desirable.
      kl: mean of H over the mismatched completions of the whole batch; it gets no
        gradient.
      beta: temperature.
      desirable_weight: w_D.
      undesirable_weight: w_U.
    Returns:
      One loss a completion; not averaged, not masked.
    Example:
      >>> import jax.numpy as jnp
      >>> two = jnp.array([10.0, -10.0])
      >>> loss = kto_loss(two, jnp.array([True, False]), jnp.array(0.0), beta=0.1)
      >>> print([f"{x:.4f}" for x in loss])  # 1 - s(1) of either
      ['0.2689', '0.2689']
    """
    chex.assert_equal_shape([logratios, labels])
    anchor = jax.lax.stop_gradient(jnp.maximum(kl, 0.0))
    better = jnp.where(labels, 1.0, -1.0) * (logratios - anchor)
    weight = jnp.where(labels, desirable_weight, undesirable_weight)
    return weight * jax.nn.sigmoid(-beta * better)


def bco_loss(
    logratios: Float[Array, "*batch"],
    labels: Bool[Array, "*batch"],
    *,
    beta: float,
    mask: Bool[Array, "*batch"] | None = None,
) -> Float[Array, "*batch"]:
    """Return the BCO loss of every completion.

    ``-log s(r - delta)`` for a desirable and ``-log s(-(r - delta))`` for an
    undesirable one, with rewards ``r = beta H`` and the constant
    ``delta = (mean r of the desirable + mean r of the undesirable) / 2`` over the batch
    (of one kind alone where the other is missing).
    [Binary classifier optimization](https://arxiv.org/abs/2404.04656), eq. 11.

    Args:
      logratios: H of each completion.
      labels: whether it is desirable.
      beta: temperature.
      mask: which completions exist.
    Returns:
      One loss a completion; not averaged, not masked.
    Example:
      >>> import jax.numpy as jnp
      >>> two = jnp.array([10.0, -10.0])
      >>> loss = bco_loss(two, jnp.array([True, False]), beta=0.1)
      >>> print([f"{x:.4f}" for x in loss])  # delta = 0: -log s(1) of either
      ['0.3133', '0.3133']
    """
    chex.assert_equal_shape([logratios, labels])
    rewards = beta * logratios
    there = jnp.ones(labels.shape, bool) if mask is None else mask

    def mean(of: Array) -> tuple[Array, Array]:
        count = of.sum()
        total = jnp.where(of, rewards, 0.0).sum()
        return total / jnp.maximum(count, 1), count > 0

    good, any_good = mean(labels & there)
    bad, any_bad = mean(~labels & there)
    kinds = any_good.astype(jnp.float32) + any_bad.astype(jnp.float32)
    delta = jax.lax.stop_gradient((good + bad) / jnp.maximum(kinds, 1))
    better = jnp.where(labels, 1.0, -1.0) * (rewards - delta)
    return -jax.nn.log_sigmoid(better)


def make_kto(config: KTOConfig, aspects: Aspects = None) -> Objective:
    """Return the objective of KTO.

    >>> make_kto(KTOConfig()).needs.form
    'labelled_kl'
    """
    del aspects
    needs = Needs(form="labelled_kl", coupled=True)

    def losses(tokens: TokenLogps, batch: PreferenceBatch) -> Losses:
        pair = pair_logps(tokens, batch)
        values = kto_loss(
            pair.logratios[..., 0],
            _labels(batch, config.name, needs),
            mismatched_kl(pair, batch).value,
            beta=config.beta,
            desirable_weight=config.desirable_weight,
            undesirable_weight=config.undesirable_weight,
        )
        return Losses(values)

    return Objective(needs, (Term(losses),), beta=config.beta)


def make_bco(config: BCOConfig, aspects: Aspects = None) -> Objective:
    """Return the objective of BCO.

    >>> make_bco(BCOConfig()).needs.form
    'labelled'
    """
    del aspects
    needs = Needs(form="labelled", coupled=True)

    def losses(tokens: TokenLogps, batch: PreferenceBatch) -> Losses:
        values = bco_loss(
            pair_logps(tokens, batch).logratios[..., 0],
            _labels(batch, config.name, needs),
            beta=config.beta,
            mask=batch.pair_mask,
        )
        return Losses(values)

    return Objective(needs, (Term(losses),), beta=config.beta)


def _labels(batch: PreferenceBatch, name: str, needs: Needs) -> Bool[Array, "b p"]:
    if batch.labels is None:
        raise ValueError(
            f"{name} needs labelled completions: prepare the records with "
            f"form={needs.form!r}"
        )
    return batch.labels
