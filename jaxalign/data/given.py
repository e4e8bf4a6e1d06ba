"""Rows that are in memory already, or come one by one: whatever Python hands over."""

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxalign.data import tables, tfds_rows
from jaxalign.errors import UserError


__all__ = ["ROWS", "name_of", "plain_row", "rows_of"]

ROWS = (
    "a list of dicts, a generator of them, a datasets.Dataset or IterableDataset, a "
    "data source of tensorflow-datasets, or a DataFrame"
)
"""What is taken as rows, for messages."""


def name_of(source: Any) -> str:
    """Return what to call a source in messages, without its contents.

    >>> name_of("train.jsonl"), name_of([{"prompt": "Q"}])
    ('train.jsonl', 'list')
    """
    return str(source) if isinstance(source, str | Path) else type(source).__name__


def rows_of(source: Any) -> Iterator[tuple[Any, str]]:
    """Yield the rows of an iterable or a table as plain dicts, with their numbers.

    Numpy arrays and scalars become lists and numbers, bytes texts, dicts of lists
    lists of dicts (as tensorflow-datasets has a sequence of objects), None and, in a
    table, NaN no value. Pictures stay as they are; those of ``datasets`` are not
    decoded. An iterable is read as it is asked for, and once.

    Raises:
      UserError: it gives no rows: one row alone, several splits, or no iterable.
    """
    name = name_of(source)
    if isinstance(source, Mapping):
        raise UserError(_no_rows(source, name))
    framed = False
    if hasattr(source, "columns") and hasattr(source, "iter_rows"):  # polars
        rows: Iterable[Any] = source.iter_rows(named=True)
        framed = True
    elif hasattr(source, "columns") and hasattr(source, "to_dict"):  # pandas
        rows, framed = _frame_rows(source), True
    elif hasattr(source, "to_pylist"):  # Arrow
        rows, framed = source.to_pylist(), True
    elif isinstance(source, Iterable) or hasattr(source, "__getitem__"):
        framed = type(source).__module__.split(".")[0] == "datasets"
        rows = _undecoded(source) if framed else source
    else:
        raise UserError(f"got {name}: expected {ROWS}, or a file")
    for number, row in enumerate(_sequence(rows), 1):
        where = f"{name} row {number}"
        if isinstance(row, Mapping):
            row = plain_row(row, where)
            if framed:
                kept = {k: v for k, v in row.items() if not _is_missing(v)}
                row = tables.without_filled(kept)
        yield row, where


def _undecoded(data: Any) -> Any:
    """Iterate over a data set of ``datasets``, pictures as their files' bytes."""
    import datasets

    pictures = any(
        isinstance(getattr(feature, "feature", feature), datasets.Image)
        for feature in (data.features or {}).values()
    )
    if not pictures or (getattr(data, "format", None) or {}).get("type") == "custom":
        return data
    tables = data.with_format("arrow").iter(batch_size=64)
    return (row for table in tables for row in table.to_pylist())


def _no_rows(source: Mapping[Any, Any], name: str) -> str:
    names = list(map(str, source))
    if any(column in source for column in ("prompt", "chosen", "completion")):
        many = "with a list for each column" if _is_columns(source) else "alone"
        cure = (
            "Give a list of rows, such as datasets.Dataset.from_dict(columns)"
            if _is_columns(source)
            else "Give a list, [row]"
        )
        return f"got one {name} {many}: expected {ROWS}. {cure}"
    return (
        f"got {name} with {', '.join(names[:6]) or 'nothing'}: expected {ROWS}. Of "
        f"several splits give one, such as data[{(names or ['train'])[0]!r}]"
    )


def _is_columns(source: Mapping[Any, Any]) -> bool:
    value = source.get("chosen", source.get("completion", source.get("prompt")))
    return isinstance(value, list) and all(isinstance(v, str) for v in value)


def _frame_rows(frame: Any) -> Iterator[dict[str, Any]]:
    """Yield the rows of a pandas DataFrame."""
    columns = [str(column) for column in frame.columns]
    for values in frame.itertuples(index=False, name=None):
        yield dict(zip(columns, values, strict=True))


def _is_missing(value: Any) -> bool:
    if value is None or type(value).__name__ in ("NAType", "NaTType"):
        return True
    return isinstance(value, float) and math.isnan(value)


def _sequence(rows: Any) -> Iterator[Any]:
    """Iterate over what may have a length and indices alone."""
    if hasattr(rows, "__iter__") or not hasattr(rows, "__len__"):
        yield from rows
        return
    for index in range(len(rows)):
        yield rows[index]


def plain_row(row: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """Return a row without arrays and bytes; one that has none is left as it is.

    Raises:
      UserError: bytes that are no UTF-8, or lists of different lengths where objects
        are meant.
    """
    if not any(_is_raw(v) for k, v in row.items() if k not in tfds_rows.PICTURES):
        return row
    return tfds_rows.plain(row, where)


def _is_raw(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_is_raw, value.values()))
    if isinstance(value, list | tuple):
        return any(map(_is_raw, value))
    return isinstance(value, bytes) or hasattr(value, "tolist")
