"""What a person needs to see of a preference run, as sums that merge exactly."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxalign.objectives import logps
from jaxalign.objectives.policy import PairLogps
from jaxalign.types import Mean, Metrics, PreferenceBatch


__all__ = ["masked_mean", "pair_metrics", "segment_metrics"]


def masked_mean(values: Float[Array, "*n"], mask: Bool[Array, "*n"]) -> Mean:
    """Return the mean over the places where the mask is true."""
    return Mean(jnp.where(mask, values, 0.0).sum(), mask.astype(jnp.float32).sum())


def pair_metrics(pair: PairLogps, batch: PreferenceBatch, *, beta: float) -> Metrics:
    """Return the metrics of whole pairs under TRL's names.

    ``rewards/*`` are beta × (log pi - log pi_ref) of whole completions, whatever the
    objective; a tie counts as not accurate. ``logps/chosen_drop`` is how far the
    chosen responses have fallen below the reference, in nats a response.
    """
    mask = batch.pair_mask
    rewards = beta * pair.logratios
    margins = rewards[..., 0] - rewards[..., 1]
    return {
        "rewards/chosen": masked_mean(rewards[..., 0], mask),
        "rewards/rejected": masked_mean(rewards[..., 1], mask),
        "rewards/margins": masked_mean(margins, mask),
        "rewards/accuracies": masked_mean((margins > 0).astype(jnp.float32), mask),
        "logps/chosen": masked_mean(pair.logps[..., 0], mask),
        "logps/rejected": masked_mean(pair.logps[..., 1], mask),
        "logps/chosen_drop": masked_mean(-pair.logratios[..., 0], mask),
        "tokens/chosen": masked_mean(pair.tokens[..., 0], mask),
        "tokens/rejected": masked_mean(pair.tokens[..., 1], mask),
    }


def segment_metrics(
    pair: PairLogps,
    batch: PreferenceBatch,
    *,
    scores: Float[Array, "b p 2 s"],
    mask: Bool[Array, "b p 2 s"],
    weights: Float[Array, "b p 2 s"],
    selected: Bool[Array, "b p 2 s"],
    losses: Float[Array, "b p"],
    num_segment_pairs: Float[Array, "b p"],
    contradictory: Float[Array, "b p"],
    candidates: Float[Array, "b p"],
    beta: float,
    tolerance: float = 1e-6,
) -> Metrics:
    """Return the metrics of segments.

    ``segments/accuracy``: of all couples of one scored chosen and one scored rejected
    segment whose scores differ, the share that the learned reward per token
    ``beta H_k / l_k`` orders as the scores do (0.5 is chance; a tie counts half).
    ``segments/margins``: mean of (better - worse) over the same couples.
    ``segments/coverage_*``: share of completion tokens that get a gradient.
    """
    shape = (scores.shape[1], scores.shape[3])
    mask = mask & batch.pair_mask[..., None, None]
    tokens = logps.segment_token_counts(batch.completions, shape)
    ratios = logps.segment_sums(
        pair.token_logps - pair.ref_token_logps, batch.completions, shape
    )
    per_token = beta * ratios / jnp.maximum(tokens, 1)

    gap = scores[..., 0, :, None] - scores[..., 1, None, :]
    learned = per_token[..., 0, :, None] - per_token[..., 1, None, :]
    couples = mask[..., 0, :, None] & mask[..., 1, None, :] & (jnp.abs(gap) > tolerance)
    agreed = jnp.where(
        jnp.abs(learned) <= tolerance, 0.5, (learned * gap > 0).astype(jnp.float32)
    )

    used = selected & (jnp.abs(weights) > tolerance) & mask
    in_pair = batch.pair_mask
    covered = jnp.where(used, tokens, 0).sum(-1)
    per_pair = losses / jnp.maximum(num_segment_pairs, 1)
    with_pairs = in_pair & (num_segment_pairs > 0)
    return {
        "segments/accuracy": masked_mean(agreed, couples),
        "segments/margins": masked_mean(learned * jnp.sign(gap), couples),
        "segments/loss_per_pair": masked_mean(per_pair, with_pairs),
        "segments/pairs_per_example": masked_mean(num_segment_pairs, in_pair),
        "segments/coverage_chosen": _share(
            covered[..., 0], pair.tokens[..., 0], in_pair
        ),
        "segments/coverage_rejected": _share(
            covered[..., 1], pair.tokens[..., 1], in_pair
        ),
        "segments/weight": masked_mean(weights, selected & mask),
        "segments/zero_weights": masked_mean(
            (jnp.abs(weights) <= tolerance).astype(jnp.float32), selected & mask
        ),
        "segments/contradictory": Mean(
            jnp.where(in_pair, contradictory, 0).sum(),
            jnp.where(in_pair, candidates, 0).sum(),
        ),
        "segments/unscored_pairs": masked_mean(
            (~mask.any(-1).all(-1)).astype(jnp.float32), in_pair
        ),
    }


def _share(
    part: Float[Array, "b p"], whole: Float[Array, "b p"], mask: Bool[Array, "b p"]
) -> Mean:
    return Mean(jnp.where(mask, part, 0).sum(), jnp.where(mask, whole, 0).sum())
