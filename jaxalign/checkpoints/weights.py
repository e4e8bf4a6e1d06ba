"""The weights of a checkpoint as plain numbers, whatever they are stored as.

For a checkpoint of plain numbers these are its files as they are. For one of codes (see
``checkpoints.packed``) every linear layer has one tensor, ``<module>.weight``, which is
made from its parts when it is read; it counts as bfloat16, and is float32 until then.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxalign import progress
from jaxalign.checkpoints import packed, quantisation, tensors
from jaxalign.checkpoints.packed import Layout
from jaxalign.checkpoints.tensors import TensorFile, TensorInfo, TensorReader
from jaxalign.errors import UserError


__all__ = ["PackedFile", "is_packed", "list_weights", "plain_config", "read_weight"]

_MAIN = {"awq": "qweight", "gptq": "qweight", "packed": "weight_packed"}
_NEEDED = {
    "awq": ("qweight", "qzeros", "scales"),
    "gptq": ("qweight", "qzeros", "scales"),
    "packed": ("weight_packed", "weight_scale"),
}
_OPTIONAL = {
    "awq": (),
    "gptq": ("g_idx",),
    "packed": ("weight_zero_point", "weight_g_idx"),
}
_SCALES = ("weight_scale_inv", "weight_scale")
_DROPPED = (
    *("input_scale", "output_scale", "activation_scale", "input_zero_point"),
    *("q_scale", "k_scale", "v_scale", "weight_shape", "input_global_scale"),
)
"""Of activations and caches, which are not quantised here, and what shapes tell."""


class PackedFile(NamedTuple):
    """A file of codes as what they stand for; like ``tensors.TensorFile``."""

    path: Path
    tensors: dict[str, TensorInfo]
    parts: dict[str, dict[str, str]]
    """Of each weight that is made: its tensors' whole names by their last part."""
    layout: Layout
    homes: Mapping[str, TensorFile]
    """Which file each stored tensor is in."""

    @contextlib.contextmanager
    def open(self) -> Iterator["_PackedReader"]:
        """Open the file, and others as parts of a weight are found there."""
        with contextlib.ExitStack() as stack:
            yield _PackedReader(self, stack)


class _PackedReader:
    def __init__(self, file: PackedFile, stack: contextlib.ExitStack):
        self._file = file
        self._stack = stack
        self._open: dict[Path, TensorReader] = {}

    def _stored(self, name: str) -> np.ndarray:
        home = self._file.homes[name]
        if home.path not in self._open:
            self._open[home.path] = self._stack.enter_context(home.open())
        return self._open[home.path].get_slice(name)

    def get_slice(self, name: str) -> np.ndarray:
        """Return a tensor, made now if it is stored as codes."""
        if name not in self._file.parts:
            return self._stored(name)
        parts = self._file.parts[name]
        read = {last: self._stored(whole) for last, whole in parts.items()}
        return packed.decode(self._file.layout, f"{self._file.path}: {name}", read)

    def get_tensor(self, name: str) -> np.ndarray:
        """Return a copy of a tensor."""
        return np.array(self.get_slice(name), order="C")


def list_weights(directory: Path) -> list[TensorFile] | list[PackedFile]:
    """List the weights of a checkpoint by the headers of its files.

    Raises:
      UserError: as ``tensors.list_files``; codes that are not supported, or of which a
        part is missing.
    """
    files = tensors.list_files(directory, kinds=tensors.KINDS)
    config = quantisation.read_config(directory)
    if not _has_codes(files):
        if config is not None:
            progress.say_once(
                f"{directory}: config.json has a quantization_config, but the weights "
                "are plain numbers and are read as they are"
            )
        return files
    if config is None:
        return tensors.list_files(directory)  # which says what is wrong
    layout = quantisation.read_layout(config, f"{directory}/config.json")
    progress.say_once(
        f"{directory}: weights stored as {config['quant_method']} codes are read as "
        "plain numbers"
    )
    homes = {name: file for file in files for name in file.tensors}
    return [_packed_file(file, layout, homes) for file in files]


def _has_codes(files: list[TensorFile]) -> bool:
    plain = set(tensors.DTYPES.values())
    return any(
        info.dtype not in plain or name.endswith(_SCALES)
        for file in files
        for name, info in file.tensors.items()
    )


def is_packed(directory: Path) -> bool:
    """Tell whether a checkpoint's weights are stored as codes."""
    return _has_codes(tensors.list_files(directory, kinds=tensors.KINDS))


def _packed_file(
    file: TensorFile, layout: Layout, homes: Mapping[str, TensorFile]
) -> PackedFile:
    found: dict[str, TensorInfo] = {}
    made: dict[str, dict[str, str]] = {}
    for name, info in file.tensors.items():
        module, _, last = name.rpartition(".")
        if layout.kind == "scaled":
            scale = [s for s in _SCALES if f"{module}.{s}" in homes]
            if last == "weight" and scale:
                found[name] = TensorInfo(info.shape, "bfloat16")
                made[name] = {part: f"{module}.{part}" for part in ("weight", *scale)}
                continue
            if last in (*_SCALES, *_DROPPED):
                continue
        elif last == _MAIN[layout.kind]:
            weight = f"{module}.weight"
            shape = packed.shape_of(layout, info.shape)
            found[weight] = TensorInfo(shape, "bfloat16")
            made[weight] = _parts(layout, module, homes, file.path)
            continue
        elif last in (
            *_NEEDED[layout.kind],
            *_OPTIONAL[layout.kind],
            *_DROPPED,
        ):
            continue
        if info.dtype not in tensors.DTYPES.values():
            raise UserError(
                f"{file.path}: tensor {name!r} has the type {info.dtype}, which is no "
                f"part of {layout.kind} weights. Copy or download the checkpoint again"
            )
        found[name] = info
    return PackedFile(file.path, found, made, layout, homes)


def _parts(
    layout: Layout, module: str, homes: Mapping[str, TensorFile], path: Path
) -> dict[str, str]:
    for part in _NEEDED[layout.kind]:
        if f"{module}.{part}" not in homes:
            raise UserError(
                f"{path}: {module} has codes but no {part}. Copy or download the "
                "checkpoint again"
            )
    wanted = (*_NEEDED[layout.kind], *_OPTIONAL[layout.kind])
    names = {part: f"{module}.{part}" for part in wanted}
    return {part: name for part, name in names.items() if name in homes}


def read_weight(directory: Path, name: str) -> np.ndarray | None:
    """Read one weight of a checkpoint; None if no file holds it."""
    for file in list_weights(directory):
        if name in file.tensors:
            with file.open() as handle:
                return handle.get_tensor(name)
    return None


def plain_config(directory: Path) -> str:
    """Return config.json as it is once the codes are plain numbers in bfloat16."""
    config: dict[str, Any] = tensors.read_json(directory / "config.json")
    for field in quantisation.FIELDS:
        config.pop(field, None)
    name = "dtype" if "dtype" in config else "torch_dtype"
    return json.dumps({**config, name: "bfloat16"}, indent=2) + "\n"
