"""A file of tokenised pairs: written once, and read as views of what lies there.

Each column is one array, that of all pairs one behind the other, so that a pair's are
views of the mapped file: what is not looked at takes no memory. Behind the columns
comes what says where they are (JSON), then the length of that, then the SHA-256 of all.
"""

import hashlib
import itertools
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from jaxalign.data.chat import Branch, TokenizedPair
from jaxalign.data.pairs import PairDataset
from jaxalign.data.patches import PictureLayout
from jaxalign.data.records import Record
from jaxalign.data.rendering import Renderer


__all__ = ["FORMAT", "read", "write"]

FORMAT = 1
"""To be raised with any change of the file."""

_ALIGNMENT = 64
_AT_ONCE = 4096  # pairs
_LENGTH_BYTES, _HASH_BYTES = 8, 32
_READ_BYTES = 2**22


class _Column(NamedTuple):
    """One array of every pair, of any length."""

    dtype: str
    of: Callable[[TokenizedPair], Any]
    """Gives it; None where a pair has none."""
    width: int = 0
    """What a pair has: 0 the array, 1 its one number, n tuples of n numbers."""


def _columns_of(side: str) -> dict[str, _Column]:
    def column(dtype: str, of: Callable[[Branch], Any], width: int = 0) -> _Column:
        return _Column(dtype, lambda pair: of(getattr(pair, side)), width)

    columns = {
        "tokens": column("<i4", lambda branch: branch.tokens),
        "lead": column("<i8", lambda branch: [branch.lead], 1),
        "segments": column("<i4", lambda branch: branch.segments),
        "scores": column("<f4", lambda branch: branch.scores),
        "scored": column("|b1", lambda branch: branch.scored),
        "offsets": column("<i8", lambda branch: branch.offsets, 3),
        "weights": column("<f4", lambda branch: branch.weights),
        "learnt": column("|b1", lambda branch: branch.learnt),
    }
    return {f"{side}.{name}": one for name, one in columns.items()}


_COLUMNS = {
    "prompt": _Column("<i4", lambda p: p.prompt),
    **_columns_of("chosen"),
    **_columns_of("rejected"),
    "label": _Column("|b1", lambda p: None if p.label is None else [p.label], 1),
    "weight": _Column("<f8", lambda p: [p.weight], 1),
    "learn_prompt": _Column("|b1", lambda p: [p.learn_prompt], 1),
    "feature_places": _Column("<i4", lambda p: p.feature_places),
    "stretches": _Column("<i8", lambda p: p.stretches, 2),
    "units": _Column("<i8", lambda p: [p.units], 1),
    "feature_grids": _Column("<i8", lambda p: p.feature_grids, 2),
}


def write(path: Path, key: str, data: PairDataset) -> None:
    """Write the pairs of a key, whole or not at all.

    Args:
      path: file; directories above it are made.
      key: see :func:`jaxalign.data.kept_pairs.key_of`.
      data: what ``pairs.prepare`` made.
    Raises:
      OSError: the disk is full or the place cannot be written.
    Example::

      write(Path("tokens.bin"), key, pairs.prepare(found, renderer, max_length=512))
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False)
    try:
        with file:
            _write(file, key, data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(file.name, path)
    finally:
        Path(file.name).unlink(missing_ok=True)


def _write(file: IO[bytes], key: str, data: PairDataset) -> None:
    out = _Hashed(file)
    places = {"indices": out.array([np.array(data.indices, np.int64)])}
    known = {one: i for i, one in enumerate(dict.fromkeys(_layouts(data)))}
    layouts = _Column("<i8", lambda pair: [known[one] for one in pair.layouts])
    for name, (dtype, of, _) in {**_COLUMNS, "layouts": layouts}.items():
        values = [_flat(of(pair), dtype) for pair in data.pairs]
        counts = np.array([-1 if v is None else v.size for v in values], np.int64)
        places[_counts(name)] = out.array([counts])
        places[name] = out.array([v for v in values if v is not None])
    head = {
        "key": key,
        "aspects": data.aspects,
        "report": data.report,
        "layouts": list(known),
        "places": places,
    }
    text = json.dumps(head).encode()
    out.write(text)
    out.write(len(text).to_bytes(_LENGTH_BYTES, "little"))
    file.write(out.digest.digest())


def _flat(value: Any, dtype: str) -> np.ndarray | None:
    return None if value is None else np.asarray(value, dtype).ravel()


def _counts(column: str) -> str:
    return f"{column}, counts"


def _layouts(data: PairDataset) -> Iterator[PictureLayout]:
    return itertools.chain.from_iterable(pair.layouts for pair in data.pairs)


class _Hashed:
    """A file that is written with the hash of all that is in it."""

    def __init__(self, file: IO[bytes]) -> None:
        self.digest = hashlib.sha256()
        self._file = file
        self._size = 0

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self.digest.update(data)
        self._size += len(data)

    def array(self, parts: Sequence[np.ndarray]) -> tuple[int, int]:
        """Write arrays one behind the other; returns where, and how many bytes."""
        self.write(b"\0" * (-self._size % _ALIGNMENT))
        start = self._size
        for i in range(0, len(parts), _AT_ONCE):
            self.write(np.concatenate(parts[i : i + _AT_ONCE]).tobytes())
        return start, self._size - start


def read(
    path: Path, key: str, records: Sequence[Record], renderer: Renderer
) -> PairDataset:
    """Read the pairs of a key, as views of the mapped file.

    Args:
      path: of :func:`write`.
      key: see :func:`jaxalign.data.kept_pairs.key_of`.
      records: that the key is of; pictures are theirs.
      renderer: that the key is of.
    Raises:
      OSError: it cannot be read.
      ValueError: it is cut off, changed, or of another key.
    Example::

      data = read(Path("tokens.bin"), key, found, renderer)
    """
    mapped, head = _opened(path)
    if head["key"] != key:
        raise ValueError("it is of other data or options")

    def flat(name: str, dtype: str) -> np.ndarray:
        start, size = head["places"][name]
        return mapped[start : start + size].view(dtype)

    def column(name: str, dtype: str, width: int = 0) -> list[Any]:
        values, counts = flat(name, dtype), flat(_counts(name), "<i8")
        if width == 1:
            return _numbers(values, counts)
        found = _split(values, counts)
        return _tuples(found, width) if width else found

    found = {
        name: column(name, dtype, width) for name, (dtype, _, width) in _COLUMNS.items()
    }
    layouts = [
        PictureLayout(text, tuple(map(tuple, grids))) for text, grids in head["layouts"]
    ]
    found["layouts"] = [
        tuple(layouts[i] for i in numbers.tolist())
        for numbers in column("layouts", "<i8")
    ]
    indices = flat("indices", "<i8").tolist()
    sees = renderer.patcher is not None
    found["images"] = [records[i].images if sees else () for i in indices]
    aspects = tuple(head["aspects"])
    for side in ("chosen", "rejected"):
        parts = {name: found[f"{side}.{name}"] for name in Branch._fields}
        nothing = np.zeros((0, len(aspects)), np.float32)
        parts["scores"] = [
            scores.reshape(len(scored), len(aspects)) if len(scored) else nothing
            for scores, scored in zip(parts["scores"], parts["scored"], strict=True)
        ]
        found[side] = list(map(Branch, *parts.values()))
    pairs = list(map(TokenizedPair, *(found[name] for name in TokenizedPair._fields)))
    return PairDataset(pairs, indices, aspects, head["report"], renderer.patcher)


def _opened(path: Path) -> tuple[np.ndarray, dict[str, Any]]:
    """Return a file's bytes, mapped, and what it says of itself."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size - _HASH_BYTES
        if size < _LENGTH_BYTES:
            raise ValueError(f"{path.stat().st_size} bytes are no file of tokens")
        digest, left = hashlib.sha256(), size
        while left and (data := file.read(min(left, _READ_BYTES))):
            digest.update(data)
            left -= len(data)
        if digest.digest() != file.read(_HASH_BYTES):
            raise ValueError("its SHA-256 is not the one that was written")
        mapped = np.memmap(file, np.uint8, mode="r").view(np.ndarray)
    end = size - _LENGTH_BYTES
    length = int.from_bytes(mapped[end:size].tobytes(), "little")
    return mapped, json.loads(mapped[end - length : end].tobytes())


def _split(flat: np.ndarray, counts: np.ndarray) -> list[Any]:
    """Return the part of every pair; None where it has none."""
    nothing, ends = flat[:0], np.cumsum(np.maximum(counts, 0)).tolist()
    return [
        flat[end - count : end] if count > 0 else nothing if count == 0 else None
        for count, end in zip(counts.tolist(), ends, strict=True)
    ]


def _numbers(flat: np.ndarray, counts: np.ndarray) -> list[Any]:
    """Return the one number of every pair; None where it has none."""
    values = iter(flat.tolist())
    return [None if count < 0 else next(values) for count in counts.tolist()]


def _tuples(arrays: Sequence[np.ndarray | None], width: int) -> list[Any]:
    """Return arrays as tuples of tuples of ``width`` numbers; of equal ones one."""
    known: dict[bytes | None, Any] = {None: None}
    found = []
    for values in arrays:
        key = None if values is None else values.tobytes()
        if values is not None and key not in known:
            known[key] = tuple(map(tuple, values.reshape(-1, width).tolist()))
        found.append(known[key])
    return found
