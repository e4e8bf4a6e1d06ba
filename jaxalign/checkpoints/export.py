"""Checkpoints out: Hugging Face directories, whole or not at all."""

import shutil
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import jax
import numpy as np

from jaxalign import trees
from jaxalign.adapters import gates, low_rank, saved
from jaxalign.checkpoints import base as base_lib
from jaxalign.checkpoints import (
    contents,
    fitting,
    hub,
    outputs,
    places,
    quantisation,
    weights,
)
from jaxalign.checkpoints import load as load_lib
from jaxalign.checkpoints import tensors as tensor_files
from jaxalign.checkpoints.load import Checkpoint
from jaxalign.checkpoints.tensors import TensorInfo
from jaxalign.checkpoints.weight_files import (
    INDEX,
    PACKED_SHARD,
    WriteTensor,
    parse_size,
    split_headers,
    write,
    write_file,
)
from jaxalign.errors import UserError
from jaxalign.models.config import DecoderConfig, ModelConfig
from jaxalign.models.families import Family
from jaxalign.types import Variables
from jaxalign.variables import check_variables


__all__ = [
    "check_mergeable",
    "INDEX",
    "PACKED_SHARD",
    "copy_index",
    "copy_rest",
    "parse_size",
    "save_hf",
    "split_headers",
    "write",
]

_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json")
_BLOCK = 1 << 22


class _Base(NamedTuple):
    """The checkpoint that an export takes its form from."""

    path: Path
    config: ModelConfig
    family: Family
    cut: places.Stacks
    info: dict[str, TensorInfo]


def save_hf(
    variables: Variables,
    out: str | Path,
    *,
    like: Checkpoint | str | Path,
    max_shard_size: str | None = None,
    card: str | None = None,
    allow_nonfinite: bool = False,
) -> Path:
    """Write a Hugging Face checkpoint with the adapters merged in.

    Tensor names, dtypes and shapes are those of the checkpoint that was loaded, and so
    are config, tokenizer, chat template and generation files, byte for byte. Without
    another shard size the weight files are laid out as the source's: unchanged weights
    give the very same bytes. Tensors are gathered, merged and written one by one.
    Names, shapes and kinds are compared with the source's before a byte is written, the
    numbers as they pass: see :mod:`jaxalign.checkpoints.fitting`.

    Args:
      variables: ``params`` and, to be merged, ``lora``.
      out: new directory; appears only when complete.
      like: what ``params`` were loaded from, or its directory or id; it must still be
        there.
      max_shard_size: of a file, such as 5GB; default the files of the source.
      card: text of README.md; default the source's.
      allow_nonfinite: write NaN and infinities that the source does not have.
    Raises:
      UserError: ``out`` is not empty, the size is not understood, the adapter cannot
        be merged, parameters were given for variables, or a collection or leaf is
        unknown, missing, of another shape, transposed or not finite.
    Example::

      save_hf({"params": params, "lora": adapters}, "merged", like=base)
    """
    limit = None if max_shard_size is None else parse_size(max_shard_size)
    check_variables(variables, "save_hf")
    base = _base(variables, like)
    read = contents.reader(base.path)
    with outputs.whole_directory(Path(out)) as directory:
        copy_rest(base.path, directory)
        if card is not None:
            (directory / "README.md").write_text(card, encoding="utf-8")
        info = base.info

        def write_tensor(name: str, target: BinaryIO) -> None:
            tensor = _tensor(base, variables, name)
            dtype = np.dtype(info[name].dtype)
            if tensor.ndim == 2 and tensor.shape[0] == tensor.shape[1]:
                fitting.check_not_transposed(name, tensor, read(name))
            finite = True
            # In blocks: a transposed tensor would be copied whole.
            for part in np.array_split(tensor, 1 + tensor.nbytes // _BLOCK):
                with np.errstate(over="ignore"):
                    stored = part.astype(dtype, copy=False)
                finite = finite and bool(np.isfinite(stored).all())
                target.write(stored.tobytes())
            if not finite and not allow_nonfinite:
                fitting.check_finite(name, tensor, dtype, read(name))

        if limit is None and _is_packed(base.path):
            limit = PACKED_SHARD
        if limit is None:
            _write_as_source(base.path, directory, write_tensor)
        else:
            _write_split(info, limit, directory, write_tensor)
    return Path(out)


def _base(variables: Variables, like: Checkpoint | str | Path) -> _Base:
    path = like.path if isinstance(like, Checkpoint) else hub.directory_of(like)
    config, family = load_lib.open_config(path)
    check_mergeable(config.text, variables)
    cut = fitting.check(config, path, variables)
    return _Base(path, config, family, cut, contents.tensor_infos(path))


def _is_packed(path: Path) -> bool:
    return not base_lib.is_base(path) and weights.is_packed(path)


def copy_rest(source: Path, out: Path) -> None:
    """Copy config, tokenizer, chat template and all else that is no weight.

    Where the source's weights are codes, its config no longer says so.

    >>> import tempfile
    >>> source, out = (Path(tempfile.mkdtemp()) for _ in range(2))
    >>> write({"norm": np.ones(4, np.float32)}, source / "model.safetensors")
    >>> _ = (source / "config.json").write_text("{}")
    >>> copy_rest(source, out)
    >>> sorted(file.name for file in out.iterdir())
    ['config.json']
    """
    kinds = (*_WEIGHTS, base_lib.MANIFEST)
    for file in sorted(source.iterdir()):
        if file.is_file() and not any(file.match(pattern) for pattern in kinds):
            shutil.copyfile(file, out / file.name)
    if _is_packed(source):
        config = weights.plain_config(source)
        (out / "config.json").write_text(config, encoding="utf-8")
        for name in quantisation.FILES:
            (out / name).unlink(missing_ok=True)


def copy_index(source: Path, out: Path) -> None:
    """Copy the index of a checkpoint of several files.

    >>> import tempfile
    >>> source, out = (Path(tempfile.mkdtemp()) for _ in range(2))
    >>> _ = (source / INDEX).write_text('{"weight_map": {}}')
    >>> copy_index(source, out)
    >>> [file.name for file in out.iterdir()]
    ['model.safetensors.index.json']
    """
    index = source / INDEX
    if index.is_file() and not (source / "model.safetensors").is_file():
        shutil.copyfile(index, out / index.name)


def check_mergeable(config: DecoderConfig, variables: Variables) -> None:
    """Refuse adapters that no merged weights can stand for.

    Raises:
      UserError: a prefix, a gate that depends on the input, an update of embeddings
        that the head shares, biases that the base has no place for, or base weights
        that are codes.
    Example::

      check_mergeable(base.config.text, {**base.variables, "lora": adapters})
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
    if "embed_tokens" in adapters and config.tie_embeddings:
        raise UserError(
            "the adapter changes the embeddings, but not the head, which config.json "
            "ties to them: merged weights would change both. Use --format peft"
        )
    own = variables.get(saved.COLLECTION) or {}
    if config.tie_embeddings and (
        "lm_head" in own or "embedding" in own.get("embed_tokens", {})
    ):
        raise UserError(
            "the adapter has saved embeddings or a head of its own, and config.json "
            "ties the two: merged weights would change both. Use --format peft"
        )
    for path in trees.by_path(adapters):
        module, _, leaf = path.rpartition("/")
        if leaf == "bias" and _descend(variables["params"], f"{module}/bias") is None:
            raise UserError(
                "the adapter has biases (lora_bias) on layers that have none of their "
                "own, so no merged weight can stand for them: use --format peft"
            )


def _write_as_source(source: Path, directory: Path, write_tensor: WriteTensor) -> None:
    """Write the source's files with other values: the same headers and order."""
    for name, header in contents.headers(source).items():
        names = tensor_files.entries(header)
        write_file(directory / name, header, names, write_tensor)
    copy_index(source, directory)


def _write_split(
    info: dict[str, TensorInfo],
    limit: int,
    directory: Path,
    write_tensor: WriteTensor,
) -> None:
    headers, index = split_headers(info, limit)
    for file, header in headers.items():
        names = tensor_files.entries(header)
        write_file(directory / file, header, names, write_tensor)
    if index is not None:
        (directory / INDEX).write_text(index, encoding="utf-8")


def _tensor(base: _Base, variables: Variables, name: str) -> np.ndarray:
    family, own = base.family, base.family.canonical(name)
    if base.config.text.tie_embeddings and own == family.head:
        own = family.rules[0].hf
    place = places.locate(own, family.rules, base.cut)
    if place is None or place.is_idle:  # a buffer, or what is not run
        return _from_source(base.path, name)

    def fetch(leaf: Any) -> np.ndarray:
        # The scale of an adapter is that of a layer, all experts share it.
        return np.asarray(leaf[place.at[: leaf.ndim]])

    value = _descend(variables.get(saved.COLLECTION), place.path)
    if value is None:
        value = _descend(variables["params"], place.path)
    value = fetch(value)
    module, _, leaf = place.path.rpartition("/")
    value = _with_rows(value, _descend(variables.get(saved.COLLECTION), module), leaf)
    adapter = _descend(variables.get("lora"), module)
    if adapter is not None and leaf in ("kernel", "embedding", "bias"):
        own = jax.tree.map(fetch, adapter)
        if leaf != "bias":
            own.pop("bias", None)
        value = low_rank.merge({leaf: value}, own)[leaf]
    return place.to_file(value, base.info[name].shape)


def _with_rows(value: np.ndarray, leaves: Any, leaf: str) -> np.ndarray:
    """Put the saved rows of a few tokens into embeddings or a head."""
    if leaves is None or "rows" not in leaves or leaf not in ("embedding", "kernel"):
        return value
    rows, indices = (np.asarray(leaves[name]) for name in saved.ROWS)
    whole = np.array(value)
    if leaf == "embedding":
        whole[indices] = rows
    else:
        whole[:, indices] = rows.T
    return whole


def _descend(tree: Any, path: str) -> Any:
    """Return the subtree at a path, None where there is none."""
    for part in path.split("/"):
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree


def _from_source(directory: Path, name: str) -> np.ndarray:
    value = contents.read_tensor(directory, name)
    if value is None:
        raise UserError(f"{directory} no longer holds the tensor {name!r}")
    return value
