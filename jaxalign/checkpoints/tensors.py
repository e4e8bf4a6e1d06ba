"""Safetensors files of a checkpoint directory, read a tensor (or a part) at a time."""

import contextlib
import hashlib
import json
import math
import mmap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from jaxalign.errors import UserError


__all__ = [
    "TensorFile",
    "TensorInfo",
    "TensorReader",
    "entries",
    "fingerprint",
    "framed",
    "list_files",
    "open_file",
    "raw_header",
    "read_json",
    "read_tensor",
    "sample",
]

DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
}
"""Kinds of numbers that a weight may have, as safetensors and numpy name them."""

KINDS = {
    **DTYPES,
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}
"""All that can be read: codes and indices too."""


class TensorInfo(NamedTuple):
    """What the header says of a tensor."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Return its size."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


class TensorReader:
    """The tensors of an open safetensors file.

    Each is mapped by itself and let go when its array is: pages of a file that is
    mapped whole count as memory of this process for as long as it is open.

    >>> import tempfile
    >>> from safetensors.numpy import save_file
    >>> path = Path(tempfile.mkdtemp()) / "model.safetensors"
    >>> save_file({"up": np.arange(6.0).reshape(2, 3)}, path)
    >>> with path.open("rb") as file:
    ...     TensorReader(file).get_slice("up")[1].tolist()
    [3.0, 4.0, 5.0]
    """

    def __init__(self, file: BinaryIO):
        self._file = file
        self._data = 8 + int.from_bytes(file.read(8), "little")
        self._entries = json.loads(file.read(self._data - 8))
        self._entries.pop("__metadata__", None)

    def keys(self) -> list[str]:
        """Return the names of the tensors."""
        return list(self._entries)

    def get_slice(self, name: str) -> np.ndarray:
        """Return a view of the file: a part that is not copied out of it is not read.

        Raises:
          OSError: the file has become shorter.
        """
        entry = self._entries[name]
        shape, dtype = entry["shape"], np.dtype(KINDS[entry["dtype"]])
        begin, end = (self._data + offset for offset in entry["data_offsets"])
        if begin == end:
            return np.zeros(shape, dtype)
        page = begin - begin % mmap.ALLOCATIONGRANULARITY
        try:
            pages = mmap.mmap(
                self._file.fileno(), end - page, access=mmap.ACCESS_READ, offset=page
            )
        except ValueError as error:
            raise OSError(str(error)) from None
        values = np.frombuffer(pages, dtype, math.prod(shape), begin - page)
        return values.reshape(shape)

    def get_tensor(self, name: str) -> np.ndarray:
        """Return a copy of a tensor."""
        return np.array(self.get_slice(name), order="C")


class TensorFile(NamedTuple):
    """One safetensors file and what it holds."""

    path: Path
    tensors: dict[str, TensorInfo]

    @contextlib.contextmanager
    def open(self) -> Iterator[TensorReader]:
        """Open the file, whose header :func:`list_files` has checked."""
        with _clean(self.path), self.path.open("rb") as file:
            yield TensorReader(file)


@contextlib.contextmanager
def open_file(path: Path) -> Iterator[TensorReader]:
    """Open a safetensors file of any kind of numbers that can be read.

    Raises:
      UserError: it is not there, is no safetensors file, or has other kinds of numbers.
    Example:
      >>> import tempfile
      >>> from safetensors.numpy import save_file
      >>> path = Path(tempfile.mkdtemp()) / "model.safetensors"
      >>> save_file({"norm": np.ones(2, np.float32)}, path)
      >>> with open_file(path) as reader:
      ...     reader.get_tensor("norm").tolist()
      [1.0, 1.0]
    """
    with _header(path, KINDS).open() as reader:
        yield reader


@contextlib.contextmanager
def _clean(path: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path}: not a readable safetensors file: {error}. Copy or download the "
            "checkpoint again"
        ) from None


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
      UserError: it is not there, or is no JSON object.
    Example:
      >>> import tempfile
      >>> path = Path(tempfile.mkdtemp()) / "config.json"
      >>> _ = path.write_text('{"model_type": "llama"}')
      >>> read_json(path)
      {'model_type': 'llama'}
    """
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(
            f"{path} is missing: expected a Hugging Face checkpoint directory with "
            "config.json, *.safetensors and tokenizer files"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a JSON object: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: not a JSON object: got {type(value).__name__}")
    return value


def list_files(
    directory: str | Path, stem: str = "model", kinds: Mapping[str, str] = DTYPES
) -> list[TensorFile]:
    """List the safetensors files of a checkpoint and read their headers.

    Args:
      directory: with ``<stem>.safetensors``, or the files that
        ``<stem>.safetensors.index.json`` names.
      stem: ``model`` or ``adapter_model``.
      kinds: of numbers that are expected.
    Raises:
      UserError: no such file, a broken header, an index that disagrees with its files.
    Example:
      >>> import tempfile
      >>> from safetensors.numpy import save_file
      >>> folder = Path(tempfile.mkdtemp())
      >>> save_file({"norm": np.ones(2, np.float32)}, folder / "model.safetensors")
      >>> [file.tensors["norm"].nbytes for file in list_files(folder)]
      [8]
    """
    directory = Path(directory)
    index = directory / f"{stem}.safetensors.index.json"
    single = directory / f"{stem}.safetensors"
    if single.is_file():
        return [_header(single, kinds)]
    if not index.is_file():
        other = [*directory.glob("*.bin"), *directory.glob("*.pt")]
        hint = (
            " It has pickled weights only; save it as safetensors first "
            "(save_pretrained does)"
            if other
            else ""
        )
        raise UserError(
            f"{directory} holds no weights: expected {single.name} or "
            f"{index.name}.{hint}"
        )
    mapping = read_json(index).get("weight_map")
    if not isinstance(mapping, Mapping) or not all(
        isinstance(name, str) and isinstance(file, str) and Path(file).name == file
        for name, file in mapping.items()
    ):
        raise UserError(f"{index}: weight_map must map tensor names to file names")
    files = []
    for name in sorted(set(mapping.values())):
        if not (directory / name).is_file():
            raise UserError(f"{directory / name} is missing, but {index.name} names it")
        files.append(_header(directory / name, kinds))
    found: dict[str, str] = {}
    for file in files:
        for name in file.tensors:
            if name in found:
                raise UserError(
                    f"{directory}: both {found[name]} and {file.path.name} hold the "
                    f"tensor {name!r}. Copy or download the checkpoint again"
                )
            found[name] = file.path.name
    lost = sorted(name for name in mapping if found.get(name) != mapping[name])
    if lost:
        raise UserError(
            f"{index} names {lost[0]!r} in {mapping[lost[0]]}, which does not hold it"
        )
    return files


def read_tensor(directory: str | Path, name: str) -> np.ndarray | None:
    """Read one tensor of a checkpoint; None if no file holds it.

    Raises:
      UserError: see :func:`list_files`.
    Example:
      >>> import tempfile
      >>> from safetensors.numpy import save_file
      >>> folder = Path(tempfile.mkdtemp())
      >>> save_file({"norm": np.ones(2, np.float32)}, folder / "model.safetensors")
      >>> read_tensor(folder, "norm").tolist(), read_tensor(folder, "head") is None
      ([1.0, 1.0], True)
    """
    for file in list_files(directory):
        if name in file.tensors:
            with file.open() as handle:
                return handle.get_tensor(name)
    return None


def _header(path: Path, kinds: Mapping[str, str]) -> TensorFile:
    tensors = {}
    with _clean(path), safe_open(path, framework="np") as handle:
        for name in handle.keys():
            piece = handle.get_slice(name)
            dtype = str(piece.get_dtype())
            if dtype not in kinds:
                raise UserError(
                    f"{path}: tensor {name!r} has the type {dtype}, which is not "
                    f"supported: expected {', '.join(kinds)}"
                )
            tensors[name] = TensorInfo(tuple(piece.get_shape()), kinds[dtype])
    return TensorFile(path, tensors)


def raw_header(path: Path) -> bytes:
    """Return a file's header as it stands, with its length in front.

    The file was opened by :func:`list_files` before, which has checked it.

    >>> import tempfile
    >>> from safetensors.numpy import save_file
    >>> path = Path(tempfile.mkdtemp()) / "model.safetensors"
    >>> save_file({"norm": np.ones(2, np.float32)}, path)
    >>> header = raw_header(path)
    >>> int.from_bytes(header[:8], "little") == len(header) - 8
    True
    """
    with path.open("rb") as file:
        length = file.read(8)
        text = file.read(int.from_bytes(length, "little"))
    return length + text


def framed(text: bytes) -> bytes:
    """Return a header with its length in front.

    >>> framed(b"{}")
    b'\\x02\\x00\\x00\\x00\\x00\\x00\\x00\\x00{}'
    """
    return len(text).to_bytes(8, "little") + text


def entries(header: bytes) -> dict[str, Any]:
    """Return what a header says of each tensor, in the order of their data.

    Args:
      header: with its length in front, see :func:`raw_header`.
    Example:
      >>> entries(framed(b'{"norm":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'))
      {'norm': {'dtype': 'F32', 'shape': [2], 'data_offsets': [0, 8]}}
    """
    found = {k: v for k, v in json.loads(header[8:]).items() if k != "__metadata__"}
    # Empty tensors share an offset; the sort is stable.
    return dict(sorted(found.items(), key=lambda item: item[1]["data_offsets"]))


def fingerprint(directory: Path, stem: str = "model", samples: int = 512) -> str:
    """Return a hash that changes with the weights, without reading all of them.

    Takes in config.json, and of every weight file its size, its header and 4 KiB at
    ``samples`` evenly spaced places.

    Raises:
      UserError: see :func:`list_files`.
    Example:
      >>> import tempfile
      >>> from safetensors.numpy import save_file
      >>> folder = Path(tempfile.mkdtemp())
      >>> save_file({"norm": np.ones(2, np.float32)}, folder / "model.safetensors")
      >>> before = fingerprint(folder)
      >>> save_file({"norm": np.zeros(2, np.float32)}, folder / "model.safetensors")
      >>> fingerprint(folder) == before
      False
    """
    digest = hashlib.sha256()
    for name in ("config.json", "adapter_config.json"):
        if (directory / name).is_file():
            digest.update((directory / name).read_bytes())
    for file in list_files(directory, stem, KINDS):
        size = file.path.stat().st_size
        digest.update(f"{file.path.name}:{size}".encode())
        with file.path.open("rb") as handle:
            header = int.from_bytes(handle.read(8), "little")
            digest.update(handle.read(header))
            sample(handle, 8 + header, size, digest, samples)
    return digest.hexdigest()


def sample(
    file: BinaryIO, begin: int, end: int, digest: Any, samples: int = 512
) -> None:
    """Put 4 KiB at evenly spaced places of a file into a hash.

    Args:
      file: open for reading bytes.
      begin: first place.
      end: behind the last.
      digest: of ``hashlib``.
      samples: how many places.
    Example:
      >>> import tempfile
      >>> path, digest = Path(tempfile.mkdtemp()) / "weights", hashlib.sha256()
      >>> _ = path.write_bytes(b"weights")
      >>> with path.open("rb") as file:
      ...     sample(file, 0, 7, digest, samples=1)
      >>> digest.digest() == hashlib.sha256(b"weights").digest()
      True
    """
    for place in np.linspace(begin, end, samples, endpoint=False):
        file.seek(int(place))
        digest.update(file.read(4096))
