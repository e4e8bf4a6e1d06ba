"""What an objective is: a record of functions and of what they need.

Each objective's module has a ``make(config, aspects) -> Objective`` that closes over
the options, so that nothing else asks which objective it is.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxalign.objectives.policy import TokenLogps
from jaxalign.types import Form, Metrics, PreferenceBatch


__all__ = [
    "Aspects",
    "Losses",
    "Needs",
    "Objective",
    "PairDetails",
    "Term",
    "WeightModels",
    "per_pair",
]

Aspects = tuple[str, ...] | None
"""Names of the last axis of ``batch.scores``; None where no data is known yet, and only
what an objective needs is looked at."""


class Needs(NamedTuple):
    """What an objective asks of data and model."""

    form: Form = "pairs"
    """What a record becomes."""
    reference: bool = True
    """Whether there is a reference at all."""
    kl: bool = False
    """Whether whole distributions are compared, so that it cannot be cached."""
    coupled: bool = False
    """Whether a loss depends on other pairs: of the step, or of an evaluation batch."""
    segments: bool = False
    """Whether records must have segments."""
    scores: bool = False
    """Whether these must have scores."""
    token_weights: bool = False
    """Whether completion tokens must have weights."""
    end_of_turn: bool = True
    """Whether completions end with their end of turn."""
    prompt: bool = False
    """Whether the prompt's tokens are learnt too."""
    ranked: bool = False
    """Whether pairs are sorted among each other, so that none has a weight of its own
    nor a loss that means something without the others."""
    max_score: float | None = None
    """Scores must lie between 0 and this; None where the scale does not matter."""


class PairDetails(NamedTuple):
    """The parts of a pair's loss that are worth looking at, segment by segment."""

    losses: Float[Array, "*batch"]
    """The segment part of the loss."""
    scores: Float[Array, "*batch 2 s"]
    """Score of each segment over all aspects, 0 where the mask is false."""
    mask: Bool[Array, "*batch 2 s"]
    """Which segments are scored."""
    weights: Float[Array, "*batch 2 s"]
    """The coefficient without beta."""
    selected: Bool[Array, "*batch 2 s"]
    """Whether the segment is in the loss."""
    num_segment_pairs: Float[Array, "*batch"]
    """Segment pairs in the loss (1 for vanilla)."""
    contradictory: Float[Array, "*batch"]
    """Candidate segment pairs whose chosen score is not above."""
    candidates: Float[Array, "*batch"]
    """Segment pairs before any was skipped."""


class Losses(NamedTuple):
    """The losses of a batch: not averaged, not masked, not weighted."""

    values: Float[Array, "b p"]
    """Of every pair (or single completion); meaningless where there is none."""
    counts: Float[Array, "b p"] | None = None
    """What each counts in the mean over a batch, where a value is a sum over so many
    tokens; None is 1."""
    segments: PairDetails | None = None
    """What it is made of, if of segments."""


def _no_metrics(tokens: TokenLogps, batch: PreferenceBatch, losses: Losses) -> Metrics:
    del tokens, batch, losses
    return {}


class Term(NamedTuple):
    """One loss, closed over its options."""

    losses: Callable[[TokenLogps, PreferenceBatch], Losses]
    metrics: Callable[[TokenLogps, PreferenceBatch, Losses], Metrics] = _no_metrics
    """Its own metrics, beside those that all objectives of its form have."""
    weight: float = 1.0
    name: str = ""
    """In a mix, what its loss is called among the metrics."""


class WeightModels(NamedTuple):
    """Two checkpoints whose log-ratio of a token becomes the token's weight."""

    positive_model: str
    negative_model: str
    weights: Callable[..., Float[Array, " n"]]
    """``(log pi+ - log pi- of a response's tokens [n], chosen=bool) -> [n]``."""

    @property
    def paths(self) -> dict[str, str]:
        """The checkpoints by their option's name."""
        return {
            "positive_model": self.positive_model,
            "negative_model": self.negative_model,
        }


class Objective(NamedTuple):
    """What is minimised: the weighted sum of the means of one or more losses."""

    needs: Needs
    terms: tuple[Term, ...]
    beta: float | None = None
    """Temperature of the rewards that are reported; None if it has no rewards."""
    weight_models: WeightModels | None = None
    """Where token weights come from, if not with the data."""


def per_pair(
    objective: Objective, tokens: TokenLogps, batch: PreferenceBatch
) -> Losses:
    """Return the loss of every pair by itself, sums over tokens divided by them.

    >>> def losses(tokens, batch):
    ...     return Losses(-tokens.policy[:, :1], counts=jnp.array([[4.0]]))
    >>> yes = jnp.ones((1, 1, 2, 1), bool)
    >>> scores, pairs = 4.0 * yes[..., None], yes[..., 0, 0]
    >>> batch = PreferenceBatch(None, None, scores, yes, pairs)
    >>> tokens = TokenLogps(jnp.array([[-2.0]]), jnp.array([[0.0]]))
    >>> per_pair(Objective(Needs(), (Term(losses),)), tokens, batch).values.tolist()
    [[0.5]]
    """
    values, segments = jnp.zeros(batch.pair_mask.shape), None
    for term in objective.terms:
        losses = term.losses(tokens, batch)
        own = losses.values
        if losses.counts is not None:
            own = own / jnp.maximum(losses.counts, 1)
        values = values + term.weight * own
        segments = segments if losses.segments is None else losses.segments
    return Losses(values, segments=segments)
