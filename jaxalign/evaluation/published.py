"""Files of benchmarks as their authors publish them: where they lie, how they are read.

A file ``NAME`` of a task is ``DIR/FOLDER/NAME`` for one of the folders that the task
names, its own first, or ``DIR/NAME``; each plain or as ``NAME.gz``.
"""

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxalign.data.tables import parquet_rows
from jaxalign.errors import UserError


__all__ = [
    "find",
    "find_file",
    "lines_of",
    "read_json",
    "read_jsonl",
    "read_parquet",
    "read_text",
]


def find_file(
    folder: Path, name: str, within: Sequence[str], *, source: str = ""
) -> Path:
    """Return where a published file lies.

    Args:
      folder: the data directory.
      name: of the file, without ``.gz``.
      within: folders of the task, the first that has the file counts.
      source: where the file comes from, for who does not have it.
    Raises:
      UserError: it is in none of them.
    Example::

      find_file(folder, "question.jsonl", ["mt_bench"], source="lm-sys/FastChat")
    """
    if (path := find(folder, name, within)) is not None:
        return path
    places = ", ".join(str(folder / part / name) for part in (*within, "."))
    raise UserError(
        f"--data_dir {folder} lacks {name}: looked for {places} (each also as .gz)"
        + (f". It comes from {source}" if source else "")
    )


def find(folder: Path, name: str, within: Sequence[str]) -> Path | None:
    """Return where a file that may be absent lies, None for nowhere.

    >>> find(Path("nowhere"), "a.json", ["task"]) is None
    True
    """
    for part in (*within, "."):
        for ending in ("", ".gz"):
            if (path := folder / part / f"{name}{ending}").exists():
                return path
    return None


def read_text(path: Path) -> str:
    """Return the text of a file, plain or gzip by what its first bytes say.

    Raises:
      UserError: it cannot be read, or is no UTF-8.
    Example:
      >>> import tempfile
      >>> path = Path(tempfile.mkdtemp()) / "a.txt.gz"
      >>> _ = path.write_bytes(gzip.compress("two words".encode()))
      >>> read_text(path)
      'two words'
    """
    try:
        data = path.read_bytes()
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
        return data.decode("utf-8-sig")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def lines_of(path: Path) -> list[tuple[str, str]]:
    """Return (place, line) of the lines that are not blank.

    Lines end at a newline alone: published files have Unicode's line separators inside
    strings.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "a.jsonl"
    >>> _ = path.write_text("1\\n\\n2\\n")
    >>> [line for _, line in lines_of(path)]
    ['1', '2']
    """
    lines = enumerate(read_text(path).split("\n"), 1)
    return [(f"{path}:{number}", line) for number, line in lines if line.strip()]


def read_json(path: Path) -> Any:
    """Return a JSON file.

    Raises:
      UserError: it is none.
    Example:
      >>> import tempfile
      >>> path = Path(tempfile.mkdtemp()) / "a.json"
      >>> _ = path.write_text('{"a": 1}')
      >>> read_json(path)
      {'a': 1}
    """
    try:
        return json.loads(read_text(path))
    except ValueError as error:
        raise UserError(f"{path} is no JSON: {error}") from None


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a JSON Lines file.

    Raises:
      UserError: a line is no JSON object.
    Example:
      >>> import tempfile
      >>> path = Path(tempfile.mkdtemp()) / "a.jsonl"
      >>> _ = path.write_text('{"a": 1}')
      >>> read_jsonl(path)
      [{'a': 1}]
    """
    found = []
    for place, line in lines_of(path):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{place} is no JSON: {error}") from None
        if not isinstance(row, dict):
            raise UserError(f"{place} must be a JSON object: got {type(row).__name__}")
        found.append(row)
    return found


def read_parquet(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a Parquet file.

    Raises:
      UserError: it is none.
    Example::

      rows = read_parquet(folder / "chinese_simplevqa.parquet")
    """
    return [row for row, _ in parquet_rows(path)]
