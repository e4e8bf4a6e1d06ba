"""Checkpoints out: Hugging Face directories and PEFT adapters, whole or not at all."""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from jaxalign.adapters import lora, peft_format
from jaxalign.adapters.selection import Group
from jaxalign.checkpoints import load as load_lib
from jaxalign.checkpoints import tensors as tensor_files
from jaxalign.checkpoints.load import Checkpoint
from jaxalign.errors import UserError
from jaxalign.types import Variables


__all__ = ["parse_size", "save_hf", "save_peft"]

_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json")
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


@contextlib.contextmanager
def whole_directory(out: Path) -> Iterator[Path]:
    """Give a temporary directory that becomes ``out`` when all went well.

    Raises:
      UserError: ``out`` exists and is not empty.
    """
    out = Path(os.path.abspath(out))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(
            f"--out {out} is there already and not empty: nothing is overwritten. Give "
            "another directory, or delete it"
        )
    temporary = out.with_name(f".{out.name}.tmp-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error}") from None
    try:
        yield temporary
        if out.exists():
            out.rmdir()
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def save_hf(
    checkpoint: Checkpoint,
    variables: Variables,
    out: str | Path,
    *,
    max_shard_size: str | None = None,
    card: str | None = None,
) -> Path:
    """Write a Hugging Face checkpoint with the adapters merged in.

    Tensor names, dtypes and shapes are those of the checkpoint that was loaded, and so
    are config, tokenizer, chat template and generation files, byte for byte. Without
    another shard size the weight files are laid out as the source's: unchanged weights
    give the very same bytes. Tensors are gathered, merged and written one by one.

    Args:
      checkpoint: as loaded; its directory must still be there.
      variables: ``params`` and, to be merged, ``lora``.
      out: new directory; appears only when complete.
      max_shard_size: of a file, such as 5GB; default the files of the source.
      card: text of README.md; default the source's.
    Raises:
      UserError: ``out`` is not empty, or the size is not understood.
    """
    limit = None if max_shard_size is None else parse_size(max_shard_size)
    with whole_directory(Path(out)) as directory:
        for source in sorted(checkpoint.path.iterdir()):
            if source.is_file() and not any(source.match(p) for p in _WEIGHTS):
                shutil.copyfile(source, directory / source.name)
        if card is not None:
            (directory / "README.md").write_text(card, encoding="utf-8")
        info = load_lib.source_info(checkpoint.path)

        def value(name: str) -> np.ndarray:
            tensor = _tensor(checkpoint, variables, name)
            dtype = np.dtype(info[name].dtype)
            return np.ascontiguousarray(tensor.astype(dtype, copy=False))

        if limit is None:
            _write_as_source(checkpoint.path, directory, value)
        else:
            _write_split(info, limit, directory, value)
    return Path(out)


def _write_as_source(
    source: Path, directory: Path, value: Callable[[str], np.ndarray]
) -> None:
    """Write the source's files with other values: the same headers and order."""
    for file in tensor_files.list_files(source):
        header, names = tensor_files.raw_header(file.path)
        with (directory / file.path.name).open("wb") as target:
            target.write(header)
            for name in names:
                target.write(value(name).tobytes())
            target.flush()
            os.fsync(target.fileno())
    index = source / "model.safetensors.index.json"
    if index.is_file() and not (source / "model.safetensors").is_file():
        shutil.copyfile(index, directory / index.name)


def _write_split(
    info: dict[str, tensor_files.TensorInfo],
    limit: int,
    directory: Path,
    value: Callable[[str], np.ndarray],
) -> None:
    shards = _split(info, limit)
    index: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = "model.safetensors"
        if len(shards) > 1:
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write({name: value(name) for name in names}, directory / file)
        index |= dict.fromkeys(names, file)
    if len(shards) > 1:
        size = sum(_bytes(i) for i in info.values())
        content = {"metadata": {"total_size": size}, "weight_map": index}
        (directory / "model.safetensors.index.json").write_text(
            json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8"
        )


def _bytes(info: tensor_files.TensorInfo) -> int:
    return int(np.prod(info.shape, dtype=np.int64)) * np.dtype(info.dtype).itemsize


def _split(info: dict[str, tensor_files.TensorInfo], limit: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name, entry in info.items():
        if shards[-1] and size + _bytes(entry) > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += _bytes(entry)
    return shards


def _write(values: dict[str, np.ndarray], path: Path) -> None:
    save_file(values, path, metadata={"format": "pt"})
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _tensor(checkpoint: Checkpoint, variables: Variables, name: str) -> np.ndarray:
    family = checkpoint.family
    if checkpoint.config.tie_embeddings and name == family.HEAD:
        name = family.RULES[0].hf
    place = load_lib.locate(name, family.RULES, checkpoint.groups)
    if place is None:  # a buffer that is computed, not learned
        return _from_source(checkpoint.path, name)

    def fetch(leaf: Any) -> np.ndarray:
        return np.asarray(leaf if place.layer is None else leaf[place.layer])

    value = fetch(_descend(variables["params"], place.path))
    if place.path.endswith("/kernel"):
        adapter = _descend(variables.get("lora"), place.path.removesuffix("/kernel"))
        if adapter is not None:
            value = lora.merge({"kernel": value}, jax.tree.map(fetch, adapter))[
                "kernel"
            ]
    return value.T if place.rule.transpose else value


def _descend(tree: Any, path: str) -> Any:
    """Return the subtree at a path, None where there is none."""
    for part in path.split("/"):
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree


def _from_source(directory: Path, name: str) -> np.ndarray:
    for file in tensor_files.list_files(directory):
        if name in file.tensors:
            with file.open() as handle:
                return handle.get_tensor(name)
    raise UserError(f"{directory} no longer holds the tensor {name!r}")


def save_peft(
    checkpoint: Checkpoint,
    adapters: Any,
    out: str | Path,
    *,
    dropout: float = 0.0,
    card: str | None = None,
) -> Path:
    """Write a LoRA adapter as a PEFT directory, which ``peft`` loads unchanged.

    Raises:
      UserError: ``out`` is not empty.
    """
    rules = checkpoint.family.RULES

    def module_name(path: str, layer: int | None) -> str:
        where = path if layer is None else f"layers/{path}"
        for rule in rules:
            if rule.path == f"{where}/kernel":
                return rule.name(layer).removesuffix(".weight")
        raise ValueError(f"no rule gives {where}")

    config, tensors = peft_format.to_peft(
        adapters,
        module_name=module_name,
        num_layers=checkpoint.config.num_layers,
        dropout=dropout,
        base_model=checkpoint.path.name,
    )
    with whole_directory(Path(out)) as directory:
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        (directory / "adapter_config.json").write_text(text, encoding="utf-8")
        _write(tensors, directory / "adapter_model.safetensors")
        if card is not None:
            (directory / "README.md").write_text(card, encoding="utf-8")
    return Path(out)


class PeftAdapter:
    """A PEFT directory, read in two steps: what it adapts, then the weights.

    The layers have to be cut into groups, which the model is loaded with, before the
    adapter's weights can be stacked to fit.
    """

    def __init__(self, directory: Path, family: ModuleType, num_layers: int):
        self.config = tensor_files.read_json(directory / "adapter_config.json")
        peft_format.check_config(self.config)
        self.tensors: dict[str, np.ndarray] = {}
        for file in tensor_files.list_files(directory, "adapter_model"):
            with file.open() as handle:
                for name in file.tensors:
                    self.tensors[name] = handle.get_tensor(name)
        self._rules = family.RULES
        self._num_layers = num_layers

    def _locate(self, module: str) -> peft_format.Module | None:
        everything: Sequence[Group] = ((0, self._num_layers),)
        place = load_lib.locate(f"{module}.weight", self._rules, everything)
        if place is None or not place.path.endswith("/kernel"):
            return None
        path = place.path.removesuffix("/kernel")
        if place.layer is None:
            return path, None
        return path.partition("/")[2], place.layer

    def choices(self) -> list[tuple[int, ...]]:
        """Return the layers by which to cut the groups."""
        return peft_format.adapted_layers(list(self.tensors), self._locate)

    def adapters(self, params: Any) -> dict[str, Any]:
        """Return the ``lora`` collection for these base weights."""
        return peft_format.from_peft(
            self.config, self.tensors, params=params, locate=self._locate
        )
