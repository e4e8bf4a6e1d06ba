"""HH-RLHF: two dialogues as texts, ``Human:`` and ``Assistant:`` before each turn.

https://github.com/anthropics/hh-rlhf (MIT). Columns ``chosen`` and ``rejected``.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from jaxalign.data.layouts import implicit
from jaxalign.data.layouts.foreign import Converted, Dropped, Row, text
from jaxalign.errors import UserError


__all__ = ["convert", "dialogue", "record"]

_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


def record(row: Mapping[str, Any], where: str = "row") -> dict[str, Any] | Dropped:
    """Make a feedback record of a row: turns, and where the two dialogues part.

    Returns:
      The record, or why there is none: dialogues that are equal, end with a question or
      have nothing in common.
    Raises:
      UserError: a column is missing or no dialogue.
    """
    sides = {
        side: dialogue(text(row, side, where), f"{where}: field {side}")
        for side in ("chosen", "rejected")
    }
    for side, turns in sides.items():
        if turns[-1]["role"] != "assistant":
            return Dropped(f"{side} ends with a question")
        if not turns[-1]["content"]:
            return Dropped("an empty answer")
    return implicit.record({**row, **sides}, where)


def dialogue(value: str, place: str = "dialogue") -> list[dict[str, str]]:
    r"""Return the turns of a dialogue, without the spaces around them.

    >>> dialogue("\n\nHuman: Hi?\n\nAssistant: Ho.")[1]
    {'role': 'assistant', 'content': 'Ho.'}

    Raises:
      UserError: it does not begin with a turn.
    """
    before, *pieces = _TURN.split(value)
    if before.strip() or not pieces:
        raise UserError(
            f"{place}: expected a dialogue that begins with 'Human:': got a text of "
            f"{len(value)} characters that does not"
        )
    return [
        {"role": _ROLES[who], "content": said.strip()}
        for who, said in zip(pieces[::2], pieces[1::2], strict=True)
    ]


def convert(rows: Iterable[Row]) -> Iterator[Converted]:
    """Convert row by row."""
    for row, where in rows:
        yield Converted(record(row, where), where)
