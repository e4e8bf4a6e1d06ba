"""HelpSteer-2D: pairs with a score for every segment, as Robust 2D-DPO reads them.

The copy that https://github.com/nachiketapatil/Robust-2D-DPO trains on is a CSV file
with the columns ``instruction, chosen, rejected, chosen segment scores, rejected
segment scores``; a list of scores is written as text. The file gives no offsets:
segment i is the i-th piece of the sentence rule that made the data, :func:`spans`.
"""

import ast
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from jaxalign.data.layouts.foreign import (
    Converted,
    Dropped,
    Row,
    score,
    text,
    user_turn,
)
from jaxalign.errors import UserError


__all__ = ["OVERALL", "convert", "record", "spans"]

OVERALL = "overall"
"""The aspect that a single score for each segment, already aggregated, is given."""

Spans = Sequence[tuple[int, int]]

_QUOTES = "”’\"'"
_CODE = re.compile(r"```.*?```", re.DOTALL)
# Where a piece ends: at the end of group 1. Each rule looks at the text from the left
# and takes the character after the end with it, as the rule that made the data does.
_ENDS = tuple(
    re.compile(pattern)
    for pattern in (
        rf"(\.{{6}})[^{_QUOTES}]",
        rf"([。!！？?])[^{_QUOTES}]",
        rf"(…{{2}})[^{_QUOTES}]",
        rf"([。.!！？?][{_QUOTES}])[^，。.！？?]",
        r"([:：]\n+)",
        r"(\n)\d+\.\s",
    )
)
_STOP = re.compile(r"(\.)[ \n]")
_LIST_NUMBER = re.compile(r"\n\d+\.(?!\d)")


def spans(response: str) -> list[tuple[int, int]]:
    r"""Split a response by the sentence rule of the data set.

    Pieces end after a full stop before a space or line break (not that of a list's
    number), after ``! ?`` and their full-width forms, after an ellipsis, after a
    closing quotation mark, after a colon and its line breaks, and before a numbered
    item. A fenced block of code is one piece. The pieces re-join to the text; a piece
    may be whitespace or, rarely, empty.

    >>> [response[a:b] for response in ["A b. C!\n1. D."] for a, b in spans(response)]
    ['A b.', ' C!', '\n', '1. D.']
    """
    found: list[tuple[int, int]] = []
    begin = 0
    for block in _CODE.finditer(response):
        found += _sentences(response[begin : block.start()], begin)
        found.append(block.span())
        begin = block.end()
    found += _sentences(response[begin:], begin)
    # The data set's rule takes one empty piece away, and only one.
    empty = [i for i, (a, b) in enumerate(found) if a == b]
    if empty:
        del found[empty[0]]
    return found


def record(
    row: Mapping[str, Any],
    where: str = "row",
    *,
    split: Callable[[str], Spans] = spans,
) -> dict[str, Any] | Dropped:
    """Make a feedback record of a row.

    Scores are read from ``chosen segment scores`` (or with underscores): one number a
    segment, which becomes the aspect ``overall``, or one object of scores by aspect;
    and from any pair of columns ``chosen_NAME`` and ``rejected_NAME`` of lists of
    numbers, which become the aspect NAME. A null is a segment without that score.

    Args:
      row: its columns.
      where: its place, for messages.
      split: gives the segments of a response as half-open spans.
    Returns:
      The record, or why there is none: scores and segments differ in number.
    Raises:
      UserError: a column is missing or not of its kind.
    """
    made: dict[str, Any] = {"prompt": [user_turn(text(row, "instruction", where))]}
    aspects = _aspect_columns(row)
    for side in ("chosen", "rejected"):
        response = text(row, side, where)
        made[side] = response
        pieces = split(response)
        segments = [{"start": a, "end": b, "scores": {}} for a, b in pieces]
        columns = [
            *(name for name in _score_columns(side) if row.get(name) is not None),
            *(f"{side}_{aspect}" for aspect in aspects),
        ]
        if not columns:
            raise UserError(
                f"{where}: field {side} segment scores is missing: expected a list of "
                f"numbers. The row has {', '.join(map(str, row))}"
            )
        for column in columns:
            aspect = column.removeprefix(f"{side}_")
            if column in _score_columns(side):
                aspect = OVERALL
            scores = _scores(row[column], aspect, f"{where}: field {column}")
            if len(scores) != len(segments):
                return Dropped(f"scores and segments of {side} differ in number")
            for segment, given in zip(segments, scores, strict=True):
                segment["scores"].update(given)
        made[f"{side}_segments"] = [
            segment
            for segment in segments
            if segment["start"] < segment["end"] and segment["scores"]
        ]
    if made["chosen"] == made["rejected"]:
        return Dropped("equal responses")
    return made


def convert(rows: Iterable[Row]) -> Iterator[Converted]:
    """Convert row by row."""
    for row, where in rows:
        yield Converted(record(row, where), where)


def _sentences(block: str, offset: int) -> list[tuple[int, int]]:
    numbers = {match.end() for match in _LIST_NUMBER.finditer(block)}
    ends = {m.end(1) for pattern in _ENDS for m in pattern.finditer(block)}
    ends |= {m.end(1) for m in _STOP.finditer(block) if m.end(1) not in numbers}
    bounds = [0, *sorted(ends), len(block)]
    return [(offset + a, offset + b) for a, b in zip(bounds, bounds[1:], strict=False)]


def _score_columns(side: str) -> tuple[str, str]:
    return f"{side} segment scores", f"{side}_segment_scores"


def _aspect_columns(row: Mapping[str, Any]) -> list[str]:
    names = [
        name.removeprefix("chosen_")
        for name in row
        if isinstance(name, str) and name.startswith("chosen_")
    ]
    return [
        name
        for name in names
        if name != "segment_scores"
        and _is_list(row[f"chosen_{name}"])
        and _is_list(row.get(f"rejected_{name}"))
    ]


def _is_list(value: Any) -> bool:
    return isinstance(value, list) or (
        isinstance(value, str) and value.lstrip().startswith("[")
    )


def _scores(value: Any, aspect: str, where: str) -> list[dict[str, int | float]]:
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            raise UserError(
                f"{where}: expected a list of numbers such as [4.0, 2.5]: got a text "
                f"of {len(value)} characters"
            ) from None
    if not isinstance(value, list | tuple):
        raise UserError(
            f"{where}: expected a list of numbers: got {type(value).__name__}"
        )
    found = []
    for i, given in enumerate(value):
        by_aspect = given if isinstance(given, Mapping) else {aspect: given}
        scores = {k: score(v) for k, v in by_aspect.items() if v is not None}
        if None in scores.values():
            raise UserError(f"{where}[{i}]: expected finite numbers: got {given!r:.60}")
        found.append(scores)
    return found
