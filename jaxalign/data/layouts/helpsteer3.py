"""HelpSteer3: two responses to a conversation and which of them people preferred.

https://huggingface.co/datasets/nvidia/HelpSteer3 (CC-BY-4.0), preference: ``context``
(turns), ``response1, response2`` and ``overall_preference`` from -3 (the first is much
better) to 3.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from jaxalign.data.layouts.foreign import (
    Converted,
    Dropped,
    Row,
    messages,
    number,
    text,
)


__all__ = ["convert", "record"]


def record(row: Mapping[str, Any], where: str = "row") -> dict[str, Any] | Dropped:
    """Make a feedback record of a row; it has no segments.

    Returns:
      The record, or why there is none: no preference, or equal responses.
    Raises:
      UserError: a column is missing or not of its kind.
    """
    first, second = (text(row, name, where) for name in ("response1", "response2"))
    preference = number(row, "overall_preference", where, low=-3, high=3)
    if preference == 0:
        return Dropped("no preference")
    if first == second:
        return Dropped("equal responses")
    chosen, rejected = (first, second) if preference < 0 else (second, first)
    return {
        "prompt": messages(row, "context", where),
        "chosen": chosen,
        "rejected": rejected,
    }


def convert(rows: Iterable[Row]) -> Iterator[Converted]:
    """Convert row by row."""
    for row, where in rows:
        yield Converted(record(row, where), where)
