"""Rows of tensorflow-datasets sources, without TensorFlow."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxalign.errors import UserError


__all__ = ["MISSING", "PICTURES", "located", "plain", "read"]

PICTURES = ("images", "image")
"""Columns whose bytes are no texts, and whose arrays no lists."""

MISSING = "missing_columns"
"""Names the columns that a row lacks: such a data set has no nulls."""

_AT_ONCE = 256
_LISTS = (
    *("prompt", "chosen", "rejected", "completion"),
    *("chosen_segments", "rejected_segments", "completion_segments"),
)
"""Columns that may be a sequence of objects."""


def read(source: str) -> Iterator[tuple[Any, str]]:
    """Yield the rows of ``tfds:NAME_OR_DIRECTORY:SPLIT`` with their places.

    A score that is NaN is one that the segment does not have. Encoded images are left
    as they are stored.

    Raises:
      UserError: the source is not there or not laid out as feedback records.
    """
    import tensorflow_datasets as tfds

    directory, split = located(source)
    try:
        if directory is None:
            builder: Any = tfds.builder(source.split(":")[1])
            builder.download_and_prepare()
        else:
            builder = tfds.builder_from_directory(directory)
        skip = _skipped(builder.info.features)
        data: Any = builder.as_data_source(split, decoders=skip or None)
    except Exception as error:  # tfds raises many kinds, all about its arguments
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{source}: tensorflow-datasets says: {reason}") from None
    for begin in range(0, len(data), _AT_ONCE):
        numbers = list(range(begin, min(begin + _AT_ONCE, len(data))))
        for number, raw in zip(numbers, data.__getitems__(numbers), strict=True):
            where = f"{source}:row {number + 1}"
            row = plain(raw, where, encoded=bool(skip))
            if isinstance(row.get("where"), str):
                where = f"{where} ({row['where']})"
            yield row, where


def located(source: str) -> tuple[Path | None, str]:
    """Return the directory of a source, None for a name that tfds knows, and the split.

    The directory may be one above the data set's version or name, while there is one
    data set in it.

    Raises:
      UserError: no split is named, or several data sets are in the directory.
    """
    _, name, split = (source.split(":", 2) + ["", ""])[:3]
    if not name or not split:
        raise UserError(
            f"{source!r} names no split: expected tfds:NAME_OR_DIRECTORY:SPLIT, "
            "such as tfds:/data/my_feedback/1.0.0:train"
        )
    directory = Path(name)
    if not directory.is_dir():
        return None, split
    for depth in ("", "*/", "*/*/"):
        found = sorted(p.parent for p in directory.glob(f"{depth}features.json"))
        if len(found) > 1:
            raise UserError(
                f"{source}: several data sets are in {directory}: name one, such as "
                f"tfds:{found[0]}:{split}"
            )
        if found:
            return found[0], split
    return directory, split


def _skipped(features: Any) -> dict[str, Any]:
    """Return what leaves encoded images as they are, by column."""
    import tensorflow_datasets as tfds

    skip: dict[str, Any] = {}
    for name in PICTURES:
        feature = features[name] if name in features else None
        if isinstance(feature, tfds.features.Image):
            skip[name] = tfds.decode.SkipDecoding()
        elif isinstance(getattr(feature, "feature", None), tfds.features.Image):
            skip[name] = _AsStored()
    return skip


class _AsStored:
    """A decoder that decodes nothing: tfds' own cannot do so in a sequence."""

    def setup(self, *, feature: Any) -> None:
        """Take the feature, which is of no use here."""

    def decode_batch_example_np(self, stored: Any) -> list[bytes]:
        """Return encoded images as they are."""
        return list(stored)


def plain(
    row: Mapping[str, Any], where: str, *, encoded: bool = True
) -> dict[str, Any]:
    """Turn what tfds returns (bytes, arrays, dicts of lists) into plain values.

    Pictures stay what they are: encoded bytes, or arrays.

    Args:
      row: of a data source.
      where: its place, for messages.
      encoded: whether bytes of a picture are its file's; else they are its path.
    Raises:
      UserError: bytes that are no UTF-8, or no record's layout.
    """
    try:
        return _untensored(row, encoded)
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8: {error}. Store UTF-8") from None
    except (IndexError, TypeError) as error:
        raise UserError(
            f"{where}: not laid out as a feedback record: {error}. Expected "
            "Text, or a Sequence of {role, content} or {start, end, scores}"
        ) from None


def _untensored(row: Mapping[str, Any], encoded: bool) -> dict[str, Any]:
    plain: dict[str, Any] = {
        str(k): _pictures(v, encoded) if k in PICTURES else _plain(v)
        for k, v in row.items()
    }
    for column in _LISTS:
        if column in plain:
            plain[column] = _rows_of_columns(plain[column])
    for column in ("chosen_segments", "rejected_segments"):
        for segment in plain.get(column) or ():
            if isinstance(segment, dict) and isinstance(segment.get("scores"), dict):
                scores = segment["scores"].items()
                segment["scores"] = {k: v for k, v in scores if not _is_nan(v)}
    absent = plain.pop(MISSING, None) or ()
    return {k: v for k, v in plain.items() if v is not None and k not in absent}


def _pictures(value: Any, encoded: bool) -> Any:
    if isinstance(value, bytes):
        return value if encoded else value.decode("utf-8")
    if isinstance(value, list | tuple) or _holds_objects(value):
        return [_pictures(one, encoded) for one in value]
    if isinstance(value, Mapping):
        return {k: v if k == "bytes" else _plain(v) for k, v in value.items()}
    return value


def _holds_objects(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.dtype.hasobject


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if isinstance(value, Mapping):
        if value.get("type") in ("image", b"image") and "image" in value:
            rest = {str(k): _plain(v) for k, v in value.items() if k != "image"}
            return {**rest, "image": _pictures(value["image"], True)}
        return {str(k): _plain(v) for k, v in value.items()}
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _rows_of_columns(value: Any) -> Any:
    """Turn a dict of equally long lists into a list of dicts, scores included."""
    if not isinstance(value, dict):
        return value
    columns = {
        k: _rows_of_columns(v) if isinstance(v, dict) else v for k, v in value.items()
    }
    length = len(next(iter(columns.values()), []))
    return [{k: v[i] for k, v in columns.items()} for i in range(length)]
