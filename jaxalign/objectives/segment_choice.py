"""Which segments 2D-DPO trains on, and how much each of them weighs.

2D-DPO: Scaling Direct Preference Optimization with 2-Dimensional Supervision,
https://arxiv.org/abs/2410.19720. ``r`` is a segment's score, its aspects' weighted
mean. The loss that is made of them is in :mod:`jaxalign.objectives.dpo2d`.
"""

import dataclasses
from typing import Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxalign.configs import check_fields
from jaxalign.errors import UserError
from jaxalign.objectives.aspects import check_aspect_weights
from jaxalign.objectives.options import check_common


__all__ = ["DPO2DConfig", "Selection", "segment_weights", "select_segments"]


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

    >>> DPO2DConfig(aspect_weights={"correctness": 3.0, "clarity": 1.0}, top_k=2).beta
    0.1
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
    Example:
      >>> scores, mask = jnp.array([4.0, 1.0, 2.0]), jnp.array([True, True, False])
      >>> config = DPO2DConfig(rejected_weight="inverted")
      >>> segment_weights(scores, mask, rejected=False, config=config).tolist()  # r / 4
      [1.0, 0.25, 0.0]
      >>> segment_weights(scores, mask, rejected=True, config=config).tolist()
      [0.0, 0.75, 0.0]
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

    >>> yes = jnp.ones(3, bool)
    >>> found = select_segments(
    ...     *(jnp.array([1.0, 4.0, 2.0]), jnp.array([3.0, 0.0, 2.0])),
    ...     chosen_mask=yes, rejected_mask=yes, config=DPO2DConfig(top_k=2))
    >>> found.chosen[found.chosen_mask].tolist()  # the best first
    [1, 2]
    >>> found.rejected[found.rejected_mask].tolist()  # the worst first
    [1, 2]
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
