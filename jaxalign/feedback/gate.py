"""Whether a round has made the policy better: paired scores of held-out prompts."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxalign.feedback.candidates import JudgedPrompt
from jaxalign.feedback.gate_config import Wanted
from jaxalign.judging import figures


__all__ = ["Decision", "MetricChange", "decide", "decision_of", "to_dict"]


class MetricChange(NamedTuple):
    """What became of one metric, over the prompts that have it on both sides."""

    wanted: Wanted
    """Which way is better."""
    before: float | None
    """Mean over the prompts, of the policy that the round began with; None of none."""
    after: float | None
    difference: float | None
    """Mean over the prompts of after - before."""
    standard_error: float | None
    """Of the difference, over prompts; None for fewer than two."""
    interval: tuple[float, float] | None
    """Of the difference, 95 %: ``difference ± 1.96 standard_error``."""
    prompts: int
    """Those that it is a mean of."""
    failed: int
    """Those that it looks at and that have no verdict on one side."""
    failed_verdicts: int
    """Responses without a verdict, of both policies."""

    @property
    def worse_by(self) -> float | None:
        """How much worse it has become; below 0 where it is better."""
        if self.difference is None:
            return None
        return self.difference if self.wanted == "lower" else -self.difference


class Decision(NamedTuple):
    """What the gate found."""

    accepted: bool
    improvement: float | None
    """Mean over the prompts of after - before; None if none could be compared, or
    metrics were looked at in the place of scores."""
    before: float | None
    """Mean score of the policy that the round began with."""
    after: float | None
    standard_error: float | None
    """Of the improvement, over prompts; None for fewer than two."""
    prompts: int
    """Those with a score, or all their verdicts, on both sides."""
    failed: int
    """Those without."""
    min_improvement: float
    reason: str
    metrics: Mapping[str, MetricChange] | None = None
    """What was looked at in the place of scores: see :mod:`.gate_metrics`."""


def decide(
    before: Sequence[JudgedPrompt],
    after: Sequence[JudgedPrompt],
    *,
    min_improvement: float = 0.0,
) -> Decision:
    """Compare two policies on the same prompts.

    A prompt's score is the mean over its completions that have one; a prompt counts if
    it has one on both sides. The round is accepted if the mean difference is at least
    ``min_improvement`` and above 0; one below 0 is a tolerance, and a policy that has
    become no worse than that is accepted too.

    Args:
      before: judged completions of the policy that the round began with.
      after: of the one that it made, prompt by prompt.
      min_improvement: see above.
    Example:
      >>> from jaxalign.feedback.decompose.decomposition import Judged
      >>> def judged(score): return [JudgedPrompt("2 + 2?", ("4",), (Judged(score),))]
      >>> decision = decide(judged(1.0), judged(3.0))
      >>> decision.accepted, decision.improvement
      (True, 2.0)
    """
    means = [
        (float(np.mean(one.scores)), float(np.mean(other.scores)))
        for one, other in zip(before, after, strict=True)
        if one.scores and other.scores
    ]
    failed = len(before) - len(means)
    if not means:
        return Decision(
            *(False, None, None, None, None, 0, failed, min_improvement),
            "no prompt has a score on both sides",
        )
    old, new = (float(np.mean(side)) for side in zip(*means, strict=True))
    gain = figures.mean([b - a for a, b in means])
    improvement = gain.value
    assert improvement is not None  # there are prompts
    accepted = improvement >= min_improvement and (
        improvement > 0 or min_improvement < 0
    )
    reason = "the policy did not improve enough"
    if accepted:
        reason = "the policy improved"
        if improvement <= 0:
            reason = "the policy did not improve, within gate.min_improvement"
    elif min_improvement < 0:
        reason = "the policy became worse than gate.min_improvement allows"
    return Decision(
        *(accepted, improvement, old, new, gain.standard_error, len(means), failed),
        *(min_improvement, reason),
    )


def to_dict(decision: Decision) -> dict[str, Any]:
    """Return a decision as plain values for gate.json.

    >>> to_dict(decide([], []))["reason"]
    'no prompt has a score on both sides'
    """
    made = decision._asdict()
    if decision.metrics is None:
        del made["metrics"]
    else:
        made["metrics"] = {n: one._asdict() for n, one in decision.metrics.items()}
    return made


def decision_of(found: Mapping[str, Any]) -> Decision:
    """Return the decision that a gate.json holds, among other things.

    >>> from jaxalign.feedback.decompose.decomposition import Judged
    >>> judged = [JudgedPrompt("2 + 2?", ("4",), (Judged(1.0),))]
    >>> found = decide(judged, judged)
    >>> decision_of({**to_dict(found), "seconds": 3}) == found
    True
    """
    given = {name: found[name] for name in Decision._fields if name != "metrics"}
    metrics = found.get("metrics")
    if metrics is not None:
        metrics = {name: _change(one) for name, one in metrics.items()}
    return Decision(**given, metrics=metrics)


def _change(found: Mapping[str, Any]) -> MetricChange:
    interval = found["interval"]
    return MetricChange(**{**found, "interval": interval and tuple(interval)})
