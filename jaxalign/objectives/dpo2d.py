"""2D-DPO: preference optimisation with segment × aspect feedback.

2D-DPO: Scaling Direct Preference Optimization with 2-Dimensional Supervision,
https://arxiv.org/abs/2410.19720. ``H_k`` is the sum of log pi - log pi_ref over the
tokens of segment k, ``r_k`` the segment's score (its aspects' weighted mean). The
options, the weights and the choice of segments are those of
:mod:`jaxalign.objectives.segment_choice`, and are named here too.
"""

from typing import NamedTuple

import chex
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxalign.objectives import logps
from jaxalign.objectives.aspects import aggregate_aspects, resolve_aspect_weights
from jaxalign.objectives.diagnostics import segment_metrics
from jaxalign.objectives.logistic import dpo_loss, logistic_loss
from jaxalign.objectives.policy import TokenLogps, pair_logps
from jaxalign.objectives.record import (
    Aspects,
    Losses,
    Needs,
    Objective,
    PairDetails,
    Term,
)
from jaxalign.objectives.segment_choice import (
    DPO2DConfig,
    Selection,
    segment_weights,
    select_segments,
)
from jaxalign.types import Metrics, PreferenceBatch


__all__ = [
    "DPO2DConfig",
    "Selection",
    "Side",
    "aggregate_aspects",
    "dpo2d_loss",
    "make",
    "pair_details",
    "resolve_aspect_weights",
    "segment_weights",
    "select_segments",
]


class Side(NamedTuple):
    """The segments of one response of every pair."""

    logratios: Float[Array, "*batch s"]
    """H_k: sums of log pi - log pi_ref over each segment."""
    scores: Float[Array, "*batch s"]
    """Aspect-weighted raw score r of each segment."""
    mask: Bool[Array, "*batch s"]
    """Which segments exist, are scored and own a token."""
    tokens: Float[Array, "*batch s"] | None = None
    """Tokens of each segment; only ``normalize='mean1'`` reads them."""


def pair_details(chosen: Side, rejected: Side, config: DPO2DConfig) -> PairDetails:
    """Return the loss of :func:`dpo2d_loss` with what it is made of.

    Args:
      chosen: segments of the chosen responses, [*batch, s] each.
      rejected: of the rejected ones, with as many places for segments.
      config: options; the anchors are not read.
    Example:
      >>> yes = jnp.array([True, True])
      >>> good = Side(jnp.array([1.0, 0.0]), jnp.array([4.0, 1.0]), yes)
      >>> bad = Side(jnp.array([-1.0, 0.0]), jnp.array([2.0, 0.0]), yes)
      >>> details = pair_details(good, bad, DPO2DConfig(top_k=1))
      >>> details.selected.tolist(), float(details.num_segment_pairs)
      ([[True, False], [False, True]], 1.0)
    """
    chex.assert_equal_shape([*chosen[:3], *rejected[:3]])
    weights = [
        segment_weights(
            side.scores, side.mask, rejected=bool(i), config=config, tokens=side.tokens
        )
        for i, side in enumerate((chosen, rejected))
    ]
    scores = [jnp.where(side.mask, side.scores, 0.0) for side in (chosen, rejected)]
    selection = select_segments(
        *scores, chosen_mask=chosen.mask, rejected_mask=rejected.mask, config=config
    )

    def chosen_at(values: Array) -> Array:
        return jnp.take_along_axis(values, selection.chosen, axis=-1)

    def rejected_at(values: Array) -> Array:
        return jnp.take_along_axis(values, selection.rejected, axis=-1)

    advantage_w = jnp.where(
        selection.chosen_mask, chosen_at(weights[0] * chosen.logratios), 0.0
    )
    advantage_l = jnp.where(
        selection.rejected_mask, rejected_at(weights[1] * rejected.logratios), 0.0
    )
    couple = selection.chosen_mask & selection.rejected_mask
    opposed = couple & (chosen_at(scores[0]) <= rejected_at(scores[1]))
    if config.form == "vanilla":
        logits = config.beta * (advantage_w.sum(-1) - advantage_l.sum(-1))
        losses = logistic_loss(logits, config.label_smoothing)
        count = jnp.ones_like(losses)
        keep_chosen, keep_rejected = selection.chosen_mask, selection.rejected_mask
    else:
        kept = couple & ~opposed if config.skip_contradictory else couple
        keep_chosen = keep_rejected = kept
        logits = config.beta * (advantage_w - advantage_l)
        terms = logistic_loss(logits, config.label_smoothing)
        losses = jnp.where(kept, terms, 0.0).sum(-1)
        count = kept.sum(-1).astype(losses.dtype)
        if config.reduction == "mean":
            losses = losses / jnp.maximum(count, 1)
    selected = [
        _scatter(keep_chosen, selection.chosen),
        _scatter(keep_rejected, selection.rejected),
    ]
    return PairDetails(
        losses=losses,
        scores=jnp.stack(scores, axis=-2),
        mask=jnp.stack([chosen.mask, rejected.mask], axis=-2),
        weights=jnp.stack(weights, axis=-2),
        selected=jnp.stack(selected, axis=-2),
        num_segment_pairs=count,
        contradictory=opposed.sum(-1).astype(losses.dtype),
        candidates=couple.sum(-1).astype(losses.dtype),
    )


def _scatter(keep: Array, index: Array) -> Array:
    """Turn 'position k of the selection is kept' into 'segment i is selected'."""
    return jnp.take_along_axis(keep, jnp.argsort(index, axis=-1), axis=-1)


def dpo2d_loss(
    chosen_logratios: Float[Array, "*batch s"],
    rejected_logratios: Float[Array, "*batch s"],
    chosen_scores: Float[Array, "*batch s"],
    rejected_scores: Float[Array, "*batch s"],
    *,
    chosen_mask: Bool[Array, "*batch s"],
    rejected_mask: Bool[Array, "*batch s"],
    config: DPO2DConfig,
    chosen_tokens: Float[Array, "*batch s"] | None = None,
    rejected_tokens: Float[Array, "*batch s"] | None = None,
) -> Float[Array, "*batch"]:
    """Return the 2D-DPO loss of every pair.

    Group form, over the N selected segments of each side, paired k with k::

        L = - sum_k log sigmoid(beta w_k H_k^chosen - beta w'_k H_k^rejected)

    Vanilla form, one sigmoid over the sums of the selected segments::

        L = - log sigmoid(beta sum_k w_k H_k^chosen - beta sum_k w'_k H_k^rejected)

    [2D-DPO](https://arxiv.org/abs/2410.19720), eq. 6 and the token-weighted form before
    it. The weights w and the selection are those of :func:`segment_weights` and
    :func:`select_segments`. The anchors ``dpo_weight`` and ``sft_weight`` need whole
    completions and are added by :func:`make`.

    Args:
      chosen_logratios: H_k, sums of log pi - log pi_ref over each segment.
      rejected_logratios: the same of the rejected response.
      chosen_scores: aspect-weighted raw score r of each segment, 0 to ``max_score``.
      rejected_scores: the same of the rejected response.
      chosen_mask: which segments exist, are scored and own a token.
      rejected_mask: the same of the rejected response.
      config: options.
      chosen_tokens: tokens of each segment; only ``normalize='mean1'`` reads them.
      rejected_tokens: the same of the rejected response.
    Returns:
      One loss a pair, not averaged over pairs. Where policy and reference agree it is
      N ln 2 (group, sum), ln 2 (vanilla); 0 for a pair without segment pairs (group).
    Example:
      >>> one = jnp.array([1.0]); yes = jnp.array([True])
      >>> loss = dpo2d_loss(10 * one, 0 * one, 4 * one, 4 * one, chosen_mask=yes,
      ...                   rejected_mask=yes, config=DPO2DConfig())
      >>> print(f"{loss:.4f}")  # one segment of weight 1 is DPO
      0.3133
    """
    chosen = Side(chosen_logratios, chosen_scores, chosen_mask, chosen_tokens)
    rejected = Side(rejected_logratios, rejected_scores, rejected_mask, rejected_tokens)
    return pair_details(chosen, rejected, config).losses


def make(config: DPO2DConfig, aspects: Aspects = None) -> Objective:
    """Return the objective of 2D-DPO, the anchors included.

    Raises:
      UserError: ``aspect_weights`` names an aspect that the data does not have, or the
        data has none.
    Example:
      >>> made = make(DPO2DConfig(beta=0.2), aspects=("correctness", "clarity"))
      >>> made.needs.segments, made.needs.max_score, made.beta
      (True, 4.0, 0.2)
    """
    weights = None
    if aspects is not None:
        weights = resolve_aspect_weights(config.aspect_weights, aspects)

    def losses(tokens: TokenLogps, batch: PreferenceBatch) -> Losses:
        if weights is None:
            raise ValueError("2D-DPO was made without the names of the data's aspects")
        scores = aggregate_aspects(batch.scores, jnp.asarray(weights))
        details = pair_details(*_sides(tokens, batch, scores), config)
        values = details.losses
        if config.dpo_weight or config.sft_weight:
            pair = pair_logps(tokens, batch)
            whole = pair.logratios
            nll = -pair.logps[..., 0] / jnp.maximum(pair.tokens[..., 0], 1)
            anchor = dpo_loss(whole[..., 0], whole[..., 1], beta=config.beta)
            values = values + config.dpo_weight * anchor + config.sft_weight * nll
        return Losses(values, segments=details)

    def metrics(tokens: TokenLogps, batch: PreferenceBatch, losses: Losses) -> Metrics:
        assert losses.segments is not None
        return segment_metrics(
            tokens, batch, losses.segments, beta=config.beta, aspects=aspects or ()
        )

    # Nothing else reads the top of the scale.
    scaled = config.normalize == "max" or config.rejected_weight == "inverted"
    top = config.max_score if scaled else None
    needs = Needs(segments=True, scores=True, max_score=top)
    return Objective(needs, (Term(losses, metrics),), beta=config.beta)


def _sides(
    tokens: TokenLogps, batch: PreferenceBatch, scores: Float[Array, "b p 2 s"]
) -> tuple[Side, Side]:
    """Return the segments of both responses; one that was not judged is not scored."""
    mask = batch.segment_mask & ~jnp.isnan(scores)
    shape = (scores.shape[1], scores.shape[3])
    ratios = logps.segment_sums(tokens.logratios, batch.completions, shape)
    counts = logps.segment_token_counts(batch.completions, shape)
    chosen, rejected = (
        Side(*(values[..., side, :] for values in (ratios, scores, mask, counts)))
        for side in (0, 1)
    )
    return chosen, rejected
