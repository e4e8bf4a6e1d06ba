"""What OpenAI's clients send, made into what the engine is asked; what is refused.

Fields that would change the answer and that we cannot honour are refused by name, and
so are fields that we do not know: nothing is left out in silence. Log-probabilities
are those of the model itself, without temperature, bias, penalty or truncation; where a
structure forbids tokens, among the others.
"""

import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

import pydantic
import pydantic_core

from jaxalign.data.records import Prompt
from jaxalign.errors import did_you_mean
from jaxalign.generation.serving import neutral
from jaxalign.generation.serving.api_error import ApiError, shown
from jaxalign.generation.serving.bodies import (
    ChatBody,
    CompletionBody,
    inner_names,
)
from jaxalign.generation.serving.conversation import conversation
from jaxalign.generation.serving.steering_of import steering_of
from jaxalign.generation.steering import Steering


__all__ = [
    "ApiError",
    "ChatBody",
    "CompletionBody",
    "ParsedRequest",
    "parse",
    "read",
]

_MOST_TEXTS = 2048
"""Prompts times completions of one HTTP request."""


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
    steering: Steering | None = None
    structure_field: str | None = None
    """The field that says what the text has to be."""
    stop_tokens: tuple[int, ...] = ()
    """Tokens that end a completion beside the model's own."""
    ignore_eos: bool = False
    """Whether the model's own end none."""

    def text(self, number: int) -> str | None:
        """Return a prompt that was given as a text."""
        text = getattr(self.prompts[number], "text", None)
        return text if isinstance(text, str) else None


_Kind = TypeVar("_Kind", bound=pydantic.BaseModel)

_UNION_BRANCHES = ("string_type", "list_type", "too_short")


def parse(data: bytes, kind: type[ChatBody] | type[CompletionBody]) -> ParsedRequest:
    """Understand the body of a request.

    Args:
      data: JSON.
      kind: what it is to be.
    Raises:
      ApiError: 400, with what is wrong, what was got and what was expected.
    """
    body = read(data, kind)
    if body.stream_options is not None and not body.stream:
        raise ApiError("stream_options goes with stream: true", param="stream_options")
    if isinstance(body, ChatBody):
        prompt = conversation(body.messages, body)
        asked = _asked(body, (prompt,), _chat_tokens(body))
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


def read(data: bytes, kind: type[_Kind]) -> _Kind:
    """Read a body of a kind, without what that says of itself.

    Raises:
      ApiError: 400, with what is wrong, what was got and what was expected.
    """
    honoured = kind.model_fields
    fields = dict(neutral.without_neutral(_object_of(data), honoured))
    for name in fields:
        if name not in honoured:
            short = name if len(name) <= 40 else f"{name[:37]}..."
            known = [*honoured, *neutral.KNOWN]
            raise ApiError(
                f"unknown field {short!r}. {did_you_mean(short, known)}",
                param=short,
                code="unknown_parameter",
            )
    try:
        return kind.model_validate(fields)
    except pydantic.ValidationError as error:
        raise _explained(error) from None


def _object_of(data: bytes) -> dict[str, Any]:
    """Read JSON; a field that is null is as good as left out."""
    try:
        value = pydantic_core.from_json(data, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(f"the body is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ApiError(f"the body must be a JSON object: got {shown(value)}")
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
    for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
        options[name] = getattr(body, name)
    options["top_k"] = max(body.top_k, 0)  # vLLM's -1 is all of them too
    if body.seed is not None:
        options["seed"] = body.seed % 2**32
    if max_new_tokens is not None:
        options["max_new_tokens"] = max_new_tokens
    if max_new_tokens is not None and body.min_tokens > max_new_tokens:
        raise ApiError(
            f"min_tokens {body.min_tokens} is above max_tokens {max_new_tokens}",
            param="min_tokens",
        )
    usage = body.stream_options is not None and body.stream_options.include_usage
    steering, field = steering_of(body)
    return ParsedRequest(
        body.model,
        isinstance(body, ChatBody),
        prompts,
        options,
        None,
        body.stream,
        usage,
        steering=steering,
        structure_field=field,
        stop_tokens=tuple(body.stop_token_ids),
        ignore_eos=body.ignore_eos,
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


def _check_completion(body: CompletionBody) -> None:
    if body.max_tokens == 0 and not body.echo:
        raise ApiError(
            "max_tokens must be at least 1: got 0, which needs echo: true",
            param="max_tokens",
        )
    if body.best_of is not None and body.best_of != body.n:
        raise ApiError(
            f"best_of must equal n = {body.n}: got {shown(body.best_of)}. Completions "
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
    names = inner_names()
    path = str(first)
    for before, part in itertools.pairwise(problem["loc"]):
        if isinstance(before, int) and ".content" in path:
            continue  # the kind of the part
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
    elif problem["type"].startswith("union_tag"):
        expected = 'only parts of type "text" and "image_url" are supported, no sound'
        path += ".type"
    elif problem["type"] == "extra_forbidden":
        expected = "not a known field here"
    return ApiError(f"{path}: {expected}: got {shown(problem['input'])}", param=path)
