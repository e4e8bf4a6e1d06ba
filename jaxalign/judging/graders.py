"""Requests for labels: a template, the material, and the labels to choose from.

What decomposers and benchmarks ask has this in common: the words are a Markdown file
(:mod:`.wording`), what is judged is one JSON object, and the reply names a label.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxalign.data import images
from jaxalign.judging import wording
from jaxalign.judging.judge import JudgeRequest, Schema, Subject, Task


__all__ = [
    "GRADES",
    "PROSE",
    "YES_OR_NO",
    "closed",
    "grade_request",
    "label_request",
    "make_request",
    "prose_request",
    "texts",
    "without_draft",
]

GRADES = ("correct", "incorrect", "not_attempted")
"""Of an answer whose truth is known: SimpleQA's, https://arxiv.org/abs/2411.04368."""


def closed(**properties: Any) -> Schema:
    """Return the JSON schema of an object with exactly these properties.

    >>> closed(answer={"type": "string"})["required"]
    ['answer']
    """
    return Schema(
        type="object",
        properties=properties,
        required=list(properties),
        additionalProperties=False,
    )


def texts(at_least: int, at_most: int) -> dict[str, Any]:
    """Return the JSON schema of a list of so many texts.

    >>> texts(1, 3)["maxItems"]
    3
    """
    bounds = {"minItems": at_least, "maxItems": at_most}
    return {"type": "array", "items": {"type": "string"}, **bounds}


YES_OR_NO = closed(answer={"type": "string", "enum": ["yes", "no"]})


def make_request(
    task: Task,
    template: str,
    material: Mapping[str, Any],
    schema: Mapping[str, Any],
    subject: Subject,
    own: Path | None,
    **values: str,
) -> JudgeRequest:
    """Return a request in a template's words; it shows the subject's images.

    Args:
      task: what kind of reply is wanted.
      template: name of the file of wording.
      material: what the reply is about; it goes in as one JSON object, which no text
        in it can close.
      schema: of the reply.
      subject: the material again, without wording.
      own: a directory with templates of the user's that replace ours.
      **values: of the template's other places.
    Example:
      >>> schema = closed(grade={"type": "string", "enum": ["correct", "incorrect"]})
      >>> material = {"question": "2 + 2?", "accepted": ["4"], "response": "4"}
      >>> subject = Subject("2 + 2?", "4")
      >>> len(make_request("grade", "grade", material, schema, subject, None).messages)
      2
    """
    values["material"] = json.dumps(
        material, ensure_ascii=False, indent=1, default=dict
    )
    system, user = wording.messages(template, values, own)
    shown = images.with_images(user, subject.images)
    return JudgeRequest(task, (system, shown), schema, subject)


def label_request(
    template: str,
    material: Mapping[str, Any],
    labels: Sequence[str],
    subject: Subject,
    own: Path | None = None,
    *,
    task: Task = "label",
) -> JudgeRequest:
    """Return the request for one of some labels: ``{"grade": label}``.

    Args:
      template: name of the file of wording.
      material: what is judged, as it is shown.
      labels: that the reply may name.
      subject: the same without wording, for judges that compute.
      own: a directory with templates of the user's that replace ours.
      task: what kind of label it is.
    Example:
      >>> asked = grade_request(Subject("2 + 2?", "It is 4.", references=("4",)))
      >>> asked.schema["properties"]["grade"]["enum"]
      ['correct', 'incorrect', 'not_attempted']
    """
    schema = closed(grade={"type": "string", "enum": list(labels)})
    return make_request(task, template, material, schema, subject, own)


def grade_request(
    subject: Subject, own: Path | None = None, *, question: str | None = None
) -> JudgeRequest:
    """Return the request whether an answer is correct, incorrect or not attempted.

    Args:
      subject: the question, the response, and the accepted answers as references.
      own: a directory with templates of the user's that replace ours.
      question: default the subject's prompt.
    Example:
      >>> asked = grade_request(Subject("2 + 2?", "It is 4.", references=("4",)))
      >>> asked.task, asked.subject.references
      ('grade', ('4',))
    """
    material = {
        "question": subject.prompt if question is None else question,
        "accepted": list(subject.references),
        "response": subject.response,
    }
    return label_request("grade", material, GRADES, subject, own, task="grade")


PROSE = Schema(
    type="object",
    properties={"text": {"type": "string"}, "finish_reason": {"type": "string"}},
    required=["text", "finish_reason"],
)
"""What a reply in prose comes to; no endpoint is told it."""


def prose_request(
    messages: Sequence[Mapping[str, Any]],
    subject: Subject,
    *,
    options: Mapping[str, Any] | None = None,
    vote: int = 0,
) -> JudgeRequest:
    """Return a request whose reply is any text.

    The verdict's value is ``{"text", "finish_reason", "top_logprobs"}``, the last one
    [token, log-probability] of the most probable first tokens, or None.

    Args:
      messages: OpenAI's; pictures as parts with the references of ``subject.images``.
      subject: what it is about.
      options: how it is drawn, see :class:`.judge.JudgeRequest`.
      vote: which of several equal requests.
    Example:
      >>> turns = [{"role": "user", "content": "2 + 2?"}]
      >>> prose_request(turns, Subject("2 + 2?", ""), options={"max_tokens": 8}).task
      'prose'
    """
    return JudgeRequest("prose", tuple(messages), PROSE, subject, vote, options)


_AFTER_THINKING = "</think>"


def without_draft(text: str) -> str:
    """Return an answer without the draft before it, and without blanks around it.

    A reasoning model's draft before ``</think>`` is no part of its answer.

    >>> without_draft("<think>2 + 2</think> It is 4. ")
    'It is 4.'
    """
    return text.rpartition(_AFTER_THINKING)[2].strip()
