"""2D-DPO: preference optimisation with segment × aspect feedback.

2D-DPO: Scaling Direct Preference Optimization with 2-Dimensional Supervision,
https://arxiv.org/abs/2410.19720. ``H_k`` is the sum of log pi - log pi_ref over the
tokens of segment k, ``r_k`` the segment's score (its aspects' weighted mean).
"""

import dataclasses
from typing import Literal, NamedTuple

import chex
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxalign.configs import check_fields
from jaxalign.errors import UserError
from jaxalign.objectives import logps
from jaxalign.objectives.aspects import (
    aggregate_aspects,
    check_aspect_weights,
    resolve_aspect_weights,
)
from jaxalign.objectives.diagnostics import segment_metrics
from jaxalign.objectives.logistic import dpo_loss, logistic_loss
from jaxalign.objectives.options import check_common
from jaxalign.objectives.policy import TokenLogps, pair_logps
from jaxalign.objectives.record import (
    Aspects,
    Losses,
    Needs,
    Objective,
    PairDetails,
    Term,
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class DPO2DConfig:
    """Options of 2D-DPO.

    Attributes:
      name: the objective.
      beta: temperature; a segment's effective temperature is beta × its weight.
      aspect_weights: weight of each aspect by name; they are divided by their sum, an
        aspect left out weighs 0. Default: every aspect of the data weighs the same.
      form: ``group`` has one sigmoid for each pair of segments (eq. 6), ``vanilla``
        one for the weighted sums of all segments.
      top_k: at most this many segment pairs (group) or segments a side (vanilla).
      pairing: group only: ``rank`` pairs the k-th best chosen with the k-th worst
        rejected segment, ``order`` pairs the selected ones in text order.
      max_score: top of the scale of the scores, which starts at 0.
      normalize: ``max`` divides scores by max_score, ``none`` keeps them, ``mean1``
        makes the token-weighted mean weight of each response 1, so that beta keeps
        the meaning it has in DPO.
      rejected_weight: weight of a rejected segment of score r: ``score`` r (the
        paper's), ``inverted`` top - r, ``uniform`` 1, ``centred`` mean(r) - r.
      reduction: group only: ``sum`` or ``mean`` over the segment pairs of a pair.
      label_smoothing: in [0, 0.5], applied to every segment pair.
      skip_contradictory: group only: drop segment pairs whose chosen score is not
        above the rejected one.
      dpo_weight: weight of DPO of the whole pair at the same beta, added on.
      sft_weight: weight of -log pi(chosen) / tokens, added on.
    """

    name: Literal["dpo2d"] = "dpo2d"
    beta: float = 0.1
    aspect_weights: dict[str, float] | None = dataclasses.field(
        default=None, hash=False
    )
    form: Literal["group", "vanilla"] = "group"
    top_k: int | None = None
    pairing: Literal["rank", "order"] = "rank"
    max_score: float = 4.0
    normalize: Literal["max", "none", "mean1"] = "max"
    rejected_weight: Literal["score", "inverted", "uniform", "centred"] = "score"
    reduction: Literal["sum", "mean"] = "sum"
    label_smoothing: float = 0.0
    skip_contradictory: bool = False
    dpo_weight: float = 0.0
    sft_weight: float = 0.0

    def __post_init__(self) -> None:
        check_fields(self)
        check_common(self.beta, self.label_smoothing)
        if self.top_k is not None and self.top_k < 1:
            raise UserError(
                f"objective.top_k must be at least 1: got {self.top_k}. "
                "Leave it out to use as many segments as the shorter side has"
            )
        if not 0 < self.max_score < float("inf"):
            raise UserError(
                f"objective.max_score must be a positive number: got {self.max_score}"
            )
        for field in ("dpo_weight", "sft_weight"):
            if not 0 <= getattr(self, field) < float("inf"):
                got = getattr(self, field)
                what = "must be 0 or a positive number"
                raise UserError(f"objective.{field} {what}: got {got}")
        if self.form == "vanilla":
            group = {"skip_contradictory": False, "pairing": "rank", "reduction": "sum"}
            for field, default in group.items():
                if getattr(self, field) != default:
                    raise UserError(
                        f"objective.{field}={getattr(self, field)!r} has no effect "
                        "with form=vanilla, which pairs no segments: leave it out or "
                        "use form=group"
                    )
        if self.aspect_weights is not None:
            check_aspect_weights(self.aspect_weights)


def segment_weights(
    scores: Float[Array, "*batch s"],
    mask: Bool[Array, "*batch s"],
    *,
    rejected: bool,
    config: DPO2DConfig,
    tokens: Float[Array, "*batch s"] | None = None,
) -> Float[Array, "*batch s"]:
    """Return the coefficient of each segment's log-ratio, without beta.

    In this order: normalise the scores, map the rejected side (``inverted``: top - r;
    ``uniform``: 1; ``centred``: mean over the response - r), then for ``mean1`` divide
    by the token-weighted mean over the response (a mean of 0 gives weights 1).

    Args:
      scores: raw aggregated score r of each segment.
      mask: which segments are scored.
      rejected: which side this is; chosen segments always weigh r.
      config: ``normalize``, ``max_score`` and ``rejected_weight`` are read.
      tokens: tokens of each segment; needed for ``mean1``.
    Returns:
      Weights, 0 where the mask is false.
    """
    top = 1.0 if config.normalize == "max" else config.max_score
    r = jnp.where(mask, scores, 0.0)
    if config.normalize == "max":
        r = r / config.max_score
    weights = r
    if rejected and config.rejected_weight == "inverted":
        weights = top - r
    elif rejected and config.rejected_weight == "uniform":
        weights = jnp.ones_like(r)
    elif rejected and config.rejected_weight == "centred":
        count = jnp.maximum(mask.sum(-1, keepdims=True), 1)
        weights = r.sum(-1, keepdims=True) / count - r
    weights = jnp.where(mask, weights, 0.0)
    if config.normalize == "mean1":
        if tokens is None:
            raise ValueError("normalize='mean1' needs the tokens of each segment")
        share = jnp.where(mask, tokens, 0.0)
        total = share.sum(-1, keepdims=True)
        mean = (weights * share).sum(-1, keepdims=True) / jnp.maximum(total, 1.0)
        # Centred weights of equal scores cancel only up to rounding.
        none = jnp.abs(mean) <= 1e-6 * config.max_score
        weights = jnp.where(none, 1.0, weights / jnp.where(none, 1.0, mean))
        weights = jnp.where(mask, weights, 0.0)
    return weights


class Selection(NamedTuple):
    """Which segments a pair trains on.

    ``chosen`` and ``rejected`` list segment indices, position k of the one paired with
    position k of the other in the group form; the masks say which positions count.
    """

    chosen: Array
    rejected: Array
    chosen_mask: Array
    rejected_mask: Array


def select_segments(
    chosen_scores: Float[Array, "*batch s"],
    rejected_scores: Float[Array, "*batch s"],
    *,
    chosen_mask: Bool[Array, "*batch s"],
    rejected_mask: Bool[Array, "*batch s"],
    config: DPO2DConfig,
) -> Selection:
    """Choose the best chosen and the worst rejected segments by raw score.

    Group: ``N = min(scored chosen, scored rejected, top_k)`` of each side. Vanilla:
    all, or ``top_k`` a side. Ties keep text order (the sort is stable).
    """
    size = chosen_scores.shape[-1]
    # Unscored segments go last.
    best = jnp.argsort(jnp.where(chosen_mask, -chosen_scores, jnp.inf), axis=-1)
    worst = jnp.argsort(jnp.where(rejected_mask, rejected_scores, jnp.inf), axis=-1)
    num_chosen = chosen_mask.sum(-1)
    num_rejected = rejected_mask.sum(-1)
    if config.form == "group":
        num_chosen = num_rejected = jnp.minimum(num_chosen, num_rejected)
    if config.top_k is not None:
        num_chosen = jnp.minimum(num_chosen, config.top_k)
        num_rejected = jnp.minimum(num_rejected, config.top_k)
    position = jnp.broadcast_to(jnp.arange(size), chosen_mask.shape)
    keep_chosen = position < num_chosen[..., None]
    keep_rejected = position < num_rejected[..., None]
    if config.pairing == "order":
        best = jnp.sort(jnp.where(keep_chosen, best, best + size), axis=-1) % size
        worst = jnp.sort(jnp.where(keep_rejected, worst, worst + size), axis=-1) % size
    return Selection(best, worst, keep_chosen, keep_rejected)


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
    """Return the loss of :func:`dpo2d_loss` with what it is made of."""
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
