"""What a checkpoint holds, whatever form it has, and whether it is still the same."""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from jaxalign.checkpoints import base as base_files
from jaxalign.checkpoints import hub, tensors, weights
from jaxalign.checkpoints.load import open_config
from jaxalign.checkpoints.places import Place, locate
from jaxalign.checkpoints.tensors import TensorInfo
from jaxalign.models.config import DecoderConfig
from jaxalign.models.families import Family


__all__ = ["fingerprint", "headers", "read_tensor", "reader", "tensor_infos"]


def tensor_infos(model: str | Path) -> dict[str, TensorInfo]:
    """Return name, shape and dtype of every tensor of a checkpoint."""
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
    """
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
    return reader(model)(name)


def reader(model: str | Path) -> Callable[[str], np.ndarray | None]:
    """Return what reads tensors of a checkpoint, whose headers are read once."""
    directory = hub.directory_of(model)
    config, family = open_config(directory)
    known = tensor_infos(directory)
    if not base_files.is_base(directory):
        files = {
            name: file
            for file in weights.list_weights(directory)
            for name in file.tensors
        }

        def stored(name: str) -> np.ndarray | None:
            name = _stored_name(name, known, config.text, family)
            if name not in files:
                return None
            with files[name].open() as handle:
                return handle.get_tensor(name)

        return stored
    base = base_files.read_base(directory)

    def converted(name: str) -> np.ndarray | None:
        name = _stored_name(name, known, config.text, family)
        if config.text.tie_embeddings and name == family.head:
            place = Place(family.rules[0], family.rules[0].path)
        else:
            place = locate(name, family.rules, ((0, config.text.num_layers),))
        if place is None or place.path not in base.params:
            return base.buffer(name)
        value = base.open(place.path)[place.at].read().result()
        value = value.astype(known[name].dtype)
        return value.T if place.rule.transpose else value

    return converted


def _stored_name(
    name: str, stored: Mapping[str, TensorInfo], config: DecoderConfig, family: Family
) -> str:
    """Return the name under which a tensor is there: tied weights have one of two."""
    names = (family.rules[0].hf, family.head)
    if config.tie_embeddings and name in names and name not in stored:
        return names[name == names[0]]
    return name
