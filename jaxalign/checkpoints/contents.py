"""What a checkpoint holds, whatever form it has, and whether it is still the same."""

import hashlib
from collections.abc import Callable, Collection
from pathlib import Path

import numpy as np

from jaxalign.checkpoints import base as base_files
from jaxalign.checkpoints import hub, tensors, weights
from jaxalign.checkpoints.load import open_config
from jaxalign.checkpoints.places import Place, locate, stacks_of
from jaxalign.checkpoints.tensors import TensorInfo
from jaxalign.stacks import scope_of


__all__ = [
    "fingerprint",
    "fingerprint_of",
    "headers",
    "read_tensor",
    "reader",
    "tensor_infos",
]


def tensor_infos(model: str | Path) -> dict[str, TensorInfo]:
    """Return name, shape and dtype of every tensor of a checkpoint.

    Raises:
      UserError: the directory has no weights, or a broken header.
    Example:
      >>> import tempfile
      >>> from safetensors.numpy import save_file
      >>> folder = Path(tempfile.mkdtemp())
      >>> save_file({"norm": np.ones(4, np.float32)}, folder / "model.safetensors")
      >>> _ = (folder / "config.json").write_text("{}")
      >>> tensor_infos(folder)
      {'norm': TensorInfo(shape=(4,), dtype='float32')}
    """
    directory = hub.directory_of(model)
    if base_files.is_base(directory):
        return base_files.read_base(directory).tensors()
    return {
        name: info
        for file in weights.list_weights(directory)
        for name, info in file.tensors.items()
    }


def headers(model: str | Path) -> dict[str, bytes]:
    """Return the headers of a checkpoint's weight files, by the files' names.

    Files of codes have none that could be written again: see ``export.split_headers``.

    Returns:
      Each with its length in front, see ``tensors.raw_header``.
    Example:
      >>> import tempfile
      >>> from safetensors.numpy import save_file
      >>> folder = Path(tempfile.mkdtemp())
      >>> save_file({"norm": np.ones(4, np.float32)}, folder / "model.safetensors")
      >>> list(tensors.entries(headers(folder)["model.safetensors"]))
      ['norm']
    """
    directory = hub.directory_of(model)
    if base_files.is_base(directory):
        return base_files.read_base(directory).headers
    files = tensors.list_files(directory)
    return {file.path.name: tensors.raw_header(file.path) for file in files}


def fingerprint(model: str | Path) -> str:
    """Return a hash that changes with the weights, the same once they are converted.

    >>> import tempfile
    >>> from safetensors.numpy import save_file
    >>> folder = Path(tempfile.mkdtemp())
    >>> save_file({"norm": np.ones(4, np.float32)}, folder / "model.safetensors")
    >>> before = fingerprint(folder)
    >>> save_file({"norm": np.zeros(4, np.float32)}, folder / "model.safetensors")
    >>> fingerprint(folder) == before
    False
    """
    directory = hub.directory_of(model)
    if base_files.is_base(directory):
        return base_files.read_base(directory).fingerprint
    return tensors.fingerprint(directory)


def fingerprint_of(model: str | Path, scopes: Collection[str]) -> str:
    """Return a hash of the weights of some parts, and of how those are computed.

    Other than :func:`fingerprint` it reads all of them: two checkpoints with the same
    tower have the same features of pictures, whatever their decoders are.

    Args:
      model: checkpoint.
      scopes: see ``stacks.scope_of``; of ``vision`` and ``connector``.
    Example::

      tower = fingerprint_of("smolvlm", ("vision", "connector"))
    """
    directory = hub.directory_of(model)
    config, family = open_config(directory)
    read, cut = reader(directory), stacks_of(config)
    digest = hashlib.sha256(repr([getattr(config, s) for s in scopes]).encode())
    for name, info in sorted(tensor_infos(directory).items()):
        place = locate(family.canonical(name), family.rules, cut)
        if place is None or place.is_idle or scope_of(place.path) not in scopes:
            continue
        values = read(name)
        assert values is not None
        digest.update(f"{place.path} {place.at} {info.dtype} {info.shape}".encode())
        digest.update(np.ascontiguousarray(values).view(np.uint8).data)
    return digest.hexdigest()


def read_tensor(model: str | Path, name: str) -> np.ndarray | None:
    """Read one tensor of a checkpoint; None if it has none of that name.

    Example::

      read_tensor("smollm2", "model.norm.weight").shape  # [d]
    """
    return reader(model)(name)


def reader(model: str | Path) -> Callable[[str], np.ndarray | None]:
    """Return what reads tensors of a checkpoint, whose headers are read once.

    A tensor may be asked for by its name in the files or by the family's.

    Raises:
      UserError: the checkpoint, or its config.json, cannot be read.
    Example::

      read = reader("smollm2")
      norms = [read(f"model.layers.{i}.input_layernorm.weight") for i in range(30)]
    """
    directory = hub.directory_of(model)
    config, family = open_config(directory)
    known = tensor_infos(directory)
    spelled = {family.canonical(name): name for name in known}
    tied = (family.rules[0].hf, family.head)
    is_tied = config.text.tie_embeddings

    def own_name(name: str) -> str:
        """Return the family's name of a tensor, of two the one that is there."""
        name = family.canonical(name)
        if is_tied and name in tied and name not in spelled:
            return tied[name == tied[0]]
        return name

    if not base_files.is_base(directory):
        files = {
            name: file
            for file in weights.list_weights(directory)
            for name in file.tensors
        }

        def stored(name: str) -> np.ndarray | None:
            stored_name = spelled.get(own_name(name))
            if stored_name is None:
                return None
            with files[stored_name].open() as handle:
                return handle.get_tensor(stored_name)

        return stored
    base, cut = base_files.read_base(directory), stacks_of(config)

    def converted(name: str) -> np.ndarray | None:
        own = own_name(name)
        place = locate(own, family.rules, cut)
        if is_tied and own == family.head:
            place = Place(family.rules[0], family.rules[0].path)
        if place is None or place.path not in base.params:
            return base.buffer(spelled.get(own, name))
        info = known[spelled[own]]
        value = base.open(place.path)[place.at].read().result()
        return place.to_file(value.astype(info.dtype), info.shape)

    return converted
