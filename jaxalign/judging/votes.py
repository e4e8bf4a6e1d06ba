"""Several verdicts on the same question, made one."""

import collections
import math
from collections.abc import Sequence
from typing import Any

from jaxalign.judging.judge import Verdict


__all__ = ["merged"]


def merged(verdicts: Sequence[Verdict]) -> Verdict:
    """Return one verdict for several on equal requests.

    There is a value if more than half of the votes succeeded: of ``scores`` and
    ``effects`` the mean of each cell over those, of ``rating`` the mean, of every other
    task the reply that most of them gave. A tie between replies is a failure, and so is
    everything else; its reason and raw reply are those of the last vote that failed.

    Args:
      verdicts: at least one.
    Example:
      >>> votes = [Verdict({"answer": answer}) for answer in ("yes", "no", "yes")]
      >>> merged(votes).value
      {'answer': 'yes'}
    """
    if len(verdicts) == 1:
        return verdicts[0]
    good = [verdict.value for verdict in verdicts if verdict.failure is None]
    if 2 * len(good) <= len(verdicts):
        last = [verdict for verdict in verdicts if verdict.failure is not None][-1]
        reason = f"{len(good)} of {len(verdicts)} votes; {last.failure}"
        return Verdict(None, failure=reason, raw=last.raw)
    if "segments" in good[0]:
        return Verdict({"segments": [_mean(s) for s in _columns(good)]})
    if "rating" in good[0]:
        return Verdict(_mean(good))
    counts = collections.Counter(repr(value) for value in good).most_common(2)
    if len(counts) == 2 and counts[0][1] == counts[1][1]:
        return Verdict(None, failure=f"the votes are split: {len(good)} votes")
    return Verdict(next(value for value in good if repr(value) == counts[0][0]))


def _columns(values: Sequence[Any]) -> list[list[dict[str, int | float]]]:
    """Return for each segment what each vote gave it."""
    return [list(votes) for votes in zip(*(v["segments"] for v in values), strict=True)]


def _mean(votes: Sequence[dict[str, int | float]]) -> dict[str, int | float]:
    return {
        aspect: math.fsum(vote[aspect] for vote in votes) / len(votes)
        for aspect in votes[0]
    }
