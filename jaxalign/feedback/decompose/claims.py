"""Atomic claims, each turned into a yes-or-no question: RLAIF-V's divide and conquer.

https://arxiv.org/abs/2405.17220
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from jaxalign.errors import UserError
from jaxalign.feedback.decompose.decomposition import (
    Candidate,
    Decompose,
    Failure,
    Judged,
    Steps,
    Unit,
    first_failure,
)
from jaxalign.feedback.decompose.observations import folded
from jaxalign.judging.graders import (
    YES_OR_NO,
    closed,
    make_request,
    texts,
)
from jaxalign.judging.judge import JudgeRequest, Subject, Verdict


__all__ = ["decomposer"]


def decomposer(
    *,
    max_claims: int = 40,
    claimless: Literal["unscored", "zero"] = "unscored",
    own: Path | None = None,
) -> Decompose:
    """Return the decomposer whose score is minus the number of rejected claims.

    Three steps: ``claims`` splits the response; ``questions`` asks of every claim a
    question that yes affirms; one ``verify`` for every question, which shows prompt and
    images but not the response, so that a claim is judged on its own. A claim that is
    said twice counts once.

    Args:
      max_claims: a longer list of claims is a failed reply.
      claimless: what a response is that claims nothing. By RLAIF-V's formula it has
        the best score, 0, so that evasion beats every answer with one mistake;
        ``unscored``, the default, leaves it out of all pairs.
      own: a directory with templates of the user's that replace ours.
    Raises:
      UserError: an option is out of range.
    """
    if max_claims < 1:
        raise UserError(f"max_claims must be at least 1: got {max_claims}")

    def decompose(candidate: Candidate, so_far: Steps) -> list[JudgeRequest] | Judged:
        if not so_far and candidate.response.strip():
            return [_split(candidate, max_claims, own)]
        if failure := first_failure(v for step in so_far[:2] for v in step):
            return Judged(None, failure=failure)
        claims = _distinct(so_far[0][0].value["claims"]) if so_far else []
        if not claims:
            if claimless == "zero":
                return Judged(0.0)
            return Judged(None, failure=Failure("empty", "it makes no claim"))
        if len(so_far) == 1:
            return [_ask(candidate, claims, own)]
        questions = so_far[1][0].value["questions"]
        if not all(question.strip() for question in questions):
            reason = "a claim has a blank for its question"
            return Judged(None, failure=Failure("judge", reason, raw=so_far[1][0].raw))
        if len(so_far) == 2:
            return [_verify(candidate, question, own) for question in questions]
        return _judged(claims, questions, so_far[2])

    return decompose


def _split(candidate: Candidate, max_claims: int, own: Path | None) -> JudgeRequest:
    material = {"prompt": candidate.prompt, "response": candidate.response}
    subject = Subject(candidate.prompt, candidate.response)
    schema = closed(claims=texts(0, max_claims))
    most = str(max_claims)
    return make_request(
        "claims", "claims", material, schema, subject, own, max_claims=most
    )


def _distinct(claims: Sequence[str]) -> list[str]:
    """Return claims on one line each, in order, without blanks and repetitions."""
    lines: dict[str, str] = {}
    for claim in claims:
        lines.setdefault(folded(claim), " ".join(claim.split()))
    return [line for key, line in lines.items() if key]


def _ask(candidate: Candidate, claims: Sequence[str], own: Path | None) -> JudgeRequest:
    material = {"prompt": candidate.prompt, "claims": list(claims)}
    # The claims stand for the response, one a line: nothing else of it is shown.
    subject = Subject(candidate.prompt, "", statement="\n".join(claims))
    schema = closed(questions=texts(len(claims), len(claims)))
    count = str(len(claims))
    return make_request(
        "questions", "questions", material, schema, subject, own, count=count
    )


def _verify(candidate: Candidate, question: str, own: Path | None) -> JudgeRequest:
    material = {"prompt": candidate.prompt, "question": question}
    subject = Subject(candidate.prompt, "", statement=question, images=candidate.images)
    return make_request("verify", "verify", material, YES_OR_NO, subject, own)


def _judged(
    claims: Sequence[str], questions: Sequence[str], verdicts: Sequence[Verdict]
) -> Judged:
    units = tuple(
        Unit(
            "claim",
            claim,
            None if verdict.failure else _FOUND[verdict.value["answer"]],
            {"question": question},
        )
        for claim, question, verdict in zip(claims, questions, verdicts, strict=True)
    )
    if failure := first_failure(verdicts):
        return Judged(None, units=units, failure=failure)
    rejected = sum(unit.verdict == "rejected" for unit in units)
    return Judged(float(-rejected), units=units)


_FOUND = {"yes": "supported", "no": "rejected"}
