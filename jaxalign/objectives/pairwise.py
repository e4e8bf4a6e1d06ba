"""Objectives over whole pairs: DPO."""

import dataclasses
from typing import Any, Literal

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jaxalign.errors import UserError
from jaxalign.objectives import diagnostics
from jaxalign.objectives.policy import PairLogps, pair_logps
from jaxalign.types import Mean, Metrics, Model, PreferenceBatch


__all__ = ["DPOConfig", "dpo_loss", "logistic_loss", "loss_fn"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DPOConfig:
    """Options of DPO.

    Attributes:
      name: the objective; ``sigmoid`` is TRL's name of the same loss.
      beta: temperature; the higher, the closer to the reference.
      label_smoothing: chance that a pair is labelled the wrong way round
        (conservative DPO), in [0, 0.5].
    """

    name: Literal["dpo", "sigmoid"] = "dpo"
    beta: float = 0.1
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        check_common(self.beta, self.label_smoothing)


def check_common(beta: float, label_smoothing: float) -> None:
    """Refuse a temperature or a smoothing that makes no loss."""
    if not 0 < beta < float("inf"):
        raise UserError(f"objective.beta must be a positive number: got {beta}")
    if not 0 <= label_smoothing <= 0.5:
        raise UserError(
            f"objective.label_smoothing must lie in [0, 0.5]: got {label_smoothing}. "
            "It is the share of pairs believed to be labelled the wrong way round"
        )


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


def loss_fn(
    trainable: Any,
    frozen: Any,
    batch: PreferenceBatch,
    key: Key[Array, ""] | None,
    *,
    model: Model,
    config: DPOConfig,
    aspects: tuple[str, ...] = (),
) -> tuple[Float[Array, ""], Metrics]:
    """Return the mean DPO loss over the pairs of a batch, and the metrics.

    Args:
      trainable: the leaves to differentiate, None elsewhere (``trees.partition``).
      frozen: all the others; may hold a ``reference`` collection.
      batch: packed pairs. Scores are not read.
      key: for dropout; None runs without.
      model: the policy.
      config: options.
      aspects: not read; every objective takes it.
    """
    del aspects
    pair = pair_logps(trainable, frozen, batch, key, model=model)
    losses = pair_losses(pair, config)
    loss = Mean(jnp.where(batch.pair_mask, losses, 0).sum(), batch.pair_mask.sum())
    metrics = {"loss": loss, **diagnostics.pair_metrics(pair, batch, beta=config.beta)}
    return loss.total / jnp.maximum(loss.weight, 1), metrics


def pair_losses(pair: PairLogps, config: DPOConfig) -> Float[Array, "b p"]:
    """Return the loss of every pair of a batch, meaningless where there is none."""
    ratios = pair.logratios
    return dpo_loss(
        ratios[..., 0],
        ratios[..., 1],
        beta=config.beta,
        label_smoothing=config.label_smoothing,
    )
