"""What a decomposer is, what it is given, and what it makes.

A decomposer is one pure function of a candidate and the verdicts so far. It returns the
requests to send now, or the judged candidate when nothing is left to ask::

    so_far = []
    while not isinstance(now := decompose(candidate, so_far), Judged):
        so_far.append(verdicts of now, in its order)

Nothing else is kept between the steps, so that a killed run goes on from the verdicts
in its store. A request is sent once; who asks a judge several times over merges the
votes into one verdict before handing it back.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from jaxalign.data.records import Segment
from jaxalign.errors import UserError
from jaxalign.judging.judge import JudgeRequest, Verdict


__all__ = [
    "Candidate",
    "Decompose",
    "Failure",
    "Hop",
    "Judged",
    "Steps",
    "Unit",
    "first_failure",
]


@dataclass(frozen=True)
class Hop:
    """A question with a ground truth that a response is to answer.

    Raises:
      UserError: it has no accepted answer.
    """

    name: Literal["recognition", "knowledge"]
    """What is in the picture, or what is known about it."""
    question: str
    references: tuple[str, ...]
    """Accepted answers, any of which will do."""

    def __post_init__(self) -> None:
        if not any(reference.strip() for reference in self.references):
            raise UserError(
                f"a {self.name} question has no accepted answer: give at least one "
                "text that is not blank"
            )


@dataclass(frozen=True)
class Candidate:
    """One response to a prompt, and what decomposers may need to know of it."""

    prompt: str | tuple[Mapping[str, str], ...]
    """A plain text, or the turns of a conversation."""
    response: str
    spans: tuple[tuple[int, int], ...] = ()
    """Half-open code-point offsets of the segments in the response."""
    hops: tuple[Hop, ...] = ()
    images: tuple[str, ...] = ()
    """References as of :func:`jaxalign.data.images.reference`."""
    template_kwargs: Mapping[str, Any] | None = None
    """What the prompt's chat template is given beside the turns, such as ``tools``."""
    benign: bool | None = None
    """Whether the prompt is harmless, where who asks knows: a gate's are marked."""


@dataclass(frozen=True)
class Unit:
    """One piece of evidence: a claim, a risk, a rating, an answered hop, a label."""

    kind: Literal["claim", "observation", "rating", "hop", "label"]
    text: str
    verdict: str | None
    """What was found of it, in its kind's words; None where the judge failed."""
    labels: Mapping[str, str]
    """What else its kind knows, such as the question that was asked about it."""


@dataclass(frozen=True)
class Failure:
    """Why a candidate has no score."""

    kind: Literal["judge", "empty"]
    """The judge gave no verdict, or there was nothing to ask it."""
    reason: str
    raw: str | None = None
    """The last reply, verbatim, if there was any."""


@dataclass(frozen=True)
class Judged:
    """A candidate after its last verdict: it has a score or a failure, never both."""

    score: float | None
    """Higher is better; comparable among the responses to one prompt."""
    segments: tuple[Segment, ...] = ()
    units: tuple[Unit, ...] = ()
    failure: Failure | None = None

    def __post_init__(self) -> None:
        if (self.score is None) == (self.failure is None):
            raise ValueError("a judged candidate has a score or a failure, never both")


Steps: TypeAlias = Sequence[Sequence[Verdict]]
"""Verdicts of the finished steps, each in the order of that step's requests."""

Decompose: TypeAlias = Callable[[Candidate, Steps], list[JudgeRequest] | Judged]
"""A decomposer; its list of requests is never empty."""


def first_failure(verdicts: Iterable[Verdict]) -> Failure | None:
    """Return the first failure among verdicts as a candidate's, or None."""
    for verdict in verdicts:
        if verdict.failure is not None:
            return Failure("judge", verdict.failure, verdict.raw)
    return None
