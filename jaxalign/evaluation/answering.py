"""From a task's questions to answers: requests, who answers them, what they said."""

import dataclasses
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from typing import Any

from jaxalign.data.images import NamedPictures
from jaxalign.data.picture import Picture
from jaxalign.errors import UserError
from jaxalign.evaluation.config import EndpointConfig
from jaxalign.evaluation.task import Answer, Question
from jaxalign.judging.graders import prose_request
from jaxalign.judging.judge import JudgeRequest, Subject, Verdict


__all__ = [
    "Asked",
    "Endpoint",
    "answer_of",
    "endpoint_settings",
    "request_of",
    "said",
    "text_of",
    "with_pictures",
]

_AFTER_THINKING = "</think>"


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
    """Return a request to the judge that shows pictures behind its last message."""
    if not images:
        return request
    names = pictures.references(images)
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
    text = said(value["text"])
    if value["finish_reason"] in ("refusal", "content_filter"):
        return Answer(text, "refused")
    return Answer(text, "ok" if text else "empty", None, value.get("mean_logp"))


def said(text: str) -> str:
    """Return a reply without the draft before it, and without blanks around it.

    >>> said(" It is 4. ")
    'It is 4.'
    """
    return text.rpartition(_AFTER_THINKING)[2].strip()


def endpoint_settings(config: EndpointConfig) -> dict[str, Any]:
    """Return what answers depend on; where the model is served is no part of it.

    >>> endpoint_settings(EndpointConfig(model="gpt-4o-mini"))
    {'endpoint': 'gpt-4o-mini'}
    """
    found: dict[str, Any] = {"endpoint": config.model}
    if config.chat_template_kwargs:
        found["chat_template_kwargs"] = config.chat_template_kwargs
    return found


class Endpoint:
    """A model behind an endpoint, which is asked as a judge is.

    Messages about it name the options by which it was given.
    """

    def __init__(self, config: EndpointConfig, pictures: NamedPictures):
        """Make one; nothing is sent yet.

        Raises:
          UserError: the client is not installed, or URL or key cannot be used.
        """
        from jaxalign.judging.make import make_judge

        self.proven = False
        self.settings = endpoint_settings(config)
        try:
            self._judge: Any = make_judge(config.as_judge(), load_image=pictures.load)
        except UserError as error:
            raise UserError(_named(str(error))) from None

    async def grade(
        self, requests: Iterable[JudgeRequest]
    ) -> AsyncIterator[tuple[int, Verdict]]:
        """Yield (number of the request, answer) as they come.

        Raises:
          UserError: see ``OpenAIJudge.grade``.
        """
        self._judge.proven = self.proven
        try:
            async for number, verdict in self._judge.grade(requests):
                if verdict.failure is not None:
                    failure = _named(verdict.failure)
                    verdict = dataclasses.replace(verdict, failure=failure)
                yield number, verdict
        except UserError as error:
            raise UserError(_named(str(error))) from None


def _named(text: str) -> str:
    """Return a message of the judges' client as one about the endpoint."""
    said = text.replace("judge.", "endpoint.").replace("the judge at", "the model at")
    return said.replace("What was judged", "What was answered")
