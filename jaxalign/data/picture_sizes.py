"""The sizes of many pictures: read from their headers in parallel, and kept on disk.

Lengths and packing need every picture's size before the first step. A header takes a
tenth of a millisecond from a local disk and much more over a network, so that the
sizes of files are kept: one small file for one list of paths, with what each file's
time and length were. Of a picture that has changed since the header is read again.
"""

import hashlib
import os
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from jaxalign import progress
from jaxalign.data.picture import Picture


__all__ = ["cache_home", "sizes"]

T = TypeVar("T")
R = TypeVar("R")

_THREADS = 16  # what takes time is waiting for files
_CHUNK = 64
_MANY = 2000  # pictures that are worth a line


def cache_home() -> Path:
    """Return where what can be made again is kept: ``$XDG_CACHE_HOME/jaxalign``."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "jaxalign"


def sizes(
    pictures: Sequence[Picture], cache_dir: str | Path | None = None
) -> list[tuple[int, int]]:
    """Return the width and height of each picture, as it is opened.

    Args:
      pictures: of all records.
      cache_dir: where the sizes of files are kept; default :func:`cache_home`. Of what
        is no file of its own the header is read each time.
    Raises:
      UserError: of the first one that cannot be read, see :meth:`Picture.size`.
    """
    # One file may be shown by many records, and by each half of a pair that is split.
    unique: dict[Any, Picture] = {}
    for picture in pictures:
        unique.setdefault(picture.source, picture)
    known = dict(zip(unique, _sizes(list(unique.values()), cache_dir), strict=True))
    return [known[picture.source] for picture in pictures]


def _sizes(
    pictures: Sequence[Picture], cache_dir: str | Path | None
) -> list[tuple[int, int]]:
    found = np.zeros((len(pictures), 2), np.int64)
    files = np.array(
        [i for i, p in enumerate(pictures) if isinstance(p.source, Path)], np.int64
    )
    paths = [str(pictures[i].source) for i in files]
    kept = Path(cache_dir or cache_home()) / "sizes" / f"{_key(paths)}.npz"
    with ThreadPoolExecutor(_THREADS) as pool:
        marks = np.array(list(_mapped(pool, _mark, paths)), np.int64).reshape(-1, 2)
        known = _read(kept, len(paths))
        fresh = (known[:, :2] == marks).all(1) & (marks[:, 1] >= 0)
        found[files] = known[:, 2:]
        wanted = np.ones(len(pictures), bool)
        wanted[files[fresh]] = False
        numbers = wanted.nonzero()[0]
        read = _mapped(pool, lambda i: pictures[i].size(), numbers.tolist())
        if len(numbers) >= _MANY:
            read = progress.track(read, len(numbers), "reading pictures' headers")
        for i, size in zip(numbers, read, strict=True):
            found[i] = size
    if not fresh.all():
        _write(kept, np.concatenate([marks, found[files]], 1))
    return [(int(width), int(height)) for width, height in found]


def _mapped(
    pool: ThreadPoolExecutor, function: Callable[[T], R], items: Sequence[T]
) -> Iterator[R]:
    """Yield what a function gives of the items, a task for many of them."""
    chunks = (items[i : i + _CHUNK] for i in range(0, len(items), _CHUNK))
    for results in pool.map(lambda chunk: [function(item) for item in chunk], chunks):
        yield from results


def _key(paths: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(f"{path}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:32]


def _mark(path: str) -> tuple[int, int]:
    """Return what tells a file from what it was, and (-1, -1) of none."""
    try:
        stat = os.stat(path)
    except (OSError, ValueError):
        return -1, -1
    return stat.st_mtime_ns, stat.st_size


def _read(kept: Path, count: int) -> np.ndarray:
    """Return time, length, width and height of each file, as they were; -1 of none."""
    none = np.full((count, 4), -1, np.int64)
    try:
        # An open file, as numpy does not close one that it finds broken.
        with kept.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            rows = stored["files"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return none
    return rows if rows.shape == none.shape and rows.dtype == none.dtype else none


def _write(kept: Path, rows: np.ndarray) -> None:
    """Keep them, whole or not at all, whoever else writes the same at this time."""
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=kept.parent, delete=False) as file:
            np.savez(file, files=rows)
        os.replace(file.name, kept)
    except OSError as error:
        progress.say_once(
            f"the sizes of pictures are not kept, and are read again next time: {error}"
        )
