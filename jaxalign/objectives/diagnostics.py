"""What a person needs to see of a preference run, as sums that merge exactly."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxalign.objectives import logps
from jaxalign.objectives.policy import PairLogps, TokenLogps, pair_logps
from jaxalign.objectives.record import PairDetails
from jaxalign.types import Completions, Mean, Metrics, PreferenceBatch


__all__ = [
    "completion_metrics",
    "label_metrics",
    "masked_mean",
    "mismatched_kl",
    "pair_metrics",
    "segment_metrics",
]


def masked_mean(values: Float[Array, "*n"], mask: Bool[Array, "*n"]) -> Mean:
    """Return the mean over the places where the mask is true.

    >>> mean = masked_mean(jnp.array([1.0, 3.0, 9.0]), jnp.array([True, True, False]))
    >>> float(mean.value)
    2.0
    """
    return Mean(jnp.where(mask, values, 0.0).sum(), mask.astype(jnp.float32).sum())


def pair_metrics(
    tokens: TokenLogps, batch: PreferenceBatch, *, beta: float, reference: bool = True
) -> Metrics:
    """Return the metrics of whole pairs under TRL's names.

    ``rewards/*`` are beta × (log pi - log pi_ref) of whole completions, whatever the
    objective (beta × log pi without a reference); a tie counts as not accurate.
    ``rewards/longer_preferred`` is how often the longer response has the higher reward,
    beside ``tokens/longer_chosen``, how often it should. ``logps/chosen_drop`` is how
    far the chosen responses have fallen below the reference, in nats a response.
    ``kl/data`` estimates KL(pi_ref || pi) a token on the data's completions,
    ``mean(exp(h) - 1 - h)`` with h = log pi - log pi_ref, capped at 20
    (http://joschu.net/blog/kl-approx.html, k3).

    Returns:
      Means over the pairs of the batch, see ``types.Mean``; padding counts nothing.
    Example:
      >>> answers = Completions(*[jnp.array([[0, 0, 1]])] * 4)  # 2 + 1 tokens
      >>> yes = jnp.ones((1, 1, 2, 1), bool)
      >>> scores, pairs = 4.0 * yes[..., None], yes[..., 0, 0]
      >>> batch = PreferenceBatch(None, answers, scores, yes, pairs)
      >>> policy = jnp.array([[-1.0, -1.0, -6.0]])
      >>> tokens = TokenLogps(policy, jnp.array([[-2.0, -1.0, -4.0]]))
      >>> found = pair_metrics(tokens, batch, beta=0.5)
      >>> float(found["rewards/margins"].value), float(found["logps/chosen_drop"].value)
      (1.5, -1.0)
    """
    pair = pair_logps(tokens, batch)
    mask = batch.pair_mask
    rewards = beta * pair.logratios
    margins = rewards[..., 0] - rewards[..., 1]
    longer = pair.tokens[..., 0] - pair.tokens[..., 1]
    unequal = mask & (longer != 0)
    against_reference = {
        "logps/chosen_drop": masked_mean(-pair.logratios[..., 0], mask),
        "kl/data": _kl_on_data(tokens, batch),
    }
    return {
        "rewards/chosen": masked_mean(rewards[..., 0], mask),
        "rewards/rejected": masked_mean(rewards[..., 1], mask),
        "rewards/margins": masked_mean(margins, mask),
        "rewards/accuracies": masked_mean(_as_float(margins > 0), mask),
        "rewards/longer_preferred": masked_mean(
            jnp.where(margins == 0, 0.5, _as_float(margins * longer > 0)), unequal
        ),
        "logps/chosen": masked_mean(pair.logps[..., 0], mask),
        "logps/rejected": masked_mean(pair.logps[..., 1], mask),
        "tokens/chosen": masked_mean(pair.tokens[..., 0], mask),
        "tokens/rejected": masked_mean(pair.tokens[..., 1], mask),
        "tokens/longer_chosen": masked_mean(_as_float(longer > 0), unequal),
        **(against_reference if reference else {}),
    }


def label_metrics(
    tokens: TokenLogps, batch: PreferenceBatch, *, beta: float
) -> Metrics:
    """Return the metrics of single completions under TRL's names.

    ``chosen`` are the desirable, ``rejected`` the undesirable ones; the accuracy is the
    share whose reward has the sign of its label. ``kl`` is the estimate of KTO.

    >>> answers = Completions(*[jnp.array([[0, 0]])] * 4)  # one completion of 2 tokens
    >>> yes = jnp.ones((1, 1, 2, 1), bool)
    >>> scores, pairs = 4.0 * yes[..., None], yes[..., 0, 0]
    >>> batch = PreferenceBatch(None, answers, scores, yes, pairs)
    >>> batch = batch._replace(labels=jnp.array([[True]]))
    >>> tokens = TokenLogps(jnp.array([[-1.0, -1.0]]), jnp.array([[-2.0, -1.0]]))
    >>> found = label_metrics(tokens, batch, beta=0.5)
    >>> float(found["rewards/chosen"].value), float(found["rewards/accuracies"].value)
    (0.5, 1.0)
    """
    assert batch.labels is not None
    pair = pair_logps(tokens, batch)
    rewards = beta * pair.logratios[..., 0]
    good, bad = batch.pair_mask & batch.labels, batch.pair_mask & ~batch.labels
    right = jnp.where(batch.labels, rewards > 0, rewards < 0)
    return {
        "rewards/chosen": masked_mean(rewards, good),
        "rewards/rejected": masked_mean(rewards, bad),
        "rewards/accuracies": masked_mean(_as_float(right), batch.pair_mask),
        "logps/chosen": masked_mean(pair.logps[..., 0], good),
        "logps/rejected": masked_mean(pair.logps[..., 0], bad),
        "logps/chosen_drop": masked_mean(-pair.logratios[..., 0], good),
        "tokens/chosen": masked_mean(pair.tokens[..., 0], good),
        "tokens/rejected": masked_mean(pair.tokens[..., 0], bad),
        "kl": mismatched_kl(pair, batch),
        "kl/data": _kl_on_data(tokens, batch),
    }


def mismatched_kl(pair: PairLogps, batch: PreferenceBatch) -> Mean:
    """Return KTO's estimate of the KL to the reference: H of mismatched completions.

    Args:
      pair: sums; the second response of each is a completion of another prompt.
      batch: what they are of; where the second response is empty it does not count.
    Example:
      >>> sums = jnp.array([[[-3.0, -1.0]]]), jnp.array([[[-3.0, -1.5]]])
      >>> yes = jnp.ones((1, 1, 2, 1), bool)
      >>> scores, pairs = 4.0 * yes[..., None], yes[..., 0, 0]
      >>> batch = PreferenceBatch(None, None, scores, yes, pairs)
      >>> pair = PairLogps(*sums, tokens=jnp.array([[[2.0, 1.0]]]))
      >>> float(mismatched_kl(pair, batch).value)
      0.5
    """
    mismatched = batch.pair_mask & (pair.tokens[..., 1] > 0)
    return masked_mean(pair.logratios[..., 1], mismatched)


def completion_metrics(tokens: TokenLogps, batch: PreferenceBatch) -> Metrics:
    """Return the metrics of supervised fine-tuning.

    ``logps/chosen`` is the log-probability of a completion in nats, ``tokens/chosen``
    its length.

    >>> answers = Completions(*[jnp.array([[0, 0]])] * 4)  # one completion of 2 tokens
    >>> yes = jnp.ones((1, 1, 2, 1), bool)
    >>> scores, pairs = 4.0 * yes[..., None], yes[..., 0, 0]
    >>> batch = PreferenceBatch(None, answers, scores, yes, pairs)
    >>> policy = jnp.array([[-1.0, -0.5]])
    >>> found = completion_metrics(TokenLogps(policy, 0 * policy), batch)
    >>> {name: float(mean.value) for name, mean in found.items()}
    {'logps/chosen': -1.5, 'tokens/chosen': 2.0}
    """
    pair = pair_logps(tokens, batch)
    return {
        "logps/chosen": masked_mean(pair.logps[..., 0], batch.pair_mask),
        "tokens/chosen": masked_mean(pair.tokens[..., 0], batch.pair_mask),
    }


def _as_float(values: Array) -> Array:
    return values.astype(jnp.float32)


def _kl_on_data(tokens: TokenLogps, batch: PreferenceBatch) -> Mean:
    ratio = jnp.minimum(tokens.logratios, 20.0)
    return masked_mean(jnp.expm1(ratio) - ratio, batch.completions.response >= 0)


def segment_metrics(
    tokens: TokenLogps,
    batch: PreferenceBatch,
    details: PairDetails,
    *,
    beta: float,
    aspects: tuple[str, ...] = (),
) -> Metrics:
    """Return the metrics of segments.

    ``segments/accuracy``: of all couples of one scored chosen and one scored rejected
    segment whose scores differ, the share that the learned reward per token
    ``beta H_k / l_k`` orders as the scores do (0.5 is chance; a tie counts half).
    ``segments/margins``: mean of (better - worse) over the same couples; both also for
    every aspect's own scores, ``segments/accuracy/<aspect>``.
    ``segments/coverage_*``: share of completion tokens that get a gradient.
    ``segments/drift_*``: mean |log pi - log pi_ref| of the tokens of segments that are
    in the loss, and of the tokens of no such segment.

    >>> response = jnp.array([[0, 0, 1]])  # chosen in two segments, rejected in one
    >>> answers = Completions(*[response] * 3, segment=jnp.array([[0, 1, 0]]))
    >>> mask = jnp.array([[[[True, True], [True, False]]]])
    >>> scores = jnp.array([[[[4.0, 1.0], [2.0, 0.0]]]])
    >>> batch = PreferenceBatch(None, answers, scores[..., None], mask, mask[..., 0, 0])
    >>> policy = jnp.array([[-1.0, -2.0, -3.0]])
    >>> one = jnp.ones((1, 1))
    >>> details = PairDetails(one, scores, mask, scores / 4, mask, one, 0 * one, one)
    >>> tokens = TokenLogps(policy, 0 * policy)
    >>> found = segment_metrics(tokens, batch, details, beta=0.5)
    >>> float(found["segments/accuracy"].value)  # 4 above 2 is learned, 1 below 2 not
    0.5
    """
    shape = (details.scores.shape[1], details.scores.shape[3])
    in_pair = batch.pair_mask
    mask = details.mask & in_pair[..., None, None]
    counts = logps.segment_token_counts(batch.completions, shape)
    ratios = logps.segment_sums(tokens.logratios, batch.completions, shape)
    per_token = beta * ratios / jnp.maximum(counts, 1)
    learned = per_token[..., 0, :, None] - per_token[..., 1, None, :]
    accuracy, margins = _agreement(learned, details.scores, mask)
    weightless = jnp.abs(details.weights) <= _TOLERANCE
    metrics = {
        "segments/accuracy": accuracy,
        "segments/margins": margins,
        "segments/loss_per_pair": masked_mean(
            details.losses / jnp.maximum(details.num_segment_pairs, 1),
            in_pair & (details.num_segment_pairs > 0),
        ),
        "segments/pairs_per_example": masked_mean(details.num_segment_pairs, in_pair),
        **_use_of_tokens(tokens, batch, details.selected & ~weightless & mask, counts),
        "segments/weight": masked_mean(details.weights, details.selected & mask),
        "segments/zero_weights": masked_mean(
            _as_float(weightless), details.selected & mask
        ),
        "segments/contradictory": _share(
            details.contradictory, details.candidates, in_pair
        ),
        "segments/unscored_pairs": masked_mean(
            _as_float(~mask.any(-1).all(-1)), in_pair
        ),
    }
    if len(aspects) > 1:
        for index, aspect in enumerate(aspects):
            given = batch.scores[..., index]
            judged = mask & ~jnp.isnan(given)
            accuracy, margins = _agreement(
                learned, jnp.where(judged, given, 0.0), judged
            )
            metrics[f"segments/accuracy/{aspect}"] = accuracy
            metrics[f"segments/margins/{aspect}"] = margins
    return metrics


_TOLERANCE = 1e-6
"""Scores, weights and rewards nearer to each other are equal."""


def _agreement(
    learned: Float[Array, "b p s s"],
    scores: Float[Array, "b p 2 s"],
    judged: Bool[Array, "b p 2 s"],
) -> tuple[Mean, Mean]:
    """Compare learned differences of two segments' rewards with those of scores."""
    gap = scores[..., 0, :, None] - scores[..., 1, None, :]
    both = judged[..., 0, :, None] & judged[..., 1, None, :]
    couples = both & (jnp.abs(gap) > _TOLERANCE)
    agreed = jnp.where(
        jnp.abs(learned) <= _TOLERANCE, 0.5, _as_float(learned * gap > 0)
    )
    margins = masked_mean(learned * jnp.sign(gap), couples)
    return masked_mean(agreed, couples), margins


def _use_of_tokens(
    tokens: TokenLogps,
    batch: PreferenceBatch,
    used: Bool[Array, "b p 2 s"],
    counts: Float[Array, "b p 2 s"],
) -> Metrics:
    """Tell how many tokens learn, and how far those that do and do not have moved."""
    covered = jnp.where(used, counts, 0).sum(-1)
    whole = pair_logps(tokens, batch).tokens
    in_loss = _of_tokens(used, batch.completions)
    there = batch.completions.response >= 0
    drift = jnp.abs(tokens.logratios)
    mask = batch.pair_mask
    return {
        "segments/coverage_chosen": _share(covered[..., 0], whole[..., 0], mask),
        "segments/coverage_rejected": _share(covered[..., 1], whole[..., 1], mask),
        "segments/drift_selected": masked_mean(drift, there & in_loss),
        "segments/drift_unselected": masked_mean(drift, there & ~in_loss),
    }


def _of_tokens(
    segments: Bool[Array, "b p 2 s"], completions: Completions
) -> Bool[Array, "b c"]:
    """Give each completion token the value of the segment that owns it."""
    size = segments.shape[-1]
    owned = (completions.segment >= 0) & (completions.response >= 0)
    index = jnp.where(owned, completions.response * size + completions.segment, 0)
    flat = segments.reshape(segments.shape[0], -1)
    return owned & jnp.take_along_axis(flat, index, axis=1)


def _share(
    part: Float[Array, "b p"], whole: Float[Array, "b p"], mask: Bool[Array, "b p"]
) -> Mean:
    return Mean(jnp.where(mask, part, 0).sum(), jnp.where(mask, whole, 0).sum())
