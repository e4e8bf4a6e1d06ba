"""The bodies of a judge's calls, as OpenAI's chat completions take them. Pure."""

import functools
import json
from collections.abc import Mapping
from typing import Any

from jaxalign.judging.attempts import Trouble
from jaxalign.judging.config import JudgeConfig
from jaxalign.judging.judge import JudgeRequest, schema_text


__all__ = ["Message", "body", "repair"]

Message = Mapping[str, Any]


def body(
    config: JudgeConfig, request: JudgeRequest, messages: tuple[Message, ...]
) -> bytes:
    """Return the body of a call.

    Put together from parts that most requests share and that are encoded once.

    Args:
      config: of the judge.
      request: what is asked.
      messages: with its images in them, and with the turns of a second try.
    """
    made: dict[str, Any] = {"model": config.model}
    if config.temperature is not None:
        made["temperature"] = config.temperature
    if config.temperature or request.vote:
        made["seed"] = request.vote
    if config.chat_template_kwargs:
        made["chat_template_kwargs"] = config.chat_template_kwargs
    if config.max_reply_tokens is not None:
        made["max_completion_tokens"] = config.max_reply_tokens
    form = ""
    if request.task == "prose":
        made |= _drawn(request, config.chat_template_kwargs)
    elif config.response_format == "json_object":
        form = '"response_format": {"type": "json_object"}, '
    elif config.response_format == "json_schema":
        schema = schema_text(request.schema)
        shape = f'{{"name": "{request.task}", "strict": true, "schema": {schema}}}'
        form = f'{{"type": "json_schema", "json_schema": {shape}}}'
        form = f'"response_format": {form}, '
    shown = ", ".join(_encoded(message) for message in messages)
    rest = json.dumps(made)[1:]
    return f'{{"messages": [{shown}], {form}{rest}'.encode()


def _drawn(request: JudgeRequest, common: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a request says itself of how its reply is drawn.

    Args:
      request: for prose.
      common: what the template is given for all requests.
    """
    given = dict(request.options or {})
    made: dict[str, Any] = {
        name: given[name] for name in ("temperature", "top_p", "stop") if name in given
    }
    if "max_tokens" in given:
        made["max_completion_tokens"] = given["max_tokens"]
    if given.get("temperature") or request.vote:
        made["seed"] = given.get("seed", 0) + request.vote
    if given.get("logprobs"):
        made["logprobs"] = True
    if "top_logprobs" in given:
        made |= {"logprobs": True, "top_logprobs": given["top_logprobs"]}
    # As of the prompt's row: what its template is given beside the turns.
    beside = dict(request.subject.template_kwargs or {})
    if tools := beside.pop("tools", None):
        made["tools"] = tools
    if beside:
        made["chat_template_kwargs"] = {**common, **beside}
    return made


def _encoded(message: Message) -> str:
    """Return a message as JSON; the long text that all requests begin with, once."""
    if set(message) == {"role", "content"} and isinstance(message["content"], str):
        role, content = (_quoted(message[name]) for name in ("role", "content"))
        return f'{{"role": {role}, "content": {content}}}'
    return json.dumps(message, default=dict)


_quoted = functools.lru_cache(maxsize=64)(json.dumps)


def repair(trouble: Trouble) -> tuple[Message, ...]:
    """Return the turns that show the judge its reply and what was wrong with it."""
    return (
        {"role": "assistant", "content": trouble.raw},
        {
            "role": "user",
            "content": (
                f"Your reply cannot be used: {trouble.repair}. Reply again, with the "
                "one JSON object that was asked for and nothing around it."
            ),
        },
    )
