"""LLaMA-Factory's two layouts, Alpaca's columns and ShareGPT's turns.

https://llamafactory.readthedocs.io/en/latest/getting_started/data_preparation.html: a
pair has ``chosen`` and ``rejected``, KTO a boolean ``kto_tag``, supervised data has
neither. Where a row has ``images``, ``<image>`` in a text stands for one of them.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from jaxalign.data.layouts.foreign import (
    Converted,
    Dropped,
    Row,
    messages,
    text,
    turn,
    user_turn,
)
from jaxalign.errors import UserError


__all__ = ["alpaca", "convert", "convert_sharegpt", "sharegpt"]


def alpaca(row: Mapping[str, Any], where: str = "row") -> dict[str, Any] | Dropped:
    """Make a record of ``instruction, input, chosen, rejected`` or ``output``.

    The question is the instruction and, on a line of its own, the input; ``system`` and
    ``history`` (pairs of question and answer) come before it.

    Returns:
      The record, or why there is none.
    Raises:
      UserError: a column is missing or not of its kind.
    """
    asked = text(row, "instruction", where)
    if row.get("input"):
        asked = f"{asked}\n{text(row, 'input', where)}"
    prompt = [*_system(row, where), *_history(row, where), user_turn(asked)]
    if row.get("chosen") is None and row.get("rejected") is None:
        return _labelled(
            {"prompt": prompt, "completion": text(row, "output", where)}, row
        )
    chosen, rejected = (_answer(row, side, where) for side in ("chosen", "rejected"))
    if chosen == rejected:
        return Dropped("equal responses")
    return {"prompt": prompt, "chosen": [chosen], "rejected": [rejected]}


def sharegpt(row: Mapping[str, Any], where: str = "row") -> dict[str, Any] | Dropped:
    """Make a record of ``conversations`` (or ``messages``), with the sides of a pair.

    Without ``chosen`` and ``rejected`` the last turn is the completion. Turns of
    ``function_call`` become tool calls, ``tools`` (a list written as JSON) goes to the
    chat template.

    Returns:
      The record, or why there is none.
    Raises:
      UserError: a column is missing or not of its kind.
    """
    name = "conversations" if row.get("conversations") is not None else "messages"
    turns = [_called(t, f"{where}: field {name}") for t in messages(row, name, where)]
    made: dict[str, Any] = {"prompt": [*_system(row, where), *turns]}
    if row.get("tools"):
        made["tools"] = _tools(row["tools"], where)
    if row.get("chosen") is not None or row.get("rejected") is not None:
        chosen, rejected = (
            _answer(row, side, where) for side in ("chosen", "rejected")
        )
        if chosen == rejected:
            return Dropped("equal responses")
        return {**made, "chosen": [chosen], "rejected": [rejected]}
    if turns[-1]["role"] != "assistant":
        return Dropped("the last turn is no answer")
    if len(made["prompt"]) == 1:
        return Dropped("an answer without a question")
    answer = made["prompt"].pop()
    return _labelled({**made, "completion": [answer]}, row)


def convert(rows: Iterable[Row]) -> Iterator[Converted]:
    """Convert row by row, of Alpaca's columns."""
    for row, where in rows:
        yield Converted(_shown(alpaca(row, where), row), where)


def convert_sharegpt(rows: Iterable[Row]) -> Iterator[Converted]:
    """Convert row by row, of ShareGPT's turns."""
    for row, where in rows:
        yield Converted(_shown(sharegpt(row, where), row), where)


def _shown(
    made: dict[str, Any] | Dropped, row: Mapping[str, Any]
) -> dict[str, Any] | Dropped:
    """Return a record with its row's pictures, each in its placeholder's place."""
    images = row.get("images")
    if isinstance(made, Dropped) or images is None or not len(images):
        return made
    turns = [{**t, "content": _parts(t.get("content"))} for t in made["prompt"]]
    return {**made, "prompt": turns, "images": images}


def _parts(content: Any) -> Any:
    if not isinstance(content, str) or PLACEHOLDER not in content:
        return content
    first, *others = content.split(PLACEHOLDER)
    parts = [{"type": "text", "text": first}]
    for said in others:
        parts += [{"type": "image"}, {"type": "text", "text": said}]
    return [part for part in parts if part.get("text") != ""]


PLACEHOLDER = "<image>"


def _labelled(made: dict[str, Any], row: Mapping[str, Any]) -> dict[str, Any]:
    label = row.get("kto_tag", row.get("label"))
    return made if label is None else {**made, "label": label}


def _system(row: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    if not row.get("system"):
        return []
    return [{"role": "system", "content": text(row, "system", where)}]


def _history(row: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    turns = []
    given: Any = row.get("history") or ()
    for i, pair in enumerate(given):
        if (
            not isinstance(pair, list | tuple)
            or len(pair) != 2
            or not all(isinstance(said, str) for said in pair)
        ):
            raise UserError(
                f"{where}: field history[{i}]: expected [question, answer]: got "
                f"{type(pair).__name__}"
            )
        turns += [user_turn(pair[0]), {"role": "assistant", "content": pair[1]}]
    return turns


def _answer(row: Mapping[str, Any], side: str, where: str) -> dict[str, Any]:
    value = row.get(side)
    if isinstance(value, str):
        return {"role": "assistant", "content": value}
    return _called(turn(value, f"{where}: field {side}"), f"{where}: field {side}")


def _called(message: dict[str, Any], place: str) -> dict[str, Any]:
    """Return a turn of ``function_call`` as the assistant's tool calls."""
    if message["role"] != "function_call":
        return message
    try:
        calls = json.loads(message["content"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{place}: a function_call that is no JSON: {error}") from None
    calls = calls if isinstance(calls, list) else [calls]
    return {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"type": "function", "function": call} for call in calls],
    }


def _tools(given: Any, where: str) -> list[Any]:
    try:
        tools = json.loads(given) if isinstance(given, str) else given
    except ValueError as error:
        raise UserError(f"{where}: field tools is no JSON: {error}") from None
    if not isinstance(tools, list):
        raise UserError(f"{where}: field tools: expected a list: got {tools!r:.40}")
    return [
        tool
        if not isinstance(tool, Mapping) or "type" in tool
        else {"type": "function", "function": dict(tool)}
        for tool in tools
    ]
