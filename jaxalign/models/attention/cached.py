"""Attention of new tokens over a cache of keys and values.

Keys [b, g, h, s] and values [b, g, s, h] lie heads first, so that the products of one
head read one stretch of memory, and each as its product takes it. A cache may be cut
into blocks of places that are arrays of their own. Those that no text reaches are then
left out, and none is copied before it is read, as a slice of one array would be: on
CPUs that takes half the time (``experiments/bench/cache_layouts.py``). Elsewhere one
block is best: what to leave out is only known when the step runs, and an accelerator
would wait for it.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxalign import slices
from jaxalign.models.attention.mask import LOW, CacheLayout, capped


__all__ = ["PLACES_AXIS", "attend", "put"]

PLACES_AXIS = {"key": -1, "value": -2}
"""Which axis of an array of the cache the places are."""

_State = tuple[Array, Array, Array]
"""Of a softmax in the making: the largest score, the sum, the weighed values."""


def put(
    blocks: Sequence[Float[Array, "b g x y"]],
    new: Float[Array, "b t g h"],
    layout: CacheLayout,
    *,
    axis: int,
) -> tuple[Float[Array, "b g x y"], ...]:
    """Return the blocks of a cache with new tokens' keys or values in their places.

    A cache that is cut, which only CPUs' are, is written without scatters: XLA compiles
    each of them anew, two for every block of every layer, where it compiles a loop or a
    select once for all.

    Args:
      blocks: of keys or values, see :func:`attend`.
      new: of the new tokens.
      layout: where they stand; those that are not valid are dropped.
      axis: of the places.
    """
    dtype, size = blocks[0].dtype, blocks[0].shape[axis]
    new = new.astype(dtype)
    as_bits = len(blocks) > 1 and dtype.itemsize < 4
    if as_bits:  # of which CPUs do not copy a whole block to write a part
        new = slices.as_bits(new)
        blocks = [slices.as_bits(block) for block in blocks]
    found = []
    for number, block in enumerate(blocks):
        places = layout.positions - number * size
        here = layout.valid & (places >= 0) & (places < size)
        if len(blocks) == 1:
            # What is not for this block gets a place beyond its end, and is dropped.
            index: list[Any] = [jnp.arange(len(block))[:, None], *[slice(None)] * 3]
            index[axis] = jnp.where(here, places, size)
            found.append(block.at[tuple(index)].set(new, mode="drop"))
        elif new.shape[1] == 1:
            found.append(_put_one(block, new, places[:, 0], here[:, 0], axis))
        else:
            found.append(_put_some(block, new, places, here, axis))
    if as_bits:
        found = [slices.from_bits(block, dtype) for block in found]
    return tuple(found)


def _put_one(block: Array, new: Array, places: Array, here: Array, axis: int) -> Array:
    """Put one token a row, row after row, in place."""
    tokens = jnp.moveaxis(new, 1, axis)
    begins, zero = jnp.where(here, places, 0), jnp.zeros((), jnp.int32)

    def row(i: Array, block: Array) -> Array:
        begin = [i, zero, zero, zero]
        begin[axis] = begins[i]
        token = jax.lax.dynamic_slice_in_dim(tokens, i, 1)
        old = jax.lax.dynamic_slice(block, begin, token.shape)
        return jax.lax.dynamic_update_slice(
            block, jnp.where(here[i], token, old), begin
        )

    return jax.lax.fori_loop(jnp.int32(0), jnp.int32(len(block)), row, block)


def _put_some(block: Array, new: Array, places: Array, here: Array, axis: int) -> Array:
    """Write a block anew, every place from the token that stands there, if any."""
    size = block.shape[axis]
    stands = here[..., None] & (places[..., None] == jnp.arange(size)[None, None])
    source = jnp.argmax(stands, axis=1)
    tokens = jnp.take_along_axis(new, source[:, :, None, None], axis=1)
    shape = [len(block), 1, 1, 1]
    shape[axis] = size
    is_new = jnp.broadcast_to(stands.any(axis=1).reshape(shape), block.shape)
    return jnp.where(is_new, jnp.moveaxis(tokens, 1, axis), block)


def attend(
    q: Float[Array, "b t n h"],
    keys: Sequence[Float[Array, "b g h s"]],
    values: Sequence[Float[Array, "b g s h"]],
    layout: CacheLayout,
    *,
    scale: float,
    softcap: float | None = None,
) -> tuple[Float[Array, "b t n h"], Float[Array, "b t n"]]:
    """Return softmax(scale q k^T) v over a cache, and the scores' log-sum-exp.

    Args:
      q: rotated queries; ``n`` heads, a multiple of the ``g`` heads of keys and values.
      keys: of all tokens so far, at their positions, cut into blocks of equal size;
        what lies behind is not seen. Of any float type; scores are float32.
      values: likewise.
      layout: where the queries stand.
      scale: of the scores.
      softcap: scores s become ``softcap * tanh(s / softcap)``.
    """
    rows, length, heads, width = q.shape
    groups, size = keys[0].shape[1], keys[0].shape[PLACES_AXIS["key"]]
    # The queries that share a head of keys, and their places, are one product's rows.
    grouped = q.reshape(rows, length, groups, heads // groups, width)
    grouped = grouped.transpose(0, 2, 3, 1, 4).reshape(rows, groups, -1, width)
    grouped = grouped * scale
    positions = jnp.tile(layout.positions, (1, heads // groups))
    shape = grouped.shape[:3]
    state: _State = (
        jnp.full(shape, LOW, jnp.float32),
        jnp.zeros(shape, jnp.float32),
        jnp.zeros((*shape, width), jnp.float32),
    )
    first, end = _reach(layout)

    def join(begin: int, state: _State, k: Array, v: Array) -> _State:
        places = begin + jnp.arange(size)[None, None]
        seen = places <= positions[..., None]
        if layout.window is not None:
            seen &= positions[..., None] - places < layout.window
        return _join(grouped, seen[:, None], softcap, state, k, v)

    for number, (k, v) in enumerate(zip(keys, values, strict=True)):
        begin = number * size
        do = functools.partial(join, begin)
        if len(keys) == 1:
            state = do(state, k, v)
        else:
            reached = (begin < end) & (begin + size > first)
            state = jax.lax.cond(reached, do, lambda state, *_: state, state, k, v)
    top, total, out = state
    # A token that only fills up the array may see nothing.
    total = jnp.where(total > 0, total, 1.0)
    out = (out / total[..., None]).astype(q.dtype)
    lse = top + jnp.log(total)

    def by_token(x: Array) -> Array:
        tail = x.shape[3:]
        x = x.reshape(rows, groups, heads // groups, length, *tail)
        return jnp.moveaxis(x, 3, 1).reshape(rows, length, heads, *tail)

    return by_token(out), by_token(lse)


def _join(
    q: Float[Array, "b g r h"],
    seen: Bool[Array, "b 1 r s"],
    softcap: float | None,
    state: _State,
    k: Float[Array, "b g h s"],
    v: Float[Array, "b g s h"],
) -> _State:
    """Put a block of the cache into the softmax."""
    top, total, out = state
    # Products are taken in the wider of the two dtypes, so that a wide cache is read
    # as it lies there.
    dtype = max(q.dtype, k.dtype, key=lambda dtype: dtype.itemsize)
    # The barriers keep the products as they are: few rows times a long matrix.
    scores = jnp.einsum(
        "bgqh,bghs->bgqs",
        q.astype(dtype),
        k.astype(dtype),
        preferred_element_type=jnp.float32,
    )
    scores = jax.lax.optimization_barrier(scores)
    scores = jnp.where(seen, capped(scores, softcap), LOW)
    new_top = jnp.maximum(top, scores.max(axis=-1))
    weights = jnp.exp(scores - new_top[..., None])
    weights = jnp.where(seen, weights, 0.0)
    kept = jnp.exp(top - new_top)
    found = jnp.einsum(
        "bgqs,bgsh->bgqh",
        jax.lax.optimization_barrier(weights.astype(dtype)),
        v.astype(dtype),
        preferred_element_type=jnp.float32,
    )
    return (
        new_top,
        total * kept + weights.sum(axis=-1),
        out * kept[..., None] + found,
    )


def _reach(layout: CacheLayout) -> tuple[Array, Array]:
    """Return the first place that any query sees, and the one behind the last."""
    far = jnp.iinfo(jnp.int32).max
    end = jnp.where(layout.valid, layout.positions + 1, 0).max()
    if layout.window is None:
        return jnp.zeros_like(end), end
    lowest = jnp.where(layout.valid, layout.positions, far).min()
    return jnp.maximum(lowest - layout.window + 1, 0), end
