"""Encoded pictures of large tables: copied once to where each can be read alone.

A Parquet file gives no single cell, only row groups of thousands, and 83,000 pictures
are more than a machine should hold. So the bytes of a large table are written one
behind the other into a file of the user's cache, and a row has in their place where
they lie. The second reading takes the table's other columns alone.
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from jaxalign import progress
from jaxalign.data.picture import Stretch
from jaxalign.data.picture_sizes import cache_home
from jaxalign.errors import UserError
from jaxalign.whole_file import writing


__all__ = ["LARGE", "byte_columns", "rows"]

LARGE = 2**28
"""Bytes of a table from which on its pictures are not held in memory."""

_BYTES, _ROWS = "pictures.bin", "rows.jsonl"
_AT_ONCE = 64

Batches = Callable[[Sequence[str], int | None], Iterable[Any]]
"""Names of columns, and most rows of a batch -> Arrow batches of all rows."""


def byte_columns(schema: Any) -> list[str]:
    """Return the names of an Arrow schema's columns that bytes are in."""
    return [field.name for field in schema if _holds_bytes(field.type)]


def rows(
    batches: Batches, names: Sequence[str], stored: Sequence[str], key: str
) -> Iterator[dict[str, Any]]:
    """Yield the rows of a table, with a :class:`Stretch` in the place of bytes.

    Args:
      batches: of the table.
      names: of all its columns.
      stored: those of :func:`byte_columns`.
      key: what tells the table from one with other contents.
    Raises:
      UserError: the cache cannot be written.
    """
    digest = hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()
    folder = cache_home() / "pictures" / digest[:32]
    if not folder.exists():
        progress.say(
            f"copying the pictures of {key.split(chr(0))[0]} to {folder}, once"
        )
        with writing(folder, "set XDG_CACHE_HOME to a directory with room"):
            _copy(batches(stored, _AT_ONCE), folder)
    others = [name for name in names if name not in stored]
    found = (row for batch in batches(others, None) for row in batch.to_pylist())
    path = str(folder / _BYTES)
    with (folder / _ROWS).open(encoding="utf-8") as lines:
        if not others:
            found = ({} for _ in range(sum(1 for _ in lines)))
            lines.seek(0)
        try:
            for row, line in zip(found, lines, strict=True):
                yield {**row, **_restored(json.loads(line), path)}
        except ValueError as error:
            raise UserError(
                f"{folder} is broken: {error}. Remove it: it is made again"
            ) from None


def _copy(batches: Iterable[Any], folder: Path) -> None:
    """Write the bytes of all rows and where they lie; the folder appears whole."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        with (
            (part / _BYTES).open("wb") as file,
            (part / _ROWS).open("w", encoding="utf-8") as lines,
        ):
            for batch in batches:
                for row in batch.to_pylist():
                    lines.write(json.dumps(_moved(row, file)) + "\n")
        if not folder.exists():  # or another process was faster
            part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


_MARK = "jaxalign bytes"


def _moved(value: Any, file: IO[bytes]) -> Any:
    if isinstance(value, bytes):
        start = file.tell()
        file.write(value)
        return {_MARK: [start, len(value)]}
    if isinstance(value, Mapping):
        return {name: _moved(one, file) for name, one in value.items()}
    if isinstance(value, list):
        return [_moved(one, file) for one in value]
    return value


def _restored(value: Any, path: str) -> Any:
    if isinstance(value, dict):
        if _MARK in value:
            return Stretch(path, *value[_MARK])
        return {name: _restored(one, path) for name, one in value.items()}
    if isinstance(value, list):
        return [_restored(one, path) for one in value]
    return value


def _holds_bytes(kind: Any) -> bool:
    import pyarrow.types as kinds

    if kinds.is_binary(kind) or kinds.is_large_binary(kind):
        return True
    if kinds.is_struct(kind):
        return any(_holds_bytes(kind.field(i).type) for i in range(kind.num_fields))
    if kinds.is_list(kind) or kinds.is_large_list(kind):
        return _holds_bytes(kind.value_type)
    return False
