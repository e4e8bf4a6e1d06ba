"""Whether a round has made the policy better: paired scores of held-out prompts."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxalign.feedback.candidates import JudgedPrompt


__all__ = ["Decision", "decide", "decision_of"]


class Decision(NamedTuple):
    """What the gate found."""

    accepted: bool
    improvement: float | None
    """Mean over the prompts of after - before; None if none could be compared."""
    before: float | None
    """Mean score of the policy that the round began with."""
    after: float | None
    standard_error: float | None
    """Of the improvement, over prompts; None for fewer than two."""
    prompts: int
    """Those with a score on both sides."""
    failed: int
    """Those without."""
    min_improvement: float
    reason: str


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
    gains = np.array([b - a for a, b in means])
    improvement = float(gains.mean())
    error = None
    if len(gains) > 1:
        error = float(gains.std(ddof=1) / math.sqrt(len(gains)))
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
        *(accepted, improvement, old, new, error, len(means), failed, min_improvement),
        reason,
    )


def decision_of(found: Mapping[str, Any]) -> Decision:
    """Return the decision that a gate.json holds, among other things.

    >>> from jaxalign.feedback.decompose.decomposition import Judged
    >>> judged = [JudgedPrompt("2 + 2?", ("4",), (Judged(1.0),))]
    >>> found = decide(judged, judged)
    >>> decision_of({**found._asdict(), "seconds": 3}) == found
    True
    """
    return Decision(**{name: found[name] for name in Decision._fields})
