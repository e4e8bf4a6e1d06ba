"""From a Hugging Face checkpoint to a converted base, see ``checkpoints.base``."""

import errno
import hashlib
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from jaxalign import stacks, trees
from jaxalign.checkpoints import base as base_lib
from jaxalign.checkpoints import contents, export, hub, outputs, places, weights
from jaxalign.checkpoints import load as load_lib
from jaxalign.checkpoints import tensors as tensor_files
from jaxalign.checkpoints.base import Base
from jaxalign.checkpoints.load import Checkpoint, DType
from jaxalign.checkpoints.tensors import TensorInfo
from jaxalign.errors import UserError
from jaxalign.parallel.mesh import MeshConfig, make_mesh


__all__ = ["convert"]

_CHUNK = 1 << 22


def convert(
    model: str | Path,
    out: str | Path,
    *,
    dtype: DType = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Convert a checkpoint once, for runs that start from it again and again.

    It is read into the host's memory, whatever devices there are.

    Args:
      model: directory of a Hugging Face checkpoint, or an id on the hub.
      out: new directory; appears only when complete.
      dtype: of the weights; ``auto`` keeps them as they are, to the last bit.
      progress: called with (bytes read, bytes in all).
    Returns:
      ``out``, which stands for ``model`` from then on.
    Raises:
      UserError: the checkpoint cannot be loaded or is converted already, or ``out`` is
        not empty.
    Example::

      convert("smollm2", "smollm2-bf16", dtype="bfloat16")
    """
    if dtype == "fastest":
        raise UserError(
            "dtype fastest depends on the machine that a run is on, and a converted "
            "checkpoint is for all: give auto, float32, bfloat16 or float16"
        )
    directory = hub.directory_of(model)
    if base_lib.is_base(directory):
        raise UserError(f"{model} is converted already: give the checkpoint it is of")
    load_lib.check(model)
    with outputs.whole_directory(Path(out)) as temporary:
        mesh = make_mesh(MeshConfig(), jax.devices("cpu"))
        checkpoint = load_lib.load(model, dtype=dtype, mesh=mesh, progress=progress)
        export.copy_rest(directory, temporary)
        _write_buffers(checkpoint, temporary)
        params = checkpoint.variables["params"]
        outputs.check_room(temporary, trees.num_bytes(params))
        _write_params(params, temporary / base_lib.PARAMS)
        leaves = trees.by_path(params).items()
        infos = {path: TensorInfo(leaf.shape, leaf.dtype.name) for path, leaf in leaves}
        made = Base(
            temporary,
            _fingerprint(checkpoint, infos),
            checkpoint.name,
            _headers(directory, temporary),
            infos,
        )
        # Comes last: without it the directory is nothing.
        manifest = base_lib.dump(made)
        (temporary / base_lib.MANIFEST).write_text(manifest, encoding="utf-8")
    return Path(out)


def _headers(source: Path, out: Path) -> dict[str, bytes]:
    """Return the headers of the files that come out again, and write their index."""
    if not weights.is_packed(source):
        export.copy_index(source, out)
        return contents.headers(source)
    infos = contents.tensor_infos(source)
    headers, index = export.split_headers(infos, export.PACKED_SHARD)
    if index is not None:
        (out / export.INDEX).write_text(index, encoding="utf-8")
    return headers


def _fingerprint(checkpoint: Checkpoint, infos: dict[str, TensorInfo]) -> str:
    """Return the source's fingerprint if no number was rounded, else one of both."""
    source = tensor_files.fingerprint(checkpoint.path)
    rounded = weights.is_packed(checkpoint.path)
    for name, info in contents.tensor_infos(checkpoint.path).items():
        place = _place(checkpoint, name)
        if place is not None and place.path in infos:
            kind = jnp.dtype(infos[place.path].dtype)
            rounded |= jnp.promote_types(info.dtype, kind) != kind
    if not rounded:
        return source
    kinds = json.dumps({path: info.dtype for path, info in infos.items()})
    return hashlib.sha256(f"{source}{kinds}".encode()).hexdigest()


def _place(checkpoint: Checkpoint, name: str) -> places.Place | None:
    family = checkpoint.family
    cut = places.stacks_of(checkpoint.config, checkpoint.groups)
    return places.locate(family.canonical(name), family.rules, cut)


def _write_buffers(checkpoint: Checkpoint, directory: Path) -> None:
    """Keep what is no parameter, so that an export has it too."""
    values: dict[str, np.ndarray] = {}
    for name in contents.tensor_infos(checkpoint.path):
        place = _place(checkpoint, name)
        if place is None or place.is_idle:
            value = weights.read_weight(checkpoint.path, name)
            assert value is not None
            values[name] = value
    if values:
        export.write(values, directory / base_lib.BUFFERS)


def _write_params(params: Any, path: Path) -> None:
    sizes = [leaf.nbytes for leaf in jax.tree.leaves(params)]
    handler = ocp.PyTreeCheckpointHandler(
        use_ocdbt=True,
        # Weights hardly shrink, and a reader would have to unpack them.
        use_compression=False,
        # Or all of them are in memory a second time.
        save_concurrent_gb=max(1, math.ceil(max(sizes) / 1e9)),
    )
    save_args = trees.map_with_paths(_save_args, params)
    try:
        with ocp.Checkpointer(handler) as checkpointer:
            checkpointer.save(
                path.absolute(), args=ocp.args.PyTreeSave(params, save_args=save_args)
            )
    except ValueError as error:  # as tensorstore calls a disk that has become full
        if "RESOURCE_EXHAUSTED" in str(error):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from None
        raise


def _save_args(path: str, leaf: Any) -> ocp.SaveArgs:
    """Cut stacks into layers, and large layers into parts of 4 MB."""
    stacked = stacks.split(path).group is not None
    return ocp.SaveArgs(
        chunk_byte_size=max(_CHUNK, leaf.dtype.itemsize),
        shard_axes=(0,) if stacked else (),
    )
