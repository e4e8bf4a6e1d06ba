"""Attention of new tokens over a cache of keys and values.

Keys and values lie heads first, [b, g, s, h], so that the products of one head read one
stretch of memory. On CPUs the cache is read in blocks and no further than the longest
text reaches: with texts of 20 to 250 tokens in a cache of 512 that takes between a
fifth and a sixth of the time of one product over all of it with tokens first
(``experiments/bench/cache_layouts.py``). Elsewhere it is read whole, in one product: a
loop whose end is only known when it runs would keep an accelerator waiting for its host.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxalign.models.layouts import LOW, CacheLayout, capped


__all__ = ["attend"]

_State = tuple[Array, Array, Array]
"""Of a softmax in the making: the largest score, the sum, the weighed values."""


def attend(
    q: Float[Array, "b t n h"],
    keys: Float[Array, "b g s h"],
    values: Float[Array, "b g s h"],
    layout: CacheLayout,
    *,
    scale: float,
    softcap: float | None = None,
    block: int = 64,
) -> tuple[Float[Array, "b t n h"], Float[Array, "b t n"]]:
    """Return softmax(scale q k^T) v over a cache, and the scores' log-sum-exp.

    Args:
      q: rotated queries; ``n`` heads, a multiple of the ``g`` heads of keys and values.
      keys: of all tokens so far, at their positions; what lies behind is not seen. Of
        any float type; scores are float32.
      values: likewise.
      layout: where the queries stand.
      scale: of the scores.
      softcap: scores s become ``softcap * tanh(s / softcap)``.
      block: keys that are read at once on CPUs.
    """
    rows, length, heads, width = q.shape
    groups, size = keys.shape[1], keys.shape[2]
    # The queries that share a head of keys, and their places, are one product's rows.
    grouped = q.reshape(rows, length, groups, heads // groups, width)
    grouped = grouped.transpose(0, 2, 3, 1, 4).reshape(rows, groups, -1, width)
    grouped = grouped * scale
    positions = jnp.tile(layout.positions, (1, heads // groups))

    def join(state: _State, begin: Array | int, count: int) -> _State:
        top, total, out = state
        k = jax.lax.dynamic_slice_in_dim(keys, begin, count, axis=2)
        v = jax.lax.dynamic_slice_in_dim(values, begin, count, axis=2)
        # On CPUs a product of many keys with few queries takes half as long the first
        # way round, and one of few weights with many values the other. The barriers
        # keep the compiler from turning one into the other.
        scores = jnp.einsum(
            "bgsh,bgqh->bgsq",
            k.astype(q.dtype),
            grouped,
            preferred_element_type=jnp.float32,
        )
        scores = jax.lax.optimization_barrier(scores).swapaxes(2, 3)
        places = begin + jnp.arange(count)[None, None]
        seen = places <= positions[..., None]
        if layout.window is not None:
            seen &= positions[..., None] - places < layout.window
        scores = jnp.where(seen[:, None], capped(scores, softcap), LOW)
        new_top = jnp.maximum(top, scores.max(axis=-1))
        weights = jnp.exp(scores - new_top[..., None])
        weights = jnp.where(seen[:, None], weights, 0.0)
        kept = jnp.exp(top - new_top)
        found = jnp.einsum(
            "bgqs,bgsh->bgqh",
            jax.lax.optimization_barrier(weights.astype(q.dtype)),
            v.astype(q.dtype),
            preferred_element_type=jnp.float32,
        )
        return (
            new_top,
            total * kept + weights.sum(axis=-1),
            out * kept[..., None] + found,
        )

    shape = grouped.shape[:3]
    start = (
        jnp.full(shape, LOW, jnp.float32),
        jnp.zeros(shape, jnp.float32),
        jnp.zeros((*shape, width), jnp.float32),
    )

    def whole() -> _State:
        return join(start, 0, size)

    def in_blocks() -> _State:
        first, end = _reach(layout)
        return jax.lax.fori_loop(
            first // block,
            (end + block - 1) // block,
            lambda i, state: join(state, i * block, block),
            start,
        )

    if size % block:
        state = whole()
    else:
        state = jax.lax.platform_dependent(cpu=in_blocks, default=whole)
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


def _reach(layout: CacheLayout) -> tuple[Array, Array]:
    """Return the first place that any query sees, and the one behind the last."""
    far = jnp.iinfo(jnp.int32).max
    end = jnp.where(layout.valid, layout.positions + 1, 0).max()
    if layout.window is None:
        return jnp.zeros_like(end), end
    lowest = jnp.where(layout.valid, layout.positions, far).min()
    return jnp.maximum(lowest - layout.window + 1, 0), end
