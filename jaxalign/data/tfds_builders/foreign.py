"""Rows of other people's files: reading them, and checking their columns."""

import csv
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxalign.data.rows import read_rows
from jaxalign.errors import UserError


__all__ = [
    "Converted",
    "Dropped",
    "Row",
    "number",
    "read_foreign",
    "score",
    "text",
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


def read_foreign(source: str | Path) -> Iterator[Row]:
    """Yield the rows of a file of another layout with their places.

    Args:
      source: a ``.json`` file that holds a list of objects, a ``.csv`` file with a
        header, or whatever :func:`jaxalign.data.rows.read_rows` reads.
    Raises:
      UserError: it cannot be read, or a row is no object.
    """
    path = Path(source)
    if path.is_file() and path.suffix == ".csv":
        yield from _csv_rows(path)
        return
    if path.is_file() and path.suffix == ".json":
        yield from _json_list(path)
        return
    for row, where in read_rows(source):
        yield _object(row, where), where


def _json_list(path: Path) -> Iterator[Row]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a readable JSON file: {error}") from None
    if not isinstance(rows, list):
        raise UserError(
            f"{path}: expected a list of objects: got {type(rows).__name__}. One "
            "object per line is JSON Lines: name such a file .jsonl"
        )
    for number, row in enumerate(rows, 1):
        where = f"{path}:row {number}"
        yield _object(row, where), where


def _csv_rows(path: Path) -> Iterator[Row]:
    number = 0
    try:
        with path.open(encoding="utf-8", newline="") as file:
            for number, row in enumerate(csv.DictReader(file), 1):
                where = f"{path}:row {number}"
                if None in row or None in row.values():
                    raise UserError(
                        f"{where}: the row has more or fewer cells than the header. "
                        "Quote the cells that hold commas or line breaks"
                    )
                yield row, where
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}:row {number + 1}: not readable CSV: {error}") from None


def _object(row: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(row, Mapping):
        raise UserError(f"{where}: expected an object: got {type(row).__name__}")
    return row


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
