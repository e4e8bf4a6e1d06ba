"""Aspects of a segment's score: their weights, and one score made of all."""

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxalign.errors import UserError, did_you_mean


__all__ = ["aggregate_aspects", "check_aspect_weights", "resolve_aspect_weights"]


def check_aspect_weights(weights: Mapping[str, float]) -> None:
    """Refuse weights that are negative, not finite, or all 0.

    >>> check_aspect_weights({"helpfulness": 1.0, "safety": 3.0})
    """
    for name, weight in weights.items():
        if not 0 <= weight < float("inf"):
            raise UserError(
                f"objective.aspect_weights.{name} must be 0 or a positive number: "
                f"got {weight}"
            )
    if sum(weights.values()) <= 0:
        raise UserError(
            f"objective.aspect_weights must not all be 0: got {dict(weights)}"
        )


def resolve_aspect_weights(
    weights: Mapping[str, float] | None, aspects: tuple[str, ...]
) -> np.ndarray:
    """Return the weight of each aspect of the data, divided by their sum.

    Raises:
      UserError: a weight names an aspect that the data does not have.
    Example:
      >>> resolve_aspect_weights({"safety": 3.0, "clarity": 1.0}, ("clarity", "safety"))
      array([0.25, 0.75], dtype=float32)
    """
    if not aspects:
        raise UserError(
            "the data has no scored segments, which dpo2d needs: add "
            "chosen_segments and rejected_segments to the records, each with scores "
            "by aspect (`jaxalign judge` gives segments theirs), or use "
            "objective.name=dpo"
        )
    if weights is None:
        return np.full(len(aspects), 1 / len(aspects), np.float32)
    check_aspect_weights(weights)
    for name in weights:
        if name not in aspects:
            raise UserError(
                f"objective.aspect_weights names the aspect {name!r}, which no record "
                f"has. {did_you_mean(name, aspects)}"
            )
    raw = np.array([weights.get(name, 0.0) for name in aspects], np.float64)
    return (raw / raw.sum()).astype(np.float32)


def aggregate_aspects(
    scores: Float[Array, "*batch a"], weights: Float[Array, " a"]
) -> Float[Array, "*batch"]:
    """Return ``r = sum_a w_a score_a / sum_a w_a`` over the aspects that were judged.

    A score of NaN is an aspect that was not judged. Where none of the weighted ones
    was, the result is NaN.

    >>> scores = jnp.array([[4.0, 2.0], [4.0, jnp.nan]])  # the second aspect not judged
    >>> aggregate_aspects(scores, jnp.array([1.0, 3.0])).tolist()
    [2.5, 4.0]
    """
    judged = ~jnp.isnan(scores)
    weight = jnp.where(judged, weights, 0.0)
    total = jnp.where(judged, scores, 0.0) * weight
    return total.sum(-1) / jnp.where(weight.sum(-1) > 0, weight.sum(-1), jnp.nan)
