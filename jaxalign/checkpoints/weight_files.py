"""Weight files out: their sizes and headers, and their bytes through to the disk."""

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from safetensors.numpy import save_file

from jaxalign.checkpoints import tensors as tensor_files
from jaxalign.checkpoints.tensors import TensorInfo
from jaxalign.errors import UserError


__all__ = [
    "INDEX",
    "PACKED_SHARD",
    "WriteTensor",
    "parse_size",
    "split_headers",
    "write",
    "write_file",
]

WriteTensor = Callable[[str, BinaryIO], None]
"""Writes the bytes of a tensor, given its name."""

INDEX = "model.safetensors.index.json"

PACKED_SHARD = 5 * 10**9
"""Bytes of a file where the source's files hold codes and are no model."""

_CODES = {name: code for code, name in tensor_files.DTYPES.items()}
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


def parse_size(text: str) -> int:
    """Read a size such as 5GB (powers of ten, as transformers reads it).

    >>> parse_size("200MB")
    200000000
    """
    for unit, factor in _UNITS.items():
        if text.upper().endswith(unit) and text[: -len(unit)].strip().isdigit():
            return max(1, int(text[: -len(unit)])) * factor
    raise UserError(
        f"the size {text!r} is not understood: expected such as 200MB or 5GB"
    )


def split_headers(
    info: dict[str, TensorInfo], limit: int
) -> tuple[dict[str, bytes], str | None]:
    """Return headers of files up to a size, by the files' names, and their index.

    Args:
      info: of every tensor, in the order in which files are filled.
      limit: bytes of a file; a larger tensor has one of its own.
    Returns:
      No index (None) where one file holds all.
    Example:
      >>> info = {name: TensorInfo((2, 3), "float32") for name in ("down", "up")}
      >>> headers, index = split_headers(info, limit=40)  # a tensor has 24 bytes
      >>> sorted(headers)
      ['model-00001-of-00002.safetensors', 'model-00002-of-00002.safetensors']
      >>> json.loads(index)["weight_map"]["up"]
      'model-00002-of-00002.safetensors'
    """
    shards = _split(info, limit)
    headers: dict[str, bytes] = {}
    index: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = "model.safetensors"
        if len(shards) > 1:
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        names = sorted(names, key=lambda name: (-_width(info[name]), name))
        headers[file] = _header({name: info[name] for name in names})
        index |= dict.fromkeys(names, file)
    if len(shards) == 1:
        return headers, None
    size = sum(i.nbytes for i in info.values())
    content = {"metadata": {"total_size": size}, "weight_map": index}
    return headers, json.dumps(content, indent=2, sort_keys=True) + "\n"


def _width(info: TensorInfo) -> int:
    return np.dtype(info.dtype).itemsize


def _header(info: dict[str, TensorInfo]) -> bytes:
    """Return the header of a safetensors file of these tensors, in this order."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (shape, dtype) in info.items():
        begin, end = end, end + info[name].nbytes
        entries[name] = {
            "dtype": _CODES[dtype],
            "shape": shape,
            "data_offsets": [begin, end],
        }
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return tensor_files.framed(text)


def write_file(
    path: Path, header: bytes, names: Iterable[str], write_tensor: WriteTensor
) -> None:
    """Write a safetensors file tensor by tensor, through to the disk.

    The library's own writer takes all tensors of a file at once.

    Args:
      path: new file.
      header: with its length in front.
      names: of its tensors, in the order of their data.
      write_tensor: writes the bytes of each.
    Example:
      >>> import tempfile
      >>> path = Path(tempfile.mkdtemp()) / "model.safetensors"
      >>> headers, _ = split_headers({"norm": TensorInfo((4,), "float32")}, 10**9)
      >>> def ones(name, file):
      ...     file.write(np.ones(4, np.float32).tobytes())
      >>> write_file(path, headers[path.name], ["norm"], ones)
      >>> tensor_files.read_tensor(path.parent, "norm").tolist()
      [1.0, 1.0, 1.0, 1.0]
    """
    with path.open("wb") as target:
        target.write(header)
        for name in names:
            write_tensor(name, target)
        target.flush()
        os.fsync(target.fileno())


def _split(info: dict[str, TensorInfo], limit: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name, entry in info.items():
        if shards[-1] and size + entry.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += entry.nbytes
    return shards


def write(values: dict[str, np.ndarray], path: Path) -> None:
    """Write a safetensors file through to the disk.

    Raises:
      OSError: it cannot be written; or a ``SafetensorError`` that says so.
    Example:
      >>> import tempfile
      >>> path = Path(tempfile.mkdtemp()) / "model.safetensors"
      >>> write({"norm": np.ones(4, np.float32)}, path)
      >>> tensor_files.read_tensor(path.parent, "norm").tolist()
      [1.0, 1.0, 1.0, 1.0]
    """
    save_file(values, path, metadata={"format": "pt"})
    with path.open("rb+") as file:
        os.fsync(file.fileno())
