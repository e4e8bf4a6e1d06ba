"""A slow, literal float64 reference of the 2D-DPO losses.

Written from `DESIGN.md` 4.5 and `spec/objectives.md` section 1 alone, without looking
at `jaxalign.objectives`, so that agreement of the two means something. One pair at a
time, plain loops over segments, nothing shared with the code under test.

A side (`chosen` or `rejected`) is a dict:

    {"segments": [{"tokens": int, "logratio": float, "score": float}, ...],
     "logratio": float, "logp": float, "tokens": int}

`score` is r, the segment's aspect-weighted raw score; `logratio` is
log pi - log pi_ref, summed over the segment's tokens, or over the whole completion on
the outer level; `logp` and the outer `tokens` are the whole completion's too. A segment
with no token is unscored. Tokens outside every segment count in the outer values only.

Readings fixed where the documents leave room:

- Selection looks at raw r and at scored segments only; ties keep text order.
- `inverted` is top - r; top is 1 under `normalize=max` and `max_score` otherwise.
- `centred` is the unweighted mean of (normalised) r over the response's scored
  segments, minus r.
- `mean1` starts from raw r, maps the rejected side, then divides by the token-weighted
  mean over that response's scored segments; a mean of exactly 0 gives weights 1.
- `reduction=mean` divides by the number of segment pairs kept. No pair: the group part
  is 0. `skip_contradictory` drops pairs after selection and does not refill them.
- `vanilla` is one sigmoid over the weighted sums of each side's selected segments, an
  empty sum being 0. `pairing`, `reduction` and `skip_contradictory` are about segment
  pairs and so mean nothing there; label smoothing acts on its one sigmoid.
- The DPO anchor is *plain* DPO: the same beta, never smoothed.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


Segment = Mapping[str, Any]
Side = Mapping[str, Any]
Config = Mapping[str, Any]

DEFAULTS: dict[str, Any] = {
    "beta": 0.1,
    "form": "group",
    "top_k": None,
    "pairing": "rank",
    "max_score": 4.0,
    "normalize": "max",
    "rejected_weight": "score",
    "reduction": "sum",
    "label_smoothing": 0.0,
    "skip_contradictory": False,
    "dpo_weight": 0.0,
    "sft_weight": 0.0,
}

# The score of a segment arrives already aggregated over aspects.
IGNORED = {"aspect_weights"}


def reference_dpo2d(chosen: Side, rejected: Side, config: Config) -> float:
    """Return the 2D-DPO loss of one pair, anchors included."""
    options = _with_defaults(config)
    if options["form"] == "group":
        loss = _group_loss(chosen, rejected, options)
    else:
        loss = _vanilla_loss(chosen, rejected, options)
    if options["dpo_weight"] != 0:
        plain = {"beta": options["beta"]}
        loss += np.float64(options["dpo_weight"]) * reference_dpo(
            chosen, rejected, plain
        )
    if options["sft_weight"] != 0:
        negative_logp = -np.float64(chosen["logp"])
        loss += np.float64(options["sft_weight"]) * negative_logp / chosen["tokens"]
    return float(loss)


def reference_dpo(chosen: Side, rejected: Side, config: Config) -> float:
    """Return the sequence-level DPO loss of one pair (conservative if smoothed).

    -(1 - e) log sigmoid(beta D) - e log sigmoid(-beta D), where D is the difference of
    the whole completions' log-ratios. Reads `beta` and `label_smoothing` only.
    """
    options = _with_defaults(config)
    difference = np.float64(chosen["logratio"]) - np.float64(rejected["logratio"])
    logit = np.float64(options["beta"]) * difference
    return float(_smoothed_sigmoid_loss(logit, options["label_smoothing"]))


def reference_weights(side: Side, config: Config, rejected: bool) -> list[float]:
    """Return each segment's coefficient, without beta; 0 for an unscored segment."""
    options = _with_defaults(config)
    scored = _scored(side)
    if not scored:
        return [0.0] * len(side["segments"])

    # 1. Normalise. `mean1` starts from raw r, like `none`.
    values: dict[int, np.float64] = {}
    for index in scored:
        raw = np.float64(side["segments"][index]["score"])
        if options["normalize"] == "max":
            values[index] = raw / np.float64(options["max_score"])
        else:
            values[index] = raw

    # 2. Map the rejected side.
    if rejected:
        top = np.float64(options["max_score"])
        if options["normalize"] == "max":
            top = np.float64(1.0)
        mean = np.float64(0.0)
        for index in scored:
            mean += values[index]
        mean /= len(scored)
        for index in scored:
            if options["rejected_weight"] == "score":
                mapped = values[index]
            elif options["rejected_weight"] == "inverted":
                mapped = top - values[index]
            elif options["rejected_weight"] == "uniform":
                mapped = np.float64(1.0)
            else:
                mapped = mean - values[index]
            values[index] = mapped

    # 3. Divide by the response's token-weighted mean.
    if options["normalize"] == "mean1":
        weighted_sum = np.float64(0.0)
        token_count = 0
        for index in scored:
            tokens = side["segments"][index]["tokens"]
            weighted_sum += tokens * values[index]
            token_count += tokens
        token_mean = weighted_sum / token_count
        for index in scored:
            if token_mean == 0:
                values[index] = np.float64(1.0)
            else:
                values[index] = values[index] / token_mean

    weights = []
    for index in range(len(side["segments"])):
        weights.append(float(values[index]) if index in values else 0.0)
    return weights


def reference_selection(
    chosen: Side, rejected: Side, config: Config
) -> list[tuple[int, int]] | tuple[list[int], list[int]]:
    """Return the selected segments, as indices into each side's list of segments.

    For `group`: the (chosen, rejected) pairs kept, in the order of the pairing. For
    `vanilla`: the chosen list and the rejected list, each in text order.
    """
    options = _with_defaults(config)
    if options["form"] == "vanilla":
        chosen_count = len(_scored(chosen))
        rejected_count = len(_scored(rejected))
        if options["top_k"] is not None:
            chosen_count = min(chosen_count, options["top_k"])
            rejected_count = min(rejected_count, options["top_k"])
        best = _best_first(chosen)[:chosen_count]
        worst = _worst_first(rejected)[:rejected_count]
        return sorted(best), sorted(worst)

    count = min(len(_scored(chosen)), len(_scored(rejected)))
    if options["top_k"] is not None:
        count = min(count, options["top_k"])
    best = _best_first(chosen)[:count]
    worst = _worst_first(rejected)[:count]
    if options["pairing"] == "order":
        best = sorted(best)
        worst = sorted(worst)

    pairs = []
    for position in range(count):
        chosen_index = best[position]
        rejected_index = worst[position]
        chosen_score = chosen["segments"][chosen_index]["score"]
        rejected_score = rejected["segments"][rejected_index]["score"]
        if options["skip_contradictory"] and not chosen_score > rejected_score:
            continue
        pairs.append((chosen_index, rejected_index))
    return pairs


def _group_loss(chosen: Side, rejected: Side, options: Config) -> np.float64:
    chosen_weights = reference_weights(chosen, options, rejected=False)
    rejected_weights = reference_weights(rejected, options, rejected=True)
    pairs = reference_selection(chosen, rejected, options)
    beta = np.float64(options["beta"])
    total = np.float64(0.0)
    for chosen_index, rejected_index in pairs:
        chosen_logratio = np.float64(chosen["segments"][chosen_index]["logratio"])
        rejected_logratio = np.float64(rejected["segments"][rejected_index]["logratio"])
        logit = beta * chosen_weights[chosen_index] * chosen_logratio
        logit -= beta * rejected_weights[rejected_index] * rejected_logratio
        total += _smoothed_sigmoid_loss(logit, options["label_smoothing"])
    if options["reduction"] == "mean" and len(pairs) > 0:
        total = total / len(pairs)
    return total


def _vanilla_loss(chosen: Side, rejected: Side, options: Config) -> np.float64:
    chosen_weights = reference_weights(chosen, options, rejected=False)
    rejected_weights = reference_weights(rejected, options, rejected=True)
    chosen_selected, rejected_selected = reference_selection(chosen, rejected, options)
    chosen_sum = np.float64(0.0)
    for index in chosen_selected:
        logratio = np.float64(chosen["segments"][index]["logratio"])
        chosen_sum += chosen_weights[index] * logratio
    rejected_sum = np.float64(0.0)
    for index in rejected_selected:
        logratio = np.float64(rejected["segments"][index]["logratio"])
        rejected_sum += rejected_weights[index] * logratio
    logit = np.float64(options["beta"]) * (chosen_sum - rejected_sum)
    return _smoothed_sigmoid_loss(logit, options["label_smoothing"])


def _smoothed_sigmoid_loss(logit: np.float64, label_smoothing: float) -> np.float64:
    smoothing = np.float64(label_smoothing)
    return (1 - smoothing) * _minus_log_sigmoid(logit) + (
        smoothing * _minus_log_sigmoid(-logit)
    )


def _minus_log_sigmoid(logit: np.float64) -> np.float64:
    # log(1 + exp(-z)) overflows for very negative z; logaddexp does not.
    return np.logaddexp(np.float64(0.0), -np.float64(logit))


def _scored(side: Side) -> list[int]:
    return [i for i, segment in enumerate(side["segments"]) if segment["tokens"] > 0]


def _best_first(side: Side) -> list[int]:
    return _repeatedly_take(side["segments"], _scored(side), highest=True)


def _worst_first(side: Side) -> list[int]:
    return _repeatedly_take(side["segments"], _scored(side), highest=False)


def _repeatedly_take(
    segments: Sequence[Segment], candidates: list[int], *, highest: bool
) -> list[int]:
    # Selection sort by hand: which of two equal scores comes first is then in plain
    # sight, instead of resting on the stability of a library's sort.
    remaining = list(candidates)
    taken = []
    while remaining:
        winner = remaining[0]
        for index in remaining[1:]:
            score, best = segments[index]["score"], segments[winner]["score"]
            if (score > best) if highest else (score < best):
                winner = index
        remaining.remove(winner)
        taken.append(winner)
    return taken


def _with_defaults(config: Config) -> dict[str, Any]:
    unknown = set(config) - set(DEFAULTS) - IGNORED
    if unknown:
        raise KeyError(f"not fields of 2D-DPO: {sorted(unknown)}")
    options = {**DEFAULTS, **config}
    allowed = {
        "form": ("group", "vanilla"),
        "pairing": ("rank", "order"),
        "normalize": ("max", "none", "mean1"),
        "rejected_weight": ("score", "inverted", "uniform", "centred"),
        "reduction": ("sum", "mean"),
    }
    for field, values in allowed.items():
        if options[field] not in values:
            raise ValueError(f"{field}={options[field]!r} is none of {values}")
    return options
