"""Where the leaves of a tree lie on a mesh, by pattern."""

import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from jaxalign import trees
from jaxalign.errors import UserError
from jaxalign.parallel import multihost
from jaxalign.parallel.mesh import BATCH_AXES
from jaxalign.types import RowShare
from jaxalign.variables import check_params


__all__ = [
    "batch_sharding",
    "fitted",
    "param_shardings",
    "put",
    "put_batch",
    "replicated",
    "share_of_rows",
]

Rules = Sequence[tuple[str, PartitionSpec]]


def param_shardings(tree: Any, mesh: Mesh, rules: Rules) -> Any:
    """Return the sharding of every leaf: the first rule that matches its path in full.

    An axis that does not divide its dimension is left out: that dimension is copied.

    Args:
      tree: one collection, arrays or shapes, such as ``variables["params"]``.
      mesh: devices.
      rules: (regular expression, spec), first match wins.
    Raises:
      UserError: no rule matches a leaf; every weight's place is said, never implied.
    Example:
      >>> mesh = jax.make_mesh((1,), ("fsdp",), devices=jax.devices()[:1])
      >>> shapes = {"up": {"kernel": jax.ShapeDtypeStruct((4, 2), "float32")}}
      >>> found = param_shardings(shapes, mesh, [("up/.*", jax.P(None, "fsdp"))])
      >>> found["up"]["kernel"].spec
      P(None, 'fsdp')
    """
    check_params(tree, "param_shardings")

    def place(path: str, leaf: Any) -> NamedSharding:
        for pattern, spec in rules:
            if re.fullmatch(pattern, path):
                return NamedSharding(mesh, fitted(spec, leaf.shape, mesh))
        raise UserError(
            f"param_shardings: no sharding rule matches {path}: expected a rule for "
            "every weight. Add one"
        )

    return trees.map_with_paths(place, tree)


def fitted(
    spec: PartitionSpec, shape: tuple[int, ...], mesh: Mesh | AbstractMesh
) -> PartitionSpec:
    """Leave out of a spec the axes that do not divide their dimension.

    A dimension that several axes split together keeps all of them or none.

    >>> mesh = jax.sharding.AbstractMesh((2, 4), ("data", "fsdp"))
    >>> fitted(jax.P("fsdp", "data"), (6, 6), mesh)  # four do not divide six
    P(None, 'data')
    """

    def divides(axis: str | tuple[str, ...] | None, size: int) -> bool:
        names = (axis,) if isinstance(axis, str) else axis or ()
        return size % math.prod(mesh.shape[name] for name in names) == 0

    axes = [*spec, *[None] * (len(shape) - len(spec))]
    return PartitionSpec(
        *(
            axis if divides(axis, size) else None
            for axis, size in zip(axes, shape, strict=True)
        )
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of what every device holds whole.

    >>> replicated(jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])).spec
    P()
    """
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, leading: int = 0) -> NamedSharding:
    """Return the sharding of batch arrays: rows split over data and fsdp.

    Args:
      mesh: devices.
      leading: axes before the rows (1 for a stack of micro-batches).
    Example:
      >>> one = jax.devices()[:1]
      >>> batch_sharding(jax.make_mesh((1, 1), ("data", "fsdp"), devices=one), 1).spec
      P(None, ('data', 'fsdp'))
    """
    return NamedSharding(mesh, PartitionSpec(*[None] * leading, BATCH_AXES))


def share_of_rows(mesh: Mesh) -> RowShare:
    """Return the rows of a batch that this process builds: those of its devices.

    Processes whose devices hold parts of the same rows (``tensor`` across hosts) build
    the same ones. One process builds all.

    >>> one = jax.make_mesh((1, 1), ("data", "fsdp"), devices=jax.devices()[:1])
    >>> share_of_rows(one)
    RowShare(parts=(0,), of=1)
    """
    if not multihost.several():
        return RowShare()
    count = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    where = batch_sharding(mesh).addressable_devices_indices_map((count,))
    parts = {index[0].start or 0 for index in where.values() if index}
    return RowShare(tuple(sorted(parts)), count)


def put(leaf: Any, where: jax.sharding.Sharding) -> jax.Array:
    """Put an array, which every process holds or has a part of, on the devices.

    >>> mesh = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])
    >>> put(np.ones(2), replicated(mesh)).shape
    (2,)
    """
    if not multihost.several():
        return jax.device_put(leaf, where)
    if isinstance(leaf, jax.Array):
        if not leaf.is_fully_addressable:
            return jax.jit(lambda x: x, out_shardings=where)(leaf)
        if jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            data = put(jax.random.key_data(leaf), where)
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    host = np.asarray(leaf)
    return jax.make_array_from_callback(host.shape, where, lambda index: host[index])


def put_batch(batch: Any, mesh: Mesh | None, leading: int = 0) -> Any:
    """Send a batch of numpy arrays to the devices.

    Args:
      batch: the rows of this process, see :func:`share_of_rows`.
      mesh: devices.
      leading: axes before the rows.
    Raises:
      UserError: the rows do not divide over the mesh.
    Example:
      >>> put_batch({"tokens": np.zeros((2, 3))}, None)["tokens"].shape
      (2, 3)
    """
    if mesh is None:
        return jax.tree.map(jax.device_put, batch)
    where = batch_sharding(mesh, leading)
    shards = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    share = share_of_rows(mesh)
    local = np.shape(jax.tree.leaves(batch)[0])[leading]
    rows = local * share.of // len(share.parts)
    if rows % shards:
        raise UserError(
            f"put_batch: got {rows} row(s), expected a multiple of data × fsdp = "
            f"{shards}, over which the mesh splits them. Give the batch "
            f"{-(-rows // shards) * shards} rows (single_batch(data, rows=...) fills "
            "up), or a smaller mesh"
        )

    size = local // len(share.parts)

    def laid(leaf: np.ndarray) -> jax.Array:
        def part(index: Any) -> np.ndarray:
            place = share.parts.index((index[leading].start or 0) // size) * size
            mine = slice(place, place + size)
            return leaf[(*index[:leading], mine, *index[leading + 1 :])]

        if share.of == 1:
            return jax.make_array_from_process_local_data(where, leaf)
        shape = (*leaf.shape[:leading], rows, *leaf.shape[leading + 1 :])
        return jax.make_array_from_callback(shape, where, part)

    return jax.tree.map(laid, batch)
