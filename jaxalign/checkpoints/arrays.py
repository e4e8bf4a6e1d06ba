"""Arrays made piece by piece: each device reads its shard, a stack its layers."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxalign.errors import UserError
from jaxalign.models import quantised
from jaxalign.models.quantised import Quantised, Quantize


__all__ = ["empty_stack", "put_piece", "read_piece"]


def read_piece(
    values: Any, path: str, at: tuple[int, ...], target: Any, layout: Any, dtype: Any
) -> jax.Array:
    """Read a tensor, for each device just the part that it holds.

    Without a placement it goes where JAX puts new arrays, and is not tied to it.
    """
    shape, placement = target.shape[len(at) :], layout[path]
    if isinstance(placement, NamedSharding):
        axes = placement.spec[len(at) :]
        placement = NamedSharding(placement.mesh, PartitionSpec(*axes))

    def part(index: Any) -> np.ndarray:
        bounds = tuple(
            slice(*i.indices(n)[:2]) for i, n in zip(index, shape, strict=True)
        )
        # A view of a file must be copied; what a converted base gives is fresh.
        array = np.array if isinstance(values, np.ndarray) else np.asarray
        return _converted(values[bounds], dtype, path, array)

    if placement is None:
        return jnp.asarray(part((slice(None),) * len(shape)))
    return jax.make_array_from_callback(shape, placement, part)


def _converted(
    values: np.ndarray, dtype: Any, path: str, array: Callable[..., np.ndarray]
) -> np.ndarray:
    with np.errstate(over="ignore"):
        made = array(values, dtype=dtype, order="C")
    # Only float16 has a smaller range than the kinds that are stored.
    if dtype == np.float16 and np.isinf(made).any() and np.isfinite(values).all():
        raise UserError(
            f"{path} has a weight of {np.abs(values).max():.3g}, above float16's "
            "largest, 65504: use --dtype bfloat16 or float32"
        )
    return made


def empty_stack(
    shape: tuple[int, ...], dtype: Any, placement: Any, quantize: Quantize
) -> Any:
    """Make an empty stack of layers, of numbers or of codes."""
    if quantize == "none":
        return _zeros_maker(shape, dtype, placement)()
    codes = jax.eval_shape(
        functools.partial(quantised.quantise, kind=quantize),
        jax.ShapeDtypeStruct(shape, dtype),
    )
    if not isinstance(placement, NamedSharding):
        return jax.tree.map(
            lambda c: _zeros_maker(c.shape, c.dtype, placement)(), codes
        )
    where = quantised.place(codes, placement)
    return jax.tree.map(
        lambda c, to: _zeros_maker(c.shape, c.dtype, to)(), codes, where
    )


@functools.lru_cache(maxsize=256)  # as is a compiled function, so that it is made once
def _zeros_maker(shape: tuple[int, ...], dtype: Any, placement: Any) -> Any:
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=placement)


@functools.partial(jax.jit, donate_argnums=0)
def put_piece(stack: Any, piece: Any, index: tuple[Any, ...]) -> Any:
    if isinstance(stack, Quantised):
        piece = quantised.quantise(piece, stack.kind)

    def put(whole: jax.Array, part: jax.Array) -> jax.Array:
        begin = (*index, *[0] * part.ndim)
        return jax.lax.dynamic_update_slice(whole, part[(None,) * len(index)], begin)

    return jax.tree.map(put, stack, piece)
