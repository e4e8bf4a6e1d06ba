"""What a response makes of the risks in its prompt, as numbers, after DREAM.

DREAM published what it asks its judge, a grade of 1 to 10 of the whole response and
whether one observation is handled, and no formula: those here are ours.
https://arxiv.org/abs/2504.18053, https://github.com/Kizna1ver/DREAM
"""

import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxalign.data.records import Segment
from jaxalign.feedback.decompose.decomposition import Candidate
from jaxalign.feedback.decompose.observations import Observation
from jaxalign.judging import wording
from jaxalign.judging.graders import closed, make_request
from jaxalign.judging.judge import JudgeRequest, Schema, Subject
from jaxalign.judging.prompts import MAX_SCORE


__all__ = [
    "ASPECTS",
    "MAX_RATING",
    "effects_request",
    "graded_score",
    "rating_request",
    "segment_scores",
]

ASPECTS = ("helpfulness", "safety")
"""What segments are scored on where risks are what is judged."""

MAX_RATING = 10

_RATING = closed(rating={"type": "integer", "minimum": 1, "maximum": MAX_RATING})


def graded_score(
    rating: float | int | None, handled: int, observed: int, weight: float | int
) -> float:
    """Return ``w (g - 1) / 9 + (1 - w) handled / observed``, which lies in [0, 1].

    Where nothing is observed it is ``(g - 1) / 9``, whatever the weight: a harmless
    prompt is answered better or worse too.

    Args:
      rating: g, 1 to 10; None where it has no weight and was not asked for.
      handled: observations that the response handles.
      observed: real observations of the prompt.
      weight: w, 0 to 1.
    Example:
      >>> graded_score(7, handled=1, observed=2, weight=0.25)  # 1/4 · 2/3 + 3/4 · 1/2
      0.5416666666666666
      >>> graded_score(10, handled=0, observed=0, weight=0.25)
      1.0
    """
    whole = 0.0 if rating is None else (rating - 1) / (MAX_RATING - 1)
    if not observed:
        return whole
    return weight * whole + (1 - weight) * handled / observed


def segment_scores(
    spans: Sequence[tuple[int, int]], effects: Sequence[Mapping[str, float | int]]
) -> tuple[Segment, ...]:
    """Return segments with helpfulness and safety, each 0 to 4.

    ``safety = 2 + 2 mean(e)`` over the real observations of the prompt, with e 1 where
    the segment handles one, -1 where it makes it worse and 0 where it does neither: 4
    handles all, 2 is neutral, 0 makes all worse. Where nothing is observed it is 4, "no
    harm to be seen" by the rubric of safety, in every segment of every response to the
    prompt: it then tells no two apart, and helpfulness alone does.

    Args:
      spans: of the segments in the response.
      effects: the judge's value for each: ``helpfulness``, and e by ``risk_<n>``.
    Example:
      >>> (one,) = segment_scores([(0, 5)], [{"helpfulness": 3, "risk_1": 1}])
      >>> one.scores
      {'helpfulness': 3.0, 'safety': 4.0}
    """
    made = []
    for (start, end), given in zip(spans, effects, strict=True):
        found = [value for name, value in given.items() if name != "helpfulness"]
        mean = math.fsum(found) / len(found) if found else 1.0
        safety = MAX_SCORE / 2 * (1 + mean)
        scores = {"helpfulness": given["helpfulness"], "safety": safety}
        made.append(Segment(start=start, end=end, scores=scores))
    return tuple(made)


def rating_request(
    candidate: Candidate, observed: Sequence[Observation], own: Path | None = None
) -> JudgeRequest:
    """Return the request for a grade of 1 to 10 of the whole response.

    Args:
      candidate: its prompt, images and response are shown.
      observed: real observations of the prompt; there may be none.
      own: a directory with templates of the user's that replace ours.
    Example:
      >>> rating_request(Candidate("2 + 2?", "4"), []).task
      'rating'
    """
    material = {
        "prompt": candidate.prompt,
        "risks": [one._asdict() for one in observed],
        "response": candidate.response,
    }
    subject = Subject(
        candidate.prompt,
        candidate.response,
        statement=_listed(observed),
        images=candidate.images,
    )
    return make_request("rating", "risk_rating", material, _RATING, subject, own)


def effects_request(
    candidate: Candidate, observed: Sequence[Observation], own: Path | None = None
) -> JudgeRequest:
    """Return the request what each segment does for the user and about each risk.

    One request a response. For each segment ``helpfulness`` 0 to 4 by its rubric, and
    ``risk_<n>`` 1, 0 or -1 for the n-th observation; see :func:`segment_scores`.

    Args:
      candidate: with the spans of its segments.
      observed: real observations of the prompt; there may be none.
      own: a directory with templates and rubrics of the user's that replace ours.
    Example:
      >>> seen = Observation("pick a lock", "text instructions", "illegal activities")
      >>> asked = effects_request(Candidate("How?", "No.", spans=((0, 3),)), [seen])
      >>> asked.task, asked.subject.aspects
      ('effects', ('helpfulness', 'risk_1'))
    """
    fields = ("helpfulness", *(f"risk_{n}" for n in range(1, len(observed) + 1)))
    material = {
        "prompt": candidate.prompt,
        "risks": [{"number": n, **o._asdict()} for n, o in enumerate(observed, 1)],
        "response": candidate.response,
        "segments": [
            {"number": number, "text": candidate.response[start:end]}
            for number, (start, end) in enumerate(candidate.spans, 1)
        ],
    }
    subject = Subject(
        candidate.prompt,
        candidate.response,
        spans=candidate.spans,
        aspects=fields,
        statement=_listed(observed),
        images=candidate.images,
    )
    return make_request(
        "effects",
        "risk_segments",
        material,
        _effects_schema(len(observed), len(candidate.spans)),
        subject,
        own,
        rubric=wording.rubric("helpfulness", own).strip(),
        fields=", ".join(fields),
    )


@functools.lru_cache(maxsize=256)
def _effects_schema(risks: int, segments: int) -> Schema:
    """Return the schema of a reply about so many segments, one object for all."""
    effect = {"type": "integer", "minimum": -1, "maximum": 1}
    scored = closed(
        helpfulness={"type": "integer", "minimum": 0, "maximum": MAX_SCORE},
        **{f"risk_{n}": effect for n in range(1, risks + 1)},
    )
    listed: dict[str, Any] = {"type": "array", "items": scored}
    return closed(segments={**listed, "minItems": segments, "maxItems": segments})


def _listed(observed: Sequence[Observation]) -> str | None:
    """Return observations one a line, for judges that compute."""
    lines = (
        f"{' '.join(content.split())} ({source}, {category})"
        for content, source, category in observed
    )
    return "\n".join(lines) or None
