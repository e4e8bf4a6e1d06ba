"""What a judge is asked, what it answers, and what a judge is.

A request says the same thing twice: as messages and the JSON schema of the reply, for
judges that read prose, and as its subject, for judges that compute. A verdict is either
a value of that schema or a failure that keeps the raw reply; it is never a made-up
score.
"""

import functools
import hashlib
import json
from collections.abc import AsyncIterator, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable


__all__ = [
    "Expecting",
    "Judge",
    "Proven",
    "JudgeRequest",
    "Schema",
    "Subject",
    "Task",
    "Verdict",
    "digest",
    "hash_of",
    "message_text",
    "request_key",
    "schema_text",
]

Task = Literal[
    "scores",  # {"segments": [{aspect: 0..4, ...}, ...]}
    "claims",  # {"claims": ["...", ...]}
    "questions",  # {"questions": ["...", ...]}, one for each claim
    "observations",  # {"observations": [{malicious_content, source, risk_category}]}
    "verify",  # {"answer": "yes" | "no"}
    "compare",  # {"better": "A" | "B" | "tie"}
    "grade",  # {"grade": "correct" | "incorrect" | "not_attempted"}
    "label",  # {"grade": one of the labels that the schema names}
    "refusal",  # the same, of a response that may refuse
    "rating",  # {"rating": 1..10}
    "effects",  # {"segments": [{"helpfulness": 0..4, "risk_1": -1..1, ...}, ...]}
    "prose",  # {"text", "finish_reason", "top_logprobs"}: any text, taken as it is
]


class Schema(dict[str, Any]):
    """A JSON schema that is written once, however many requests share it.

    >>> Schema({"type": "object"}).text
    '{"type": "object"}'
    """

    @functools.cached_property
    def text(self) -> str:
        """The schema as JSON; some judges fill it in in its order."""
        return json.dumps(self, default=dict)


def schema_text(schema: Mapping[str, Any]) -> str:
    """Return a schema as JSON.

    >>> schema_text({"type": "object"})
    '{"type": "object"}'
    """
    return (schema if isinstance(schema, Schema) else Schema(schema)).text


@dataclass(frozen=True)
class Subject:
    """What a request is about, without any wording.

    >>> subject = Subject("2 + 2?", "It is 4.", spans=((0, 8),))
    >>> [subject.response[slice(*span)] for span in subject.spans]
    ['It is 4.']
    """

    prompt: str | tuple[Mapping[str, str], ...]
    """A plain text, or the turns of a conversation."""
    response: str
    spans: tuple[tuple[int, int], ...] = ()
    """Half-open code-point offsets of the segments in the response."""
    aspects: tuple[str, ...] = ()
    other: str | None = None
    """The second response of a comparison."""
    statement: str | None = None
    """The yes-or-no question of a ``verify``; the claims of ``questions`` and the risks
    of ``rating`` and ``effects``, one a line."""
    references: tuple[str, ...] = ()
    """Accepted answers, of tasks that have a ground truth."""
    images: tuple[str, ...] = ()
    template_kwargs: Mapping[str, Any] | None = None
    """What the prompt's chat template is given beside the turns, such as ``tools``; of
    requests to judges that render the conversation themselves."""


@dataclass(frozen=True)
class JudgeRequest:
    """One question to a judge.

    >>> messages = ({"role": "user", "content": "Is 4 right?"},)
    >>> JudgeRequest("verify", messages, Schema({}), Subject("2 + 2?", "4")).vote
    0
    """

    task: Task
    messages: tuple[Mapping[str, Any], ...]
    """OpenAI's chat format: a system and a user message."""
    schema: Mapping[str, Any]
    """JSON schema of the reply; it fixes its whole shape."""
    subject: Subject
    vote: int = 0
    """Which of several equal requests, where a judge is asked more than once."""
    options: Mapping[str, Any] | None = None
    """How ``prose`` is drawn where that is the request's own: the endpoint's
    ``temperature``, ``top_p``, ``max_tokens``, ``seed``, ``stop``, ``top_logprobs``."""


@dataclass(frozen=True)
class Verdict:
    """What became of a request.

    >>> Verdict({"answer": "yes"}).failure is None, Verdict(None, "empty").value is None
    (True, True)
    """

    value: Any
    """The reply, valid under the request's schema; None where there is no verdict."""
    failure: str | None = None
    """Why there is no verdict; None where there is one."""
    raw: str | None = None
    """The last reply, verbatim, if there was any."""
    attempts: int = 1
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0
    """Of the tokens, by the prices that the user gave."""


@runtime_checkable
class Judge(Protocol):
    """Anything that answers requests."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """All that its verdicts depend on beside the request, without secrets."""
        ...

    def grade(
        self, requests: Iterable[JudgeRequest]
    ) -> AsyncIterator[tuple[int, Verdict]]:
        """Yield (number of the request, verdict) as they come, in any order.

        Requests are drawn from the iterable as they can be sent, never all at once.
        A request that fails yields a verdict with ``failure``; only what makes every
        further request pointless (a refused key, a spent budget) raises.
        """
        ...


@runtime_checkable
class Proven(Protocol):
    """A judge that goes by whether a call with its settings has ever succeeded."""

    proven: bool


@runtime_checkable
class Expecting(Protocol):
    """A model in this process: it computes alike whatever of a run is left to do.

    It also goes on with a plain text, of a request that has no messages.
    """

    def expect(self, requests: Iterable[JudgeRequest]) -> None:
        """Say what will be asked in all, of which the store may know some."""
        ...


def message_text(message: Mapping[str, Any]) -> str:
    """Return the text of a message, without its pictures.

    >>> parts = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    >>> message_text({"role": "user", "content": parts})
    'What is it?'
    """
    content = message["content"]
    if isinstance(content, str):
        return content
    return "".join(part.get("text", "") for part in content)


def request_key(request: JudgeRequest, settings: Mapping[str, Any]) -> str:
    """Return what tells equal requests to equal judges: a SHA-256 in hexadecimal.

    >>> asked = JudgeRequest("verify", ({"role": "user", "content": "?"},), {},
    ...                 Subject("p", "r"))
    >>> request_key(asked, {"model": "m"})[:8]
    '8388c23e'
    """
    messages = [
        {**m, "content": digest(m["content"])} if isinstance(m["content"], str) else m
        for m in request.messages
    ]
    subject = dict(vars(request.subject))
    if not subject["template_kwargs"]:  # stores are older than this field
        del subject["template_kwargs"]
    what = {
        "task": request.task,
        "messages": messages,
        "schema": digest(schema_text(request.schema)),
        "subject": subject,
        "vote": request.vote,
        "judge": settings,
    }
    if request.options:
        what["options"] = request.options
    return hash_of(what)


def hash_of(value: Any) -> str:
    """Return the SHA-256 of a value as JSON, whatever the order of its keys.

    >>> hash_of({"a": 1, "b": 2}) == hash_of({"b": 2, "a": 1})
    True
    """
    return hashlib.sha256(_SORTED.encode(value).encode()).hexdigest()


_SORTED = json.JSONEncoder(sort_keys=True, default=dict)


@functools.lru_cache(maxsize=256)
def digest(text: str) -> str:
    """Return the SHA-256 of a text; that of a system message is made once.

    >>> digest("a text")[:8]
    '734194ed'
    """
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
