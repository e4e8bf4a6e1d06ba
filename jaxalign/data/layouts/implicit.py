"""Preferences without a prompt: it is what ``chosen`` and ``rejected`` begin with.

TRL's implicit-prompt format (https://huggingface.co/docs/trl/dataset_formats#preference):
two conversations, or two texts.
"""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from jaxalign.data.layouts.foreign import Converted, Dropped, Row, messages, text


__all__ = ["convert", "record", "split"]


def record(row: Mapping[str, Any], where: str = "row") -> dict[str, Any] | Dropped:
    """Make a feedback record of a row; its other columns stay as they are.

    Of conversations the prompt is all turns that both begin with, up to the first
    answer that differs. Of texts it is all characters that both begin with, less a
    last space, which belongs to the answers.

    Returns:
      The record, or why there is none.
    Raises:
      UserError: a column is missing or not of its kind.
    """
    if isinstance(row.get("chosen"), str):
        sides = [text(row, side, where) for side in ("chosen", "rejected")]
        if sides[0] == sides[1]:
            return Dropped("equal responses")
        common = len(os.path.commonprefix(sides))
        if common and all(side[common - 1] == " " for side in sides):
            common -= 1
        if not common:
            return Dropped("no common beginning")
        return {
            **row,
            "prompt": sides[0][:common],
            "chosen": sides[0][common:],
            "rejected": sides[1][common:],
        }
    chosen, rejected = (messages(row, side, where) for side in ("chosen", "rejected"))
    if chosen == rejected:
        return Dropped("equal responses")
    count = split(chosen, rejected)
    if not count:
        return Dropped("no common prompt")
    return {
        **row,
        "prompt": chosen[:count],
        "chosen": chosen[count:],
        "rejected": rejected[count:],
    }


def split(
    chosen: Sequence[Mapping[str, Any]], rejected: Sequence[Mapping[str, Any]]
) -> int:
    """Return how many turns two conversations share before their answers.

    >>> ask, one, two = ({"role": r, "content": c} for r, c in
    ...                  [("user", "?"), ("assistant", "1"), ("assistant", "2")])
    >>> split([ask, one], [ask, two]), split([ask, one, ask, one], [ask, one, ask, two])
    (1, 3)
    """
    most = min(len(chosen), len(rejected))
    count = 0
    while count < most and chosen[count] == rejected[count]:
        count += 1
    # Both must go on with an answer.
    count = min(count, most - 1)
    while count and not (
        chosen[count]["role"] == rejected[count]["role"] == "assistant"
    ):
        count -= 1
    return count


def convert(rows: Iterable[Row]) -> Iterator[Converted]:
    """Convert row by row; a row that has a prompt after all stays as it is."""
    for row, where in rows:
        explicit = row.get("prompt") is not None
        yield Converted(dict(row) if explicit else record(row, where), where)
