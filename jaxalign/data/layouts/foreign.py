"""Rows of other people's files: their columns, and what became of them."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxalign.errors import UserError


__all__ = [
    "Converted",
    "Dropped",
    "Row",
    "messages",
    "number",
    "score",
    "text",
    "turn",
    "user_turn",
]

Row = tuple[Mapping[str, Any], str]
"""A row and its place, for messages."""


class Dropped(NamedTuple):
    """Why a row gives no record. It is counted, never an error."""

    reason: str


class Converted(NamedTuple):
    """What became of a row, or of the rows that make one pair."""

    result: dict[str, Any] | Dropped
    """The columns of a feedback record."""
    where: str
    """The place or places in the source."""


def text(row: Mapping[str, Any], name: str, where: str) -> str:
    """Return a column that must hold a text.

    Raises:
      UserError: it is missing, or holds something else.
    """
    value = row.get(name)
    if not isinstance(value, str):
        raise UserError(f"{where}: field {name}: {_expected('a text', row, name)}")
    return value


def number(
    row: Mapping[str, Any], name: str, where: str, *, low: int, high: int
) -> int | float:
    """Return a column that must hold a number in [low, high].

    Raises:
      UserError: it is missing, or holds something else.
    """
    value = score(row.get(name))
    if value is None or not low <= value <= high:
        wanted = f"a number from {low:g} to {high:g}"
        raise UserError(f"{where}: field {name}: {_expected(wanted, row, name)}")
    return value


def score(value: Any) -> int | float | None:
    """Return a finite number as it is, and None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if math.isfinite(value) else None


def messages(row: Mapping[str, Any], name: str, where: str) -> list[dict[str, Any]]:
    """Return a column that must hold the turns of a conversation.

    Turns are ``{role, content}``, or ShareGPT's ``{from, value}``, whose names of roles
    become the usual ones. What else a turn has is kept.

    Raises:
      UserError: it is missing, or holds something else.
    """
    value = row.get(name)
    if not isinstance(value, list) or not value:
        raise UserError(f"{where}: field {name}: {_expected('messages', row, name)}")
    return [
        turn(message, f"{where}: field {name}[{i}]") for i, message in enumerate(value)
    ]


def turn(message: Any, place: str) -> dict[str, Any]:
    """Return one message as ``{role, content, ...}``.

    Raises:
      UserError: it is none.
    """
    if isinstance(message, Mapping):
        made = {k: v for k, v in message.items() if v is not None}
        if "from" in made and "value" in made:
            said, content = made.pop("from"), made.pop("value")
            made = {"role": _ROLES.get(said, said), "content": content, **made}
        if isinstance(made.get("role"), str):
            return made
    got = type(message).__name__
    if isinstance(message, Mapping):
        got = f"an object with {', '.join(map(str, message)) or 'no fields'}"
    raise UserError(
        f"{place}: expected {{role, content}} or {{from, value}}: got {got}"
    )


_ROLES = {
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "model", "bot"), "assistant"),
    **dict.fromkeys(("observation", "function_response"), "tool"),
}
"""The usual names of ShareGPT's roles."""


def user_turn(content: str) -> dict[str, str]:
    """Return one message of the user.

    >>> user_turn("Why?")
    {'role': 'user', 'content': 'Why?'}
    """
    return {"role": "user", "content": content}


def _expected(wanted: str, row: Mapping[str, Any], name: str) -> str:
    if name not in row:
        return f"is missing. Expected {wanted}; the row has {', '.join(map(str, row))}"
    value = row[name]
    got = f"{value!r}" if isinstance(value, int | float) else type(value).__name__
    return f"expected {wanted}: got {got}"
