"""From a task's questions to answers: requests, who answers them, what they said."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from jaxalign.data.images import NamedPictures
from jaxalign.data.picture import Picture
from jaxalign.errors import UserError
from jaxalign.evaluation.task import Answer, Question
from jaxalign.judging.graders import prose_request, without_draft
from jaxalign.judging.judge import JudgeRequest, Subject, Verdict


__all__ = ["Asked", "answer_of", "request_of", "text_of", "with_pictures"]


@dataclasses.dataclass(frozen=True)
class Asked:
    """One answer that is wanted.

    >>> Asked(0, Question("final", ()), 0).sample
    0
    """

    index: int
    """Of the item."""
    question: Question
    sample: int


def request_of(
    question: Question,
    sample: int,
    before: Sequence[Mapping[str, Any]],
    sampling: Mapping[str, Any],
    pictures: NamedPictures,
    *,
    logprobs: bool = False,
) -> JudgeRequest:
    """Return the request for an answer.

    Args:
      question: of the task.
      sample: which of several answers.
      before: turns that it goes on from.
      sampling: how it is drawn: fields of ``Sampling``.
      pictures: names those of the question.
      logprobs: whether the log-probabilities of its tokens are wanted.
    Raises:
      UserError: a picture is not there, or there is not one for each place.
    """
    names = pictures.references(question.images)
    left = list(names)
    turns = [_turn(message, left) for message in question.messages]
    if left:
        raise UserError(
            f"the question {question.name} has {len(names)} pictures and places for "
            f"{len(names) - len(left)}"
        )
    options = dict(sampling)
    options["max_tokens"] = options.pop("max_new_tokens", None)
    if logprobs:
        options["logprobs"] = True
    subject = Subject(text_of(question.messages), "", images=_all(before) + names)
    kept = {name: value for name, value in options.items() if value is not None}
    return prose_request([*before, *turns], subject, options=kept, vote=sample)


def _turn(message: Mapping[str, Any], left: list[str]) -> Mapping[str, Any]:
    content = message["content"]
    if isinstance(content, str):
        return message
    parts = []
    for part in content:
        if part["type"] == "text":
            parts.append(part)
        elif left:
            parts.append({"type": "image_url", "image_url": {"url": left.pop(0)}})
        else:
            raise UserError("a question has more places for pictures than pictures")
    return {**message, "content": parts}


def _all(turns: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """Return the references of the pictures that turns show."""
    return tuple(
        part["image_url"]["url"]
        for turn in turns
        if not isinstance(turn["content"], str)
        for part in turn["content"]
        if part["type"] == "image_url"
    )


def text_of(messages: Sequence[Mapping[str, Any]]) -> str:
    """Return what the last message says, ``[image]`` in the place of a picture.

    >>> parts = [{"type": "image"}, {"type": "text", "text": "What is this?"}]
    >>> text_of([{"role": "user", "content": parts}])
    '[image] What is this?'
    """
    content = messages[-1]["content"]
    if isinstance(content, str):
        return content
    return " ".join(p["text"] if p["type"] == "text" else "[image]" for p in content)


def with_pictures(
    request: JudgeRequest, images: Sequence[Picture], pictures: NamedPictures
) -> JudgeRequest:
    """Return a request to the judge that shows pictures behind its last message.

    One that shows these very pictures already stays as it is; they are named, so that
    they are found when it is sent.
    """
    if not images:
        return request
    names = pictures.references(images)
    if request.subject.images == names:
        return request
    last = request.messages[-1]
    content = last["content"]
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    shown = [{"type": "image_url", "image_url": {"url": name}} for name in names]
    return dataclasses.replace(
        request,
        messages=(*request.messages[:-1], {**last, "content": [*parts, *shown]}),
        subject=dataclasses.replace(request.subject, images=names),
    )


def answer_of(verdict: Verdict) -> Answer:
    """Return what a model said.

    A reasoning model's draft before ``</think>`` is no part of its answer.

    >>> answer_of(Verdict({"text": "<think>2 + 2</think> 4", "finish_reason": "stop"}))
    Answer(text='4', status='ok', reason=None, mean_logp=None)
    """
    if verdict.failure is not None:
        return Answer("", "failed", verdict.failure)
    value = verdict.value
    text = without_draft(value["text"])
    if value["finish_reason"] in ("refusal", "content_filter"):
        return Answer(text, "refused")
    return Answer(text, "ok" if text else "empty", None, value.get("mean_logp"))
