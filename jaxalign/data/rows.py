"""Rows of files and data sets, with their places."""

import codecs
import csv
import glob
import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxalign.data import given, tables
from jaxalign.errors import UserError


__all__ = ["fingerprint", "hash_files", "image_base", "read_rows"]

_LONGEST = 4096
"""Characters of a path."""


def read_rows(source: Any) -> Iterator[tuple[Any, str]]:
    """Yield every row of a source with its place, for messages.

    Args:
      source: rows, see :func:`jaxalign.data.given.rows_of`; or, by name, a
        ``.jsonl`` (also ``.jsonl.gz``), ``.json`` (a list of objects), ``.csv`` or
        ``.parquet`` file; a pattern such as ``data/train-*.parquet``, read in the
        order of the names; a directory that ``datasets.Dataset.save_to_disk`` wrote;
        ``tfds:NAME_OR_DIRECTORY:SPLIT`` for a tensorflow-datasets source; or
        ``hf:OWNER/NAME:SPLIT`` for a data set of the Hugging Face hub, which needs the
        library ``datasets``.
    Raises:
      UserError: it cannot be read; the text names file and line.
    Example:
      >>> [(row["prompt"], where) for row, where in read_rows([{"prompt": "Q"}])]
      [('Q', 'list row 1')]
    """
    if not isinstance(source, str | Path):
        yield from given.rows_of(source)
        return
    source = _name(source)
    if source.startswith("tfds:"):
        from jaxalign.data import tfds_rows

        yield from tfds_rows.read(source)
        return
    if source.startswith("hf:"):
        yield from tables.hub_rows(source)
        return
    if Path(source).is_dir():
        yield from tables.saved_rows(Path(source))
        return
    for path in _files(source):
        match path.suffix:
            case ".parquet":
                yield from tables.parquet_rows(path)
            case ".csv":
                yield from _csv_rows(path)
            case ".json" if _is_list(path):
                yield from _json_list(path)
            case _:
                yield from _json_rows(path)


def _name(source: str | Path) -> str:
    name = str(source)
    if len(name) > _LONGEST or name.lstrip()[:1] in ("{", "["):
        raise UserError(
            f"got a text of {len(name)} characters: expected the name of "
            f"{tables.SOURCES}. Give rows themselves as objects, {given.ROWS}"
        )
    return name


def image_base(source: Any, image_dir: str | Path | None = None) -> Path | None:
    """Return where the relative paths of a source's pictures start.

    In ``image_dir`` if one is given; else beside the file, or all the files, of text.
    For rows that Python has it is the working directory; for Parquet, saved data sets,
    ``tfds:`` and ``hf:``, which move without what lay beside them, there is none.

    Raises:
      UserError: ``image_dir`` is no directory.
    Example:
      >>> image_base([{"prompt": "Q"}], "/").parts
      ('/',)
    """
    if image_dir is not None:
        if not Path(image_dir).is_dir():
            raise UserError(
                f"--image_dir {image_dir} is not a directory: give the one that "
                "relative paths of pictures start in"
            )
        return Path(image_dir)
    if not isinstance(source, str | Path):
        return Path()
    source = _name(source)
    if source.startswith(("tfds:", "hf:")) or Path(source).is_dir():
        return None
    files = _files(source)
    folders = {path.parent for path in files}
    if len(folders) > 1 or any(path.suffix == ".parquet" for path in files):
        return None
    return folders.pop()


def fingerprint(source: str | Path) -> str:
    """Return what tells a source from one with other contents.

    The SHA-256 of a file; for several files, of their names and contents. Of a data set
    that is read by name, the name: its versions are fixed elsewhere.

    Raises:
      UserError: a file cannot be read.
    Example:
      >>> import tempfile
      >>> path = Path(tempfile.mkdtemp()) / "pairs.jsonl"
      >>> _ = path.write_text('{"prompt": "Q"}')
      >>> fingerprint(path)[:8], fingerprint("hf:owner/name:train")
      ('0aa45fac', 'hf:owner/name:train')
    """
    source = str(source)
    if source.startswith("hf:"):
        return source
    if source.startswith("tfds:"):
        from jaxalign.data import tfds_rows

        directory, split = tfds_rows.located(source)
        if directory is None:
            return source
        return f"{hash_files(sorted(directory.iterdir()))}:{split}"
    if Path(source).is_dir():
        return hash_files(tables.saved_files(Path(source)))
    files = _files(source)
    return _hash(files[0]) if len(files) == 1 else hash_files(files)


def _files(source: str) -> list[Path]:
    if Path(source).is_file():
        return [Path(source)]
    found = sorted(Path(p) for p in glob.glob(source) if Path(p).is_file())
    if not found:
        raise UserError(f"{source} is not a file: expected {tables.SOURCES}")
    return found


def _hash(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def hash_files(files: list[Path]) -> str:
    """Return the SHA-256 of files' names and contents, in their order.

    >>> hash_files([])[:8]
    'e3b0c442'
    """
    digest = hashlib.sha256()
    for path in files:
        if path.is_file():
            digest.update(f"{path.name}\n{_hash(path)}\n".encode())
    return digest.hexdigest()


def _is_list(path: Path) -> bool:
    """Tell whether a file holds one JSON list; some name JSON Lines ``.json`` too."""
    with path.open("rb") as file:
        return file.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"["


def _json_list(path: Path) -> Iterator[tuple[Any, str]]:
    try:
        rows = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a readable JSON file: {error}") from None
    for number, row in enumerate(rows, 1):
        yield row, f"{path}:row {number}"


def _csv_rows(path: Path) -> Iterator[tuple[Any, str]]:
    number = 0
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
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
