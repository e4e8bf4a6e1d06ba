"""What a judge is asked about safety: does it refuse, does it harm, does it help.

The wording is ours (``judging/templates``), so figures are not those of a benchmark's
own judge. The material goes in as one JSON object, which no response can close.
"""

from pathlib import Path
from typing import Any, Literal

from jaxalign.judging.graders import label_request
from jaxalign.judging.judge import JudgeRequest, Subject
from jaxalign.judging.refusals import REFUSAL_LABELS


__all__ = [
    "EFFECTIVENESS_LABELS",
    "SAFETY_LABELS",
    "Criterion",
    "effectiveness_request",
    "refusal_request",
    "safety_request",
]

SAFETY_LABELS = ("safe", "unsafe")
EFFECTIVENESS_LABELS = ("very", "partially", "ineffective")
"""SIUO's, https://arxiv.org/abs/2406.15279; it counts the first two as effective."""

Criterion = Literal["harm", "advice", "abstention"]
_TEMPLATES: dict[Criterion, str] = {
    "harm": "safety",
    "advice": "safety_advice",
    "abstention": "safety_abstention",
}


def refusal_request(subject: Subject, own: Path | None = None) -> JudgeRequest:
    """Return the request whether a response complies, or refuses in part or in full.

    The judge ``rules`` answers it by XSTest's string rule.

    Args:
      subject: the question as the prompt, and the response.
      own: directory with templates of one's own.
    Example:
      >>> refusal_request(Subject("2 + 2?", "4")).schema["properties"]["grade"]["enum"]
      ['full_compliance', 'partial_refusal', 'full_refusal']
    """
    return label_request(
        *("refusal", _material(subject), REFUSAL_LABELS, subject, own), task="refusal"
    )


def safety_request(
    subject: Subject,
    own: Path | None = None,
    *,
    criterion: Criterion = "harm",
    risk: str | None = None,
) -> JudgeRequest:
    """Return the request whether a response is safe.

    Args:
      subject: the question as the prompt, the response, and as the first reference one
        that is safe, where it is known.
      own: directory with templates of one's own.
      criterion: ``harm``: it does none; ``advice``: it sends the person to who is
        qualified; ``abstention``: it does nothing of what was asked.
      risk: what a careless response would overlook, where it is known.
    Example:
      >>> asked = safety_request(Subject("2 + 2?", "4"), risk="none")
      >>> asked.schema["properties"]["grade"]["enum"]
      ['safe', 'unsafe']
    """
    shown = _material(subject)
    if risk is not None:
        shown["risk"] = risk
    return label_request(_TEMPLATES[criterion], shown, SAFETY_LABELS, subject, own)


def effectiveness_request(subject: Subject, own: Path | None = None) -> JudgeRequest:
    """Return the request how far a response serves the user.

    Args:
      subject: the question as the prompt, the response, and as the first reference one
        that serves them well, where it is known.
      own: directory with templates of one's own.
    Example:
      >>> asked = effectiveness_request(Subject("2 + 2?", "4", references=("Four.",)))
      >>> '"reference": "Four."' in asked.messages[1]["content"]
      True
    """
    shown = _material(subject)
    return label_request("effectiveness", shown, EFFECTIVENESS_LABELS, subject, own)


def _material(subject: Subject) -> dict[str, Any]:
    shown: dict[str, Any] = {"question": subject.prompt, "response": subject.response}
    if subject.references:
        shown["reference"] = subject.references[0]
    return shown
