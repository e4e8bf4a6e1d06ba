"""Segments by aspects: the two-dimensional feedback of HelpSteer-2D."""

import math
from pathlib import Path

from jaxalign.data.records import Segment
from jaxalign.feedback.decompose.decomposition import (
    Candidate,
    Decompose,
    Failure,
    Judged,
    Steps,
    first_failure,
)
from jaxalign.judging.judge import JudgeRequest, Subject
from jaxalign.judging.prompts import scores_request


__all__ = ["decomposer"]


def decomposer(
    aspects: tuple[str, ...],
    *,
    own: Path | None = None,
    needs_rubrics: bool = True,
    renders: bool = False,
) -> Decompose:
    """Return the decomposer that has every segment scored on every aspect.

    One ``scores`` request a candidate. Its score is the mean over its segments of the
    mean over the aspects, mean_s(mean_a(score[s, a])). A response without a segment
    (nothing but whitespace) has no score.

    Args:
      aspects: what the segments are scored on.
      own: a directory with templates and rubrics of the user's that replace ours.
      needs_rubrics: refuse an aspect that has no rubric.
      renders: whether the judge renders the conversation itself, see
        ``JudgeConfig.renders``.
    Raises:
      UserError: there is no aspect, or one without a rubric.
    """

    def decompose(candidate: Candidate, so_far: Steps) -> list[JudgeRequest] | Judged:
        if not candidate.spans:
            return Judged(None, failure=Failure("empty", "it has no segment to score"))
        if not so_far:
            subject = Subject(
                candidate.prompt,
                candidate.response,
                spans=candidate.spans,
                aspects=aspects,
                images=candidate.images,
                template_kwargs=candidate.template_kwargs if renders else None,
            )
            return [scores_request(subject, own, needs_rubrics=needs_rubrics)]
        ((verdict,),) = so_far
        if failure := first_failure([verdict]):
            return Judged(None, failure=failure)
        segments = tuple(
            Segment(start=start, end=end, scores={a: given[a] for a in aspects})
            for (start, end), given in zip(
                candidate.spans, verdict.value["segments"], strict=True
            )
        )
        scores = [score for s in segments for score in s.scores.values()]
        # Every segment has every aspect, so the mean of the means is the mean of all:
        # rounded once, and equal for equal scores whatever the number of segments.
        return Judged(math.fsum(scores) / len(scores), segments=segments)

    return decompose
