"""What a checkpoint holds, whatever form it has, and whether it is still the same."""

from pathlib import Path

import numpy as np

from jaxalign.checkpoints import base as base_files
from jaxalign.checkpoints import hub, tensors
from jaxalign.checkpoints.load import open_config
from jaxalign.checkpoints.places import locate
from jaxalign.checkpoints.tensors import TensorInfo


__all__ = ["fingerprint", "headers", "read_tensor", "tensor_infos"]


def tensor_infos(model: str | Path) -> dict[str, TensorInfo]:
    """Return name, shape and dtype of every tensor of a checkpoint."""
    directory = hub.directory_of(model)
    if base_files.is_base(directory):
        return base_files.read_base(directory).tensors()
    return {
        name: info
        for file in tensors.list_files(directory)
        for name, info in file.tensors.items()
    }


def headers(model: str | Path) -> dict[str, bytes]:
    """Return the headers of a checkpoint's weight files, by the files' names."""
    directory = hub.directory_of(model)
    if base_files.is_base(directory):
        return base_files.read_base(directory).headers
    files = tensors.list_files(directory)
    return {file.path.name: tensors.raw_header(file.path) for file in files}


def fingerprint(model: str | Path) -> str:
    """Return a hash that changes with the weights, the same once they are converted."""
    directory = hub.directory_of(model)
    if base_files.is_base(directory):
        return base_files.read_base(directory).fingerprint
    return tensors.fingerprint(directory)


def read_tensor(model: str | Path, name: str) -> np.ndarray | None:
    """Read one tensor of a checkpoint; None if it has none of that name."""
    directory = hub.directory_of(model)
    if not base_files.is_base(directory):
        return tensors.read_tensor(directory, name)
    config, family = open_config(directory)
    base = base_files.read_base(directory)
    place = locate(name, family.rules, ((0, config.text.num_layers),))
    if place is None or place.path not in base.params:
        return base.buffer(name)
    value = base.open(place.path)[place.at].read().result()
    value = value.astype(base.tensors()[name].dtype)
    return value.T if place.rule.transpose else value
