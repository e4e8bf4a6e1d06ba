"""Rows of Arrow tables: Parquet files, saved ``datasets``, data sets of the hub."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxalign.data import stored_pictures
from jaxalign.data.messages import without_nulls
from jaxalign.errors import UserError


__all__ = [
    "SOURCES",
    "hub_rows",
    "parquet_rows",
    "saved_files",
    "saved_rows",
    "without_filled",
]


_ROWS = 1024  # at once

SOURCES = (
    "a .jsonl, .jsonl.gz, .json, .csv or .parquet file, a pattern of such files, a "
    "directory that datasets' save_to_disk wrote, tfds:NAME_OR_DIRECTORY:SPLIT or "
    "hf:OWNER/NAME:SPLIT"
)
"""What ``--data`` takes, for messages."""


def parquet_rows(path: Path) -> Iterator[tuple[Any, str]]:
    """Yield the rows of a Parquet file with their places.

    Raises:
      UserError: it cannot be read.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path)
        size, schema = path.stat().st_size, table.schema_arrow
        stored = stored_pictures.byte_columns(schema)
        if not stored or size < stored_pictures.LARGE:
            yield from _numbered(table.iter_batches(), path)
            return

        def batches(names: Sequence[str], most: int | None) -> Iterator[Any]:
            return table.iter_batches(batch_size=most or _ROWS, columns=list(names))

        key = f"{path.absolute()}\0{path.stat().st_mtime_ns}\0{size}"
        found = stored_pictures.rows(batches, schema.names, stored, key)
        yield from _placed(found, path)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable Parquet file: {error}") from None


def saved_rows(directory: Path) -> Iterator[tuple[Any, str]]:
    """Yield the rows of a data set that ``datasets.Dataset.save_to_disk`` wrote.

    Raises:
      UserError: the directory holds something else, or cannot be read.
    """
    import pyarrow

    for path in saved_files(directory):
        try:
            with pyarrow.memory_map(str(path)) as file:
                yield from _saved(file, path)
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            raise UserError(f"{path}: not a readable Arrow file: {error}") from None


def _saved(file: Any, path: Path) -> Iterator[tuple[Any, str]]:
    import pyarrow

    size, schema = file.size(), pyarrow.ipc.open_stream(file).schema
    stored = stored_pictures.byte_columns(schema)

    def batches(names: Sequence[str], most: int | None) -> Iterator[Any]:
        file.seek(0)
        for batch in pyarrow.ipc.open_stream(file):
            part = batch.select(list(names))
            for start in range(0, part.num_rows, most or _ROWS):
                yield part.slice(start, most or _ROWS)

    if not stored or size < stored_pictures.LARGE:
        yield from _numbered(batches(schema.names, None), path)
        return
    key = f"{path.absolute()}\0{path.stat().st_mtime_ns}\0{size}"
    found = stored_pictures.rows(batches, schema.names, stored, key)
    yield from _placed(found, path)


def saved_files(directory: Path) -> list[Path]:
    """Return the Arrow files of a saved data set, in order.

    Raises:
      UserError: the directory holds something else.
    """
    state = directory / "state.json"
    if not state.is_file():
        raise UserError(
            f"{directory} is not a file: expected {SOURCES}{_cure(directory)}"
        )
    try:
        found = json.loads(state.read_text(encoding="utf-8"))
        names = [file["filename"] for file in found["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{state}: not as datasets writes it: {type(error).__name__}: {error}. "
            "Save the data set again"
        ) from None
    if found.get("_indices_files") or found.get("_indices_data_files"):
        raise UserError(
            f"{state}: rows are picked through an index, as old versions of datasets "
            "saved them. Save the data set again"
        )
    return [directory / name for name in names]


def hub_rows(source: str) -> Iterator[tuple[Any, str]]:
    """Yield the rows of ``hf:OWNER/NAME:SPLIT`` or ``hf:OWNER/NAME@REVISION:SPLIT``.

    The library ``datasets`` fetches it, or takes it from its cache.

    Raises:
      UserError: the library is not there, or it cannot load the data set.
    """
    name, _, split = source.removeprefix("hf:").partition(":")
    if not name or not split:
        raise UserError(
            f"{source!r} names no split: expected hf:OWNER/NAME:SPLIT, such as "
            "hf:nvidia/HelpSteer2:train"
        )
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"{source}: data sets of the hub need the library datasets: pip install "
            "datasets. Or give a file"
        ) from None
    name, _, revision = name.partition("@")
    try:
        data: Any = datasets.load_dataset(name, split=split, revision=revision or None)
        table = data.with_format("arrow")
    except Exception as error:  # datasets raises many kinds, network or argument
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"{source}: datasets says: {type(error).__name__}: {reason}. Where the "
            "hub cannot be reached, fetch it elsewhere, save_to_disk it, and give the "
            "directory"
        ) from None
    stored = stored_pictures.byte_columns(data.features.arrow_schema)
    if not stored or table.data.nbytes < stored_pictures.LARGE:
        yield from _numbered(table.iter(batch_size=_ROWS), source)
        return

    def batches(names: Sequence[str], most: int | None) -> Iterator[Any]:
        return table.select_columns(list(names)).iter(batch_size=most or _ROWS)

    key = f"{source}\0{data._fingerprint}"
    found = stored_pictures.rows(batches, table.column_names, stored, key)
    yield from _placed(found, source)


def _numbered(batches: Iterable[Any], place: str | Path) -> Iterator[tuple[Any, str]]:
    return _placed((row for batch in batches for row in batch.to_pylist()), place)


def _placed(
    rows: Iterable[Mapping[str, Any]], place: str | Path
) -> Iterator[tuple[Any, str]]:
    for number, row in enumerate(rows, 1):
        yield without_filled(row), f"{place}:row {number}"


def without_filled(row: Mapping[str, Any]) -> dict[str, Any]:
    """Drop the nulls by which Arrow fills keys that other rows have.

    All objects of a column have the same keys there: what a turn, a part of it, a tool
    or a segment lacks is null. Only a turn's ``content`` may be null on purpose.
    """
    return {name: without_nulls(value, "content") for name, value in row.items()}


def _cure(directory: Path) -> str:
    """Say what a directory that holds no saved data set might be."""
    if (directory / "dataset_dict.json").is_file():
        names = sorted(p.parent.name for p in directory.glob("*/state.json"))
        return f". It is a saved data set of several splits: add one of {names}"
    if (directory / "features.json").is_file():
        return f". It is a tensorflow-datasets set: give tfds:{directory}:SPLIT"
    if any(directory.glob("*.parquet")):
        return f". Give the files of one split, such as '{directory}/train-*.parquet'"
    return ""
