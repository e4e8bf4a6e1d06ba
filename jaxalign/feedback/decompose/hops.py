"""Answers graded against a ground truth: recognition and knowledge, three ways.

The grades are those of SimpleQA and ChineseSimpleVQA:
https://github.com/OpenStellarTeam/ChineseSimpleVQA, https://arxiv.org/abs/2502.11718
"""

from collections.abc import Sequence
from pathlib import Path

from jaxalign.errors import UserError
from jaxalign.feedback.decompose.decomposition import (
    Candidate,
    Decompose,
    Failure,
    Hop,
    Judged,
    Steps,
    Unit,
    first_failure,
)
from jaxalign.judging.graders import GRADES, grade_request
from jaxalign.judging.judge import JudgeRequest, Subject, Verdict


__all__ = ["GRADES", "decomposer"]


def decomposer(*, not_attempted: float = 0.0, own: Path | None = None) -> Decompose:
    """Return the decomposer that grades a response on each of its candidate's hops.

    One ``grade`` request a hop, with the hop's question and accepted answers and never
    an image or its address. The score is the mean over the hops of 1 for correct, -1
    for incorrect and ``not_attempted`` between them. A failed judgement is no grade:
    it never counts as not attempted.

    Args:
      not_attempted: worth of an answer that holds neither the truth nor an error, from
        -1 (no better than an error) to 1. The benchmarks' F = 2A / (2A + 2B + C), with
        A, B and C the counts of the three grades, also ranks it between the two.
      own: a directory with templates of the user's that replace ours.
    Raises:
      UserError: ``not_attempted`` is out of range.
    """
    if not -1 <= not_attempted <= 1:
        raise UserError(
            "not_attempted must lie between -1, the score of an incorrect answer, and "
            f"1, that of a correct one: got {not_attempted}"
        )
    worth = {"correct": 1.0, "incorrect": -1.0, "not_attempted": not_attempted}

    def decompose(candidate: Candidate, so_far: Steps) -> list[JudgeRequest] | Judged:
        if not candidate.hops:
            reason = "its prompt has no question with an accepted answer"
            return Judged(None, failure=Failure("empty", reason))
        if not so_far:
            return [_grade(candidate.response, hop, own) for hop in candidate.hops]
        (verdicts,) = so_far
        units = _units(candidate.hops, verdicts)
        if failure := first_failure(verdicts):
            return Judged(None, units=units, failure=failure)
        total = sum(worth[verdict.value["grade"]] for verdict in verdicts)
        return Judged(total / len(verdicts), units=units)

    return decompose


def _grade(response: str, hop: Hop, own: Path | None) -> JudgeRequest:
    subject = Subject(hop.question, response, references=hop.references)
    return grade_request(subject, own)


def _units(hops: Sequence[Hop], verdicts: Sequence[Verdict]) -> tuple[Unit, ...]:
    return tuple(
        Unit(
            "hop",
            hop.question,
            None if verdict.failure else verdict.value["grade"],
            {"hop": hop.name, "references": "; ".join(hop.references)},
        )
        for hop, verdict in zip(hops, verdicts, strict=True)
    )
