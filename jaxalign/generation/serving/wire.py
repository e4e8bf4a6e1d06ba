"""What OpenAI's clients send, made into what the engine is asked; what is refused.

Fields that would change the answer and that we cannot honour are refused by name, and
so are fields that we do not know: nothing is left out in silence. Log-probabilities
are those of the model itself, without temperature, penalty or truncation.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple

import pydantic
import pydantic_core

from jaxalign.data.records import Message, Prompt
from jaxalign.errors import did_you_mean
from jaxalign.generation.steps import MOST_RANKED


__all__ = ["ApiError", "ParsedRequest", "ChatBody", "CompletionBody", "parse"]

_MOST_TEXTS = 2048
"""Prompts times completions of one HTTP request."""

_Float = Annotated[float, pydantic.Field(ge=0, le=100, allow_inf_nan=False)]
_Share = Annotated[float, pydantic.Field(ge=0, le=1, allow_inf_nan=False)]
_Count = Annotated[int, pydantic.Field(ge=1, le=2**31 - 1)]
_Token = Annotated[int, pydantic.Field(ge=0, le=2**31 - 1)]
_Stop = Annotated[str, pydantic.Field(min_length=1, max_length=1000)]
# A long list of what is wrong would cost more than the answer.
_Some = pydantic.Field(min_length=1, fail_fast=True)
_Tokens = Annotated[list[_Token], _Some]


class ApiError(Exception):
    """An answer that is an error."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
    ):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    @property
    def body(self) -> dict[str, Any]:
        """Return OpenAI's error object."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {
            "error": {
                "message": str(self),
                "type": "rate_limit_error" if self.status == 429 else kind,
                "param": self.param,
                "code": self.code,
            }
        }


class ParsedRequest(NamedTuple):
    """An HTTP request, understood."""

    model: str
    is_chat: bool
    prompts: tuple[Prompt | tuple[int, ...], ...]
    """To be turned into tokens, or tokens already."""
    sampling: dict[str, Any]
    """Options of ``engine.Sampling``, those that were given."""
    logprobs: int | None
    """How many of the most probable tokens to tell with each; None tells nothing."""
    stream: bool
    include_usage: bool
    echo: bool = False
    """Whether each completion begins with its prompt."""
    only_prompt: bool = False
    """Whether nothing is to be completed."""

    def text(self, number: int) -> str | None:
        """Return a prompt that was given as a text."""
        text = getattr(self.prompts[number], "text", None)
        return text if isinstance(text, str) else None


class _Part(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(strict=True, extra="forbid", frozen=True)

    type: Literal["text"]
    text: str


class _Turn(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(strict=True, extra="forbid", frozen=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[_Part], _Some]
    # Of no consequence for the answer: who said it; what lm-eval adds to every turn.
    name: str | None = None
    type: Literal["text"] | None = None


class _StreamOptions(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(strict=True, extra="forbid", frozen=True)

    include_usage: bool = False
    include_obfuscation: bool = False


class _Body(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(strict=True, extra="forbid", frozen=True)

    model: str
    max_tokens: _Count | None = None
    temperature: _Float = 1.0
    top_p: _Share = 1.0
    n: Annotated[int, pydantic.Field(ge=1, le=128)] = 1
    seed: Annotated[int, pydantic.Field(ge=-(2**63), lt=2**63)] | None = None
    stop: (
        _Stop | Annotated[list[_Stop], pydantic.Field(max_length=4, fail_fast=True)]
    ) = ()  # pyright: ignore[reportAssignmentType]
    stream: bool = False
    stream_options: _StreamOptions | None = None
    # Not OpenAI's, but of most servers like it.
    top_k: Annotated[int, pydantic.Field(ge=0, le=2**31 - 1)] = 0
    min_p: _Share = 0.0
    repetition_penalty: Annotated[_Float, pydantic.Field(ge=0.01)] = 1.0
    # Of no consequence for the answer.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None


class ChatBody(_Body):
    """A request for chat completions."""

    messages: Annotated[list[_Turn], _Some]
    max_completion_tokens: _Count | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, pydantic.Field(ge=0, le=MOST_RANKED)] = 0


class CompletionBody(_Body):
    """A request for completions."""

    prompt: (
        str | _Tokens | Annotated[list[str], _Some] | Annotated[list[_Tokens], _Some]
    )
    # OpenAI's takes no 0 tokens, but harnesses that only want the prompt judged do.
    max_tokens: Annotated[int, pydantic.Field(ge=0, le=2**31 - 1)] | None = None
    logprobs: Annotated[int, pydantic.Field(ge=0, le=MOST_RANKED)] | None = None
    echo: bool = False
    best_of: int | None = None


_ONLY: dict[str, tuple[tuple[Any, ...], str]] = {
    "frequency_penalty": ((0,), "repetition_penalty is there in its place"),
    "presence_penalty": ((0,), "repetition_penalty is there in its place"),
    "logit_bias": (({},), "no token's logit can be changed"),
    "response_format": (({"type": "text"},), "answers are free text"),
    "tools": (([],), "the server calls no tools"),
    "tool_choice": (("none",), "the server calls no tools"),
    "parallel_tool_calls": ((), "the server calls no tools"),
    "functions": (([],), "the server calls no tools"),
    "function_call": (("none",), "the server calls no tools"),
    "modalities": ((["text"],), "answers are text"),
    "suffix": (("",), "nothing can be written before a given end"),
}
"""Fields by the values that change nothing, and why no other will do."""

_UNION_BRANCHES = ("string_type", "list_type", "too_short")


def parse(data: bytes, kind: type[ChatBody] | type[CompletionBody]) -> ParsedRequest:
    """Understand the body of a request.

    Args:
      data: JSON.
      kind: what it is to be.
    Raises:
      ApiError: 400, with what is wrong, what was got and what was expected.
    """
    fields = _object_of(data)
    for name, (values, why) in _ONLY.items():
        if name in fields and fields.pop(name) not in values:
            expected = f"leave it out or give {values[0]!r}" if values else "remove it"
            raise ApiError(
                f"{name} is not supported: {why}. {expected.capitalize()}",
                param=name,
                code="unsupported_parameter",
            )
    for name in fields:
        if name not in kind.model_fields:
            shown = name if len(name) <= 40 else f"{name[:37]}..."
            known = [*kind.model_fields, *_ONLY]
            raise ApiError(
                f"unknown field {shown!r}. {did_you_mean(shown, known)}",
                param=shown,
                code="unknown_parameter",
            )
    try:
        body = kind.model_validate(fields)
    except pydantic.ValidationError as error:
        raise _explained(error) from None
    if body.stream_options is not None and not body.stream:
        raise ApiError("stream_options goes with stream: true", param="stream_options")
    if isinstance(body, ChatBody):
        asked = _asked(body, (_conversation(body),), _chat_tokens(body))
        if body.top_logprobs and not body.logprobs:
            raise ApiError(
                "top_logprobs goes with logprobs: true", param="top_logprobs"
            )
        return asked._replace(logprobs=body.top_logprobs if body.logprobs else None)
    _check_completion(body)
    # What is not wanted is made and left out: it is a single token.
    asked = _asked(body, _prompts(body), 1 if body.max_tokens == 0 else body.max_tokens)
    return asked._replace(
        logprobs=body.logprobs, echo=body.echo, only_prompt=body.max_tokens == 0
    )


def _object_of(data: bytes) -> dict[str, Any]:
    """Read JSON; a field that is null is as good as left out."""
    try:
        value = pydantic_core.from_json(data, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(f"the body is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ApiError(f"the body must be a JSON object: got {_shown(value)}")
    messages = value.get("messages")
    if isinstance(messages, list):
        value["messages"] = [_given(m) if isinstance(m, dict) else m for m in messages]
    return _given(value)


def _given(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def _asked(
    body: ChatBody | CompletionBody,
    prompts: tuple[Prompt | tuple[int, ...], ...],
    max_new_tokens: int | None,
) -> ParsedRequest:
    if len(prompts) * body.n > _MOST_TEXTS:
        raise ApiError(
            f"{len(prompts)} prompts with {body.n} completions each: expected at most "
            f"{_MOST_TEXTS} completions. Send several requests",
            param="n",
        )
    options: dict[str, Any] = {
        "num_samples": body.n,
        "stop": body.stop if isinstance(body.stop, str) else tuple(body.stop),
    }
    for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty"):
        options[name] = getattr(body, name)
    if body.seed is not None:
        options["seed"] = body.seed % 2**32
    if max_new_tokens is not None:
        options["max_new_tokens"] = max_new_tokens
    usage = body.stream_options is not None and body.stream_options.include_usage
    is_chat = isinstance(body, ChatBody)
    return ParsedRequest(
        body.model, is_chat, prompts, options, None, body.stream, usage
    )


def _chat_tokens(body: ChatBody) -> int | None:
    given = {body.max_tokens, body.max_completion_tokens} - {None}
    if len(given) > 1:
        raise ApiError(
            f"max_tokens {body.max_tokens} and max_completion_tokens "
            f"{body.max_completion_tokens} mean the same: give one of them",
            param="max_tokens",
        )
    return next(iter(given), None)


def _conversation(body: ChatBody) -> Prompt:
    """Return the turns, parts of a text put together."""
    turns = []
    for turn in body.messages:
        parts = turn.content
        text = parts if isinstance(parts, str) else "".join(p.text for p in parts)
        # OpenAI's newer name, which no template knows.
        role = "system" if turn.role == "developer" else turn.role
        turns.append(Message(role=role, content=text))
    if turns[-1].role == "assistant":
        raise ApiError(
            "the last message is the assistant's: expected one that can be answered. "
            "An answer cannot be gone on with",
            param="messages",
        )
    return Prompt(tuple(turns), None, "messages")


def _check_completion(body: CompletionBody) -> None:
    if body.max_tokens == 0 and not body.echo:
        raise ApiError(
            "max_tokens must be at least 1: got 0, which needs echo: true",
            param="max_tokens",
        )
    if body.best_of is not None and body.best_of != body.n:
        raise ApiError(
            f"best_of must equal n = {body.n}: got {_shown(body.best_of)}. Completions "
            "are not ranked",
            param="best_of",
        )


def _prompts(body: CompletionBody) -> tuple[Prompt | tuple[int, ...], ...]:
    given: Any = body.prompt
    many = given if isinstance(given, list) else [given]
    if isinstance(many[0], int):
        many = [many]
    return tuple(
        Prompt(one, None, "prompt") if isinstance(one, str) else tuple(one)
        for one in many
    )


def _explained(error: pydantic.ValidationError) -> ApiError:
    """Say what is wrong with the first field that is."""
    problems = error.errors(include_url=False, include_context=False)
    # Of a value that may be of several kinds, the kind that fits best says most.
    first = problems[0]["loc"][0]
    mine = [p for p in problems if p["loc"][0] == first]
    problem = max(mine, key=lambda p: (p["type"] not in _UNION_BRANCHES, len(p["loc"])))
    names = set(_Turn.model_fields) | set(_Part.model_fields)
    names |= set(_StreamOptions.model_fields)
    path = str(first)
    for part in problem["loc"][1:]:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part in names or problem["type"] == "extra_forbidden":
            path += f".{part}" if "[" not in part else ""
    path = path if len(path) <= 80 else f"{path[:77]}..."
    if problem["type"] == "missing":
        return ApiError(f"{path} is missing", param=path, code="missing_parameter")
    expected = problem["msg"][0].lower() + problem["msg"][1:]
    if first == "prompt":
        expected = "expected a text, a list of texts, a list of tokens, or a list of "
        expected += "such lists, none of them empty"
    elif path.endswith(".content"):
        expected = 'expected a text or a list of {"type": "text", "text": ...}'
    elif path.endswith(".type"):
        expected = 'only parts of type "text" are supported, no images and no sound'
    elif problem["type"] == "extra_forbidden":
        expected = "not a known field here"
    return ApiError(f"{path}: {expected}: got {_shown(problem['input'])}", param=path)


def _shown(value: Any) -> str:
    """Show a value without repeating a text that may be long."""
    if isinstance(value, str):
        return repr(value) if len(value) <= 40 else f"a text of {len(value)} characters"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    if isinstance(value, Mapping):
        return f"an object of {len(value)} fields"
    if isinstance(value, int) and abs(value) >= 10**20:
        return "a number of more than 20 digits"
    return repr(value)
