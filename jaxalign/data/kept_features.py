"""What a frozen tower makes of pictures, on disk: computed once, read as it lies there.

A folder holds those of one key (see :func:`folder_of`). ``values.bin`` has one row of
numbers a feature, those of a picture one behind the other in the order of the text;
``index.jsonl`` says by the SHA-256 of a picture's file where they are. Numbers are on
the disk before the index names them, and what it does not name is cut off when filling
goes on: a process that is killed leaves nothing half.
"""

import contextlib
import fcntl
import functools
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

import ml_dtypes
import numpy as np

from jaxalign.data.picture import Picture
from jaxalign.errors import UserError
from jaxalign.whole_file import write_text, writing


__all__ = [
    "Filling",
    "ImageFeatures",
    "Kept",
    "KeptFeatures",
    "digests",
    "filling",
    "folder_of",
]

ImageFeatures = Literal["recompute", "cached"]
"""Whether a tower runs whenever its features are wanted, or once a picture."""

Kept = Literal["states", "features"]
"""``states``: what the tower makes of a unit's patches, one patch behind the other;
``features``: what the connector makes of those."""

_KEY, _FORM, _INDEX, _VALUES = "key.json", "form.json", "index.jsonl", "values.bin"
_THREADS = 16  # what takes time is waiting for files
_DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


class KeptFeatures(NamedTuple):
    """The features of the pictures of a data set, in the place of their patches."""

    kind: Kept
    folder: str
    places: Mapping[Any, tuple[int, int]]
    """By a picture's ``source`` the first of its rows, and how many they are."""
    width: int
    """Numbers of a row: of a feature, or of a unit's states."""
    dtype: str

    def of(self, picture: Picture) -> np.ndarray:
        """Return a picture's rows [features, width], mapped from the disk."""
        start, count = self.places[picture.source]
        path = str(Path(self.folder) / _VALUES)
        return _mapped(path, self.dtype, self.width)[start : start + count]

    @property
    def numbers(self) -> np.dtype:
        """Return what kind of numbers they are."""
        return _DTYPES[self.dtype]


@functools.lru_cache(maxsize=8)  # a process of a loader opens its own
def _mapped(path: str, dtype: str, width: int) -> np.ndarray:
    kind = _DTYPES[dtype]
    rows = os.path.getsize(path) // (kind.itemsize * width)
    return np.memmap(path, kind, mode="r", shape=(rows, width))


def digests(pictures: Sequence[Picture]) -> dict[Any, str]:
    """Return the SHA-256 of each picture's file, by the picture's ``source``.

    Raises:
      UserError: see ``Picture.read``.
    """
    unique = {picture.source: picture for picture in pictures}
    with ThreadPoolExecutor(_THREADS) as pool:
        found = pool.map(Picture.digest, unique.values())
        return dict(zip(unique, found, strict=True))


def folder_of(directory: Path, key: Mapping[str, str]) -> Path:
    """Return where the features of a key lie: all that decides their numbers.

    >>> folder_of(Path("run"), {"tower": "a", "dtype": "float32"}).name
    'b2399c886688f03c'
    """
    text = json.dumps(dict(key), sort_keys=True)
    return directory / hashlib.sha256(text.encode()).hexdigest()[:16]


class Filling:
    """A folder of features that is held against other processes, to be filled."""

    def __init__(self, folder: Path, kind: Kept) -> None:
        self._folder = folder
        self._kind: Kept = kind
        self._index, self._rows = _read_index(folder)
        head = _read_head(folder)
        self._width, self._dtype = head if head is not None else (0, "")
        if head is None or not _holds(folder, self._rows, head):
            self._index, self._rows = {}, 0

    def __contains__(self, digest: str) -> bool:
        return digest in self._index

    def add(self, found: Sequence[tuple[str, np.ndarray]]) -> None:
        """Keep the rows of some pictures: on the disk when this returns.

        Args:
          found: the SHA-256 of each picture's file, and its rows.
        """
        if not found:
            return
        rows = np.concatenate([values for _, values in found])
        if not self._index:
            self._width, self._dtype = rows.shape[1], rows.dtype.name
            head = {"kind": self._kind, "width": self._width, "dtype": self._dtype}
            (self._folder / _INDEX).unlink(missing_ok=True)
            write_text(self._folder / _FORM, json.dumps(head) + "\n")
        size = self._rows * self._width * _DTYPES[self._dtype].itemsize
        with _opened(self._folder / _VALUES) as file:
            file.truncate(size)
            file.seek(size)
            file.write(np.ascontiguousarray(rows).view(np.uint8).data)
        lines = []
        for digest, values in found:
            self._index[digest] = self._rows, len(values)
            lines.append(json.dumps([digest, self._rows, len(values)]) + "\n")
            self._rows += len(values)
        with _opened(self._folder / _INDEX) as file:
            file.truncate(_whole_lines(self._folder / _INDEX))
            file.seek(0, os.SEEK_END)
            file.write("".join(lines).encode())

    def kept(self, known: Mapping[Any, str]) -> KeptFeatures:
        """Return the features of pictures, all of which are here.

        Args:
          known: of :func:`digests`.
        """
        places = {source: self._index[digest] for source, digest in known.items()}
        _mapped.cache_clear()  # the file may have been shorter when it was mapped
        folder = str(self._folder)
        return KeptFeatures(self._kind, folder, places, self._width, self._dtype)


@contextlib.contextmanager
def filling(folder: Path, kind: Kept, key: Mapping[str, str]) -> Iterator[Filling]:
    """Hold a folder of features; another process that wants the same waits.

    Raises:
      UserError: the disk is full or the place cannot be written.
    """
    with writing(folder, "what is there stays, and the same command goes on"):
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (folder / _KEY).is_file():
                write_text(folder / _KEY, json.dumps(dict(key), indent=2) + "\n")
            yield Filling(folder, kind)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """Open a file to write anywhere in it; what was written is on the disk then."""
    path.touch()
    with path.open("r+b") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def _read_head(folder: Path) -> tuple[int, str] | None:
    path = folder / _FORM
    if not path.is_file():
        return None
    head = json.loads(path.read_text(encoding="utf-8"))
    return int(head["width"]), str(head["dtype"])


def _whole_lines(path: Path) -> int:
    """Return how many bytes of an index are whole lines."""
    return path.read_bytes().rfind(b"\n") + 1


def _read_index(folder: Path) -> tuple[dict[str, tuple[int, int]], int]:
    """Return where each picture's rows are, and how many there are of all."""
    path, index, rows = folder / _INDEX, {}, 0
    if path.is_file():
        for line in path.read_bytes()[: _whole_lines(path)].splitlines():
            try:
                digest, start, count = json.loads(line)
            except ValueError:
                raise UserError(
                    f"{path} is broken: {line[:40]!r}. Remove {folder}: the features "
                    "are computed again"
                ) from None
            index[digest] = start, count
            rows = max(rows, start + count)
    return index, rows


def _holds(folder: Path, rows: int, head: tuple[int, str]) -> bool:
    """Tell whether the file of numbers has all that the index names."""
    path, (width, dtype) = folder / _VALUES, head
    size = path.stat().st_size if path.is_file() else 0
    return size >= rows * width * _DTYPES[dtype].itemsize
