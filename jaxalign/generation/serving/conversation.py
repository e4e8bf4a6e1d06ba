"""A request's messages, made into what the chat template is given."""

import json
from collections.abc import Sequence
from typing import Any

from jaxalign.data.columns import check_template_kwargs
from jaxalign.data.records import Message, Prompt
from jaxalign.errors import UserError
from jaxalign.generation.serving.api_error import ApiError, shown
from jaxalign.generation.serving.bodies import (
    ChatBody,
    ConversationBody,
    ImagePart,
    TextPart,
    Turn,
)


__all__ = ["conversation"]

_KEPT = ("name", "tool_call_id", "reasoning_content")


def conversation(messages: Sequence[Turn], body: ConversationBody) -> Prompt:
    """Return the turns, parts of a text put together, with the template's options.

    A picture's part has in ``image`` where it is, see ``pictures.looked_up``.

    Raises:
      ApiError: 400, a turn or an option that no template is given.
    """
    turns = [
        Message.model_validate(_turn(turn, f"messages[{number}]"))
        for number, turn in enumerate(messages)
    ]
    field = "chat_template_kwargs"
    try:
        check_template_kwargs(body.chat_template_kwargs, field)
    except UserError as error:
        raise ApiError(str(error), param=field) from None
    options: dict[str, Any] = dict(body.chat_template_kwargs)
    tools = _tools(body)
    if tools:
        options["tools"] = tools
    if isinstance(body, ChatBody) and body.reasoning_effort is not None:
        options["reasoning_effort"] = body.reasoning_effort
    return Prompt(
        tuple(turns), None, "messages", {**options, **_ending(body, turns[-1].role)}
    )


def _ending(body: ConversationBody, last: str) -> dict[str, bool]:
    """Return how the prompt ends: by what the body says, else with its question."""
    if body.continue_final_message:
        if body.add_generation_prompt:
            raise ApiError(
                "continue_final_message and add_generation_prompt exclude each other: "
                "give one of them",
                param="add_generation_prompt",
            )
        if last != "assistant":
            raise ApiError(
                f"continue_final_message goes on with an answer: the last message is "
                f"of the role {last}",
                param="continue_final_message",
            )
        return {"add_generation_prompt": False, "continue_final_message": True}
    if body.add_generation_prompt is not None:
        return {"add_generation_prompt": body.add_generation_prompt}
    if last == "assistant":
        raise ApiError(
            "the last message is the assistant's: expected one that can be answered. "
            "continue_final_message: true goes on with it",
            param="messages",
        )
    return {"add_generation_prompt": True}


def _turn(turn: Turn, place: str) -> dict[str, Any]:
    parts = turn.content
    if parts is None and not (turn.tool_calls or turn.reasoning_content):
        raise ApiError(
            f"{place}.content is missing",
            param=f"{place}.content",
            code="missing_parameter",
        )
    content: Any = parts
    if isinstance(parts, list):
        content = [_part(part) for part in parts]
        if all(isinstance(part, TextPart) for part in parts):
            content = "".join(part["text"] for part in content)
    # OpenAI's newer name, which no template knows.
    role = "system" if turn.role == "developer" else turn.role
    made: dict[str, Any] = {"role": role, "content": content}
    for name in _KEPT:
        if getattr(turn, name) is not None:
            made[name] = getattr(turn, name)
    if turn.tool_calls:
        made["tool_calls"] = [
            _call(call, f"{place}.tool_calls") for call in turn.tool_calls
        ]
    return made


def _part(part: TextPart | ImagePart) -> dict[str, Any]:
    if isinstance(part, ImagePart):
        return {"type": "image", "image": part.image_url.url}
    return {"type": "text", "text": part.text}


def _call(call: dict[str, Any], place: str) -> dict[str, Any]:
    """Return a call of a tool with its arguments as an object, as templates take it."""
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ApiError(
            f"{place} must hold calls of functions with a name: got {shown(function)}",
            param=place,
        )
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            arguments = None
    if not isinstance(arguments, dict):
        raise ApiError(f"{place} has arguments that are no JSON object", param=place)
    return {**call, "function": {**function, "arguments": arguments}}


def _tools(body: ConversationBody) -> list[dict[str, Any]]:
    if isinstance(body, ChatBody) and body.tool_choice == "none":
        return []
    for tool in body.tools:
        function = tool.get("function")
        named = isinstance(function, dict) and isinstance(function.get("name"), str)
        if tool.get("type") != "function" or not named:
            raise ApiError(
                'tools must hold {"type": "function", "function": {"name": ...}}: got '
                f"{shown(tool)}",
                param="tools",
            )
    return body.tools
