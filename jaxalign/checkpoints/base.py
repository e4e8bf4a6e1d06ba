"""A converted base model: its parameters as Orbax keeps them, all else as it came.

``jaxalign convert`` makes one of a Hugging Face checkpoint. Every process of a run then
reads no more than the chunks that its devices hold, already in the run's dtype and
orientation, with many reads at once: what a restart on many hosts waits for. The
directory stands for the checkpoint that it was made from, for any mesh and any layer
groups, in training, scoring and export.

``params/`` is an ordinary Orbax checkpoint of the parameters with all layers in one
stack, in chunks of one layer or less. ``jaxalign_base.json`` says what they were made
from and how they were written.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorstore

from jaxalign import stacks, trees
from jaxalign.checkpoints import tensors
from jaxalign.checkpoints.tensors import TensorInfo
from jaxalign.errors import UserError
from jaxalign.stacks import Group


__all__ = [
    "BUFFERS",
    "MANIFEST",
    "PARAMS",
    "Base",
    "View",
    "dump",
    "is_base",
    "read_base",
]

MANIFEST = "jaxalign_base.json"
PARAMS = "params"
BUFFERS = "buffers.safetensors"
VERSION = 1
_AT_ONCE = 1 << 26


class Base(NamedTuple):
    """What a converted base says of itself."""

    path: Path
    fingerprint: str
    """The source's, or where numbers were rounded one of its own."""
    name: str
    headers: dict[str, bytes]
    """Of the source's weight files, by name: from them come the same files again."""
    params: dict[str, TensorInfo]
    """By path, with all layers in one stack."""

    def tensors(self) -> dict[str, TensorInfo]:
        """Return name, shape and dtype of the source's tensors."""
        found = {}
        for header in self.headers.values():
            for name, entry in sorted(tensors.entries(header).items()):
                dtype = tensors.DTYPES[entry["dtype"]]
                found[name] = TensorInfo(tuple(entry["shape"]), dtype)
        return found

    def open(self, path: str) -> Any:
        """Open a parameter; nothing of it is read before it is sliced."""
        spec = {
            "driver": "zarr",
            "kvstore": {
                "driver": "ocdbt",
                "base": f"file://{self.path.absolute() / PARAMS}/",
                "path": f"{path.replace('/', '.')}/",
            },
        }
        try:
            return tensorstore.open(spec, open=True, read=True).result()
        except ValueError as error:
            raise _broken(self.path, str(error).splitlines()[0]) from None

    def stored(
        self, shapes: Any, cut: Mapping[str, Sequence[Group]]
    ) -> list[tuple[str, TensorInfo]]:
        """Return what is there of each parameter.

        Args:
          shapes: of the parameters, by what they are cut into.
          cut: how the layers of each scope are cut, see ``places.Stacks``.

        Raises:
          UserError: it is not what the model of these shapes needs.
        """
        leaves = trees.by_path(shapes).items()
        found, used = [], set()
        for path, leaf in leaves:
            scope = stacks.split(path).scope
            num_layers = cut[scope][-1][1] if scope in cut else 0
            single = _single_stack(path, num_layers)
            info = self.params.get(single)
            shape = leaf.shape
            if stacks.split(path).group is not None:
                shape = (num_layers, *shape[1:])
            if info is None or info.shape != shape:
                raise _broken(self.path, f"{single} is not of shape {list(shape)}")
            used.add(single)
            found.append((path, TensorInfo(leaf.shape, info.dtype)))
        if unknown := sorted(self.params.keys() - used):
            raise _broken(self.path, f"nothing has a place for {unknown[0]}")
        return found

    def pieces(
        self, cut: Mapping[str, Sequence[Group]], by_layer: Callable[[str], bool]
    ) -> Iterator[tuple[str, tuple[int, ...], "View"]]:
        """Yield path, place in the stack and numbers of every parameter.

        Args:
          cut: how the layers of each scope are cut.
          by_layer: tells by path which stacks come as a piece for each layer; the
            others are one.
        """
        for path in self.params:
            stored = self.open(path)
            place = stacks.split(path)
            if place.group is None:
                yield path, (), View(stored, self.path)
                continue
            for low, high in cut[place.scope]:
                name = stacks.join(place._replace(group=(low, high)))
                if not by_layer(name):
                    yield name, (), View(stored[low:high].translate_to[0], self.path)
                    continue
                for layer in range(low, high):
                    # The layer's axis is gone: what is left begins at 0.
                    yield name, (layer - low,), View(stored[layer], self.path)

    def buffer(self, name: str) -> np.ndarray | None:
        """Read a tensor of the source that is computed, not learned."""
        file = self.path / BUFFERS
        if not file.is_file():
            return None
        with tensors.open_file(file) as reader:
            return reader.get_tensor(name) if name in reader.keys() else None


@dataclasses.dataclass(frozen=True)
class View:
    """A parameter that is on disk; a slice of it is read when it is taken."""

    stored: Any
    directory: Path

    @property
    def nbytes(self) -> int:
        """Return the size of all of it."""
        return self.stored.size * self.stored.dtype.numpy_dtype.itemsize

    def __getitem__(self, index: Any) -> np.ndarray:
        chosen = self.stored[index].translate_to[0]
        made = np.empty(chosen.shape, chosen.dtype.numpy_dtype)
        rows = max(1, _AT_ONCE * chosen.shape[0] // max(1, made.nbytes))
        try:
            # In parts: chunks that have come wait for their turn to be unpacked.
            for row in range(0, chosen.shape[0], rows):
                part = slice(row, min(row + rows, chosen.shape[0]))
                made[part] = chosen[part].read().result()
            return made
        except ValueError as error:
            raise _broken(self.directory, str(error).splitlines()[0]) from None


def is_base(directory: Path) -> bool:
    """Tell whether a directory is a converted base."""
    return (directory / MANIFEST).is_file()


def _single_stack(path: str, num_layers: int) -> str:
    """Return the path of a parameter as it is where all layers are in one stack."""
    place = stacks.split(path)
    if place.group is None:
        return path
    return stacks.join(place._replace(group=(0, num_layers)))


def read_base(directory: Path) -> Base:
    """Read a converted base and check that it is whole and as it was written.

    Raises:
      UserError: it is of another version, or a file is missing, has another size or
        other content (looked at in samples).
    """
    manifest = tensors.read_json(directory / MANIFEST)
    if manifest.get("version") != VERSION:
        raise UserError(
            f"{directory} was converted by another version: got "
            f"{manifest.get('version')!r}, expected {VERSION}. Convert the model again"
        )
    try:
        written: Mapping[str, Any] = manifest["stored"]
        base = Base(
            directory,
            str(manifest["fingerprint"]),
            str(manifest["name"]),
            {
                name: tensors.framed(text.encode())
                for name, text in manifest["headers"].items()
            },
            {
                path: TensorInfo(tuple(shape), dtype)
                for path, (shape, dtype) in manifest["params"].items()
            },
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise _broken(directory, f"{MANIFEST} lacks {error}") from None
    for name, facts in written.items():
        if not (directory / name).is_file():
            raise _broken(directory, f"{name} is missing")
        if _describe_file(directory / name) != facts:
            raise _broken(directory, f"{name} has changed")
    return base


def _broken(directory: Path, what: str) -> UserError:
    return UserError(
        f"{directory} is no whole converted model: {what}. Convert the model again, "
        "with `jaxalign convert --model MODEL --out DIR`"
    )


def _describe_files(directory: Path) -> dict[str, str]:
    """Return size and a hash of config.json and of the files of the parameters."""
    found = [directory / "config.json", *sorted((directory / PARAMS).rglob("*"))]
    return {
        path.relative_to(directory).as_posix(): _describe_file(path)
        for path in found
        if path.is_file()
    }


def _describe_file(path: Path) -> str:
    """Return size and a hash of samples of a file."""
    stat = path.stat()
    return _sampled(path, stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=4096)  # a run asks more than once
def _sampled(path: Path, size: int, _: int) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        tensors.sample(file, 0, size, digest)
    return f"{size}:{digest.hexdigest()}"


def dump(base: Base) -> str:
    """Return the manifest of a base whose files are all written."""
    content = {
        "version": VERSION,
        "fingerprint": base.fingerprint,
        "name": base.name,
        "headers": {name: text[8:].decode() for name, text in base.headers.items()},
        "params": {p: [list(i.shape), i.dtype] for p, i in base.params.items()},
        "stored": _describe_files(base.path),
    }
    return json.dumps(content, indent=1) + "\n"
