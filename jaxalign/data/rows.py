"""Rows of JSON Lines, Parquet and tensorflow-datasets sources, with their places."""

import gzip
import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxalign.errors import UserError


__all__ = ["read_rows"]


def read_rows(source: str | Path) -> Iterator[tuple[Any, str]]:
    """Yield every row of a source with its place, for messages.

    Args:
      source: a ``.jsonl`` (also ``.jsonl.gz``) or ``.parquet`` file, or
        ``tfds:NAME_OR_DIRECTORY:SPLIT`` for a tensorflow-datasets source.
    Raises:
      UserError: it cannot be read; the text names file and line.
    """
    source = str(source)
    if source.startswith("tfds:"):
        yield from _tfds_rows(source)
        return
    path = Path(source)
    if not path.is_file():
        raise UserError(
            f"{source} is not a file: expected a .jsonl, .jsonl.gz or .parquet file of "
            "feedback records, or tfds:NAME:SPLIT"
        )
    if path.suffix == ".parquet":
        yield from _parquet_rows(path)
    else:
        yield from _json_rows(path)


def _json_rows(path: Path) -> Iterator[tuple[Any, str]]:
    opened: Any = gzip.open(path) if path.suffix == ".gz" else path.open("rb")
    with opened as lines:
        number = 0
        while True:
            try:
                raw = lines.readline()
            except (OSError, EOFError, zlib.error) as error:
                raise UserError(
                    f"{path}:{number + 1}: the file cannot be read: {error}"
                ) from None
            if not raw:
                return
            number += 1
            if not raw.strip():
                continue
            where = f"{path}:{number}"
            try:
                yield json.loads(raw), where
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{where}: not UTF-8 ({error.reason} at byte {error.start}). "
                    "Save the file as UTF-8"
                ) from None
            except (json.JSONDecodeError, RecursionError) as error:
                raise UserError(
                    f"{where}: not a JSON object: {error}. "
                    "Expected one JSON object per line (JSON Lines)"
                ) from None
            except ValueError as error:  # an integer of thousands of digits
                raise UserError(f"{where}: not usable JSON: {error}") from None


def _parquet_rows(path: Path) -> Iterator[tuple[Any, str]]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path)
        number = 0
        for batch in table.iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield _without_missing_scores(row), f"{path}:row {number}"
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable Parquet file: {error}") from None


def _tfds_rows(source: str) -> Iterator[tuple[Any, str]]:
    import tensorflow_datasets as tfds

    _, name, split = (source.split(":", 2) + ["", ""])[:3]
    if not name or not split:
        raise UserError(
            f"{source!r} names no split: expected tfds:NAME_OR_DIRECTORY:SPLIT, "
            "such as tfds:/data/my_feedback/1.0.0:train"
        )
    data: Any
    try:
        if Path(name).is_dir():
            builder: Any = tfds.builder_from_directory(name)
            data = builder.as_data_source(split)
        else:
            data = tfds.data_source(name, split=split)
    except Exception as error:  # tfds raises many kinds, all about its arguments
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{source}: tensorflow-datasets says: {reason}") from None
    for number in range(len(data)):
        where = f"{source}:row {number + 1}"
        try:
            row = _untensored(data[number])
        except UnicodeDecodeError as error:
            raise UserError(f"{where}: not UTF-8: {error}. Store UTF-8") from None
        except (IndexError, TypeError) as error:
            raise UserError(
                f"{where}: not laid out as a feedback record: {error}. Expected Text, "
                "or a Sequence of {role, content} or {start, end, scores}"
            ) from None
        yield row, where


def _without_missing_scores(row: Mapping[str, Any]) -> dict[str, Any]:
    """Drop the nulls by which Arrow fills aspects that a segment was not scored on."""
    cleaned = dict(row)
    for column in ("chosen_segments", "rejected_segments"):
        segments = cleaned.get(column)
        for segment in segments if isinstance(segments, list) else ():
            if isinstance(segment, dict) and isinstance(segment.get("scores"), dict):
                scores = segment["scores"].items()
                segment["scores"] = {k: v for k, v in scores if v is not None}
    return cleaned


def _untensored(value: Any) -> Any:
    """Turn what tfds returns (bytes, arrays, dicts of lists) into plain values."""
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if isinstance(value, Mapping):
        plain = {str(k): _untensored(v) for k, v in value.items()}
        for column in (
            *("prompt", "chosen", "rejected", "completion"),
            *("chosen_segments", "rejected_segments"),
        ):
            if column in plain:
                plain[column] = _rows_of_columns(plain[column])
        return {k: v for k, v in plain.items() if v is not None}
    if hasattr(value, "tolist"):
        return _untensored(value.tolist())
    if isinstance(value, list | tuple):
        return [_untensored(v) for v in value]
    return value


def _rows_of_columns(value: Any) -> Any:
    """Turn a dict of equally long lists into a list of dicts, scores included."""
    if not isinstance(value, dict):
        return value
    columns = {
        k: _rows_of_columns(v) if isinstance(v, dict) else v for k, v in value.items()
    }
    length = len(next(iter(columns.values()), []))
    return [{k: v[i] for k, v in columns.items()} for i in range(length)]
