"""Checkpoints out: Hugging Face directories, whole or not at all."""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from jaxalign import trees
from jaxalign.adapters import gates, lora
from jaxalign.checkpoints import load as load_lib
from jaxalign.checkpoints import tensors as tensor_files
from jaxalign.checkpoints.load import Checkpoint
from jaxalign.errors import UserError
from jaxalign.types import Variables


__all__ = ["check_mergeable", "parse_size", "save_hf", "whole_directory", "write"]

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
      UserError: ``out`` is not empty, the size is not understood, or the adapter cannot
        be merged.
    """
    limit = None if max_shard_size is None else parse_size(max_shard_size)
    check_mergeable(checkpoint, variables)
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


def check_mergeable(checkpoint: Checkpoint, variables: Variables) -> None:
    """Refuse adapters that no merged weights can stand for.

    Raises:
      UserError: a prefix, a gate that depends on the input, an update of embeddings
        that the head shares, or base weights that are codes.
    """
    if any(path.endswith("/codes") for path in trees.paths(variables["params"])):
        raise UserError(
            "the base weights are held as codes, which are less than the checkpoint "
            "has: load it with quantize none to write it"
        )
    if variables.get("prefix"):
        raise UserError(
            "the adapter has a prefix, which cannot be merged: its keys and values are "
            "no weights of the model. Use --format peft"
        )
    adapters = variables.get("lora") or {}
    for path in trees.paths(adapters):
        if path.split("/")[-1] in gates.FEATURE_GATES:
            raise UserError(
                f"the adapter has a {path.split('/')[-1]}, which depends on the input, "
                "so no merged weight can stand for it: use --format peft, or train "
                "with gate none or static"
            )
    if "embed_tokens" in adapters and checkpoint.config.tie_embeddings:
        raise UserError(
            "the adapter changes the embeddings, but not the head, which config.json "
            "ties to them: merged weights would change both. Use --format peft"
        )


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
        write({name: value(name) for name in names}, directory / file)
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


def write(values: dict[str, np.ndarray], path: Path) -> None:
    """Write a safetensors file through to the disk."""
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
        # The scale of an adapter is that of a layer, all experts share it.
        return np.asarray(leaf[place.at[: leaf.ndim]])

    value = fetch(_descend(variables["params"], place.path))
    module, _, leaf = place.path.rpartition("/")
    adapter = _descend(variables.get("lora"), module)
    if adapter is not None and leaf in ("kernel", "embedding"):
        value = lora.merge({leaf: value}, jax.tree.map(fetch, adapter))[leaf]
    return value.T if place.rule.transpose else value


def _descend(tree: Any, path: str) -> Any:
    """Return the subtree at a path, None where there is none."""
    for part in path.split("/"):
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree


def _from_source(directory: Path, name: str) -> np.ndarray:
    value = tensor_files.read_tensor(directory, name)
    if value is None:
        raise UserError(f"{directory} no longer holds the tensor {name!r}")
    return value
