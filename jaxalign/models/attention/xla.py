"""Attention in blocks of queries, in plain JAX: it runs on every platform.

Holds no [t, t] array, forward and backward, and leaves out keys that no query of the
block can see.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from jaxalign.models.attention.mask import LOW, RowLayout, capped, visible


__all__ = ["SAVED_NAMES", "attend"]

SAVED_NAMES = ("attention_out", "attention_lse")
"""Names under which a remat policy may keep attention's results."""


def attend(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b t g h"],
    v: Float[Array, "b t g h"],
    layout: RowLayout,
    *,
    scale: float,
    softcap: float | None = None,
    block: int = 64,
) -> tuple[Float[Array, "b t n h"], Float[Array, "b t n"]]:
    """Return attention and its log-sum-exp, see ``models.attention.attention``.

    Args:
      q: queries.
      k: keys.
      v: values.
      layout: who sees whom.
      scale: of the scores.
      softcap: of the scores.
      block: queries of a block.
    """
    rows, length, heads, width = q.shape
    groups = k.shape[2]
    block = min(block, length)
    extra = -length % block
    if extra:
        pad = [(0, 0), (0, extra), (0, 0), (0, 0)]
        q, k, v = jnp.pad(q, pad), jnp.pad(k, pad), jnp.pad(v, pad)
        index = jnp.arange(length, length + extra, dtype=layout.starts.dtype)
        layout = RowLayout(
            jnp.pad(layout.sequence_ids, pad[:2]),
            jnp.pad(layout.branch_ids, pad[:2]),
            jnp.concatenate([layout.starts, index]),
            jnp.pad(layout.positions, pad[:2]),
            layout.window,
            None if layout.ends is None else jnp.concatenate([layout.ends, index]),
        )
    # [rows, groups, heads a group, t, h]: a group's heads share their keys.
    queries = q.reshape(rows, -1, groups, heads // groups, width)
    queries = jnp.transpose(queries, (0, 2, 3, 1, 4))
    keys, values = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    found: Any = _blocked(queries * scale, keys, values, layout, block, softcap)
    out, lse = found

    def rows_first(x: Any) -> Any:
        x = x.transpose(0, 3, 1, 2, 4)
        return x.reshape(rows, -1, heads, x.shape[-1])[:, :length]

    return rows_first(out), rows_first(lse)[..., 0]


# In blocks of queries. A block's keys are the stretch from the first one that any of
# its queries can see up to itself. How long that stretch is depends on the data, so the
# smallest of a few fixed lengths that covers it is chosen as the program runs: with
# short pairs in long rows most keys are never touched. The backward pass computes the
# weights again from the saved log-sum-exp, as FlashAttention does
# (https://arxiv.org/abs/2205.14135).


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _blocked(
    q: Array, k: Array, v: Array, layout: RowLayout, block: int, softcap: float | None
) -> tuple[Array, Array]:
    return _forward(q, k, v, layout, block, softcap)


def _slice(x: Array, begin: Any, size: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, begin, size, axis=x.ndim - 2)


def _stretches(blocks: int) -> list[int]:
    """Return the lengths to choose from, in blocks: 1, 2, 3, 4, 6, 8, 12, ... all."""
    sizes = [n for e in range(blocks.bit_length()) for n in (2**e, 3 * 2**e // 2)]
    return sorted({1, blocks, *(n for n in sizes if n <= blocks)})


def _over_keys(
    layout: RowLayout, i: Array, block: int, run: Callable[..., Any], *args: Any
) -> Any:
    """Call ``run(*args, begin, size)`` with the stretch of keys of query block i."""
    blocks = layout.starts.shape[0] // block
    sizes = _stretches(blocks)
    starts = jax.lax.dynamic_slice_in_dim(layout.starts, i * block, block)
    first, end = starts.min() // block, i + 1
    if layout.ends is not None:
        ends = jax.lax.dynamic_slice_in_dim(layout.ends, i * block, block)
        end = jnp.maximum(-(-ends.max() // block), end)
    choice = jnp.searchsorted(jnp.asarray(sizes), end - first)

    def branch(size: int) -> Callable[..., Any]:
        # Near the row's beginning a stretch may reach beyond the queries; the mask
        # hides what they do not see.
        return lambda *xs: run(*xs, jnp.maximum(end - size, 0) * block, size * block)

    return jax.lax.switch(choice, [branch(size) for size in sizes], *args)


def _scores(q_block: Array, keys: Array) -> Array:
    return jnp.einsum(
        "bgmqh,bgkh->bgmqk", q_block, keys, preferred_element_type=jnp.float32
    )


def _forward(
    q: Array, k: Array, v: Array, layout: RowLayout, block: int, softcap: float | None
) -> tuple[Array, Array]:
    def one(i: Array) -> tuple[Array, Array]:
        q_block = _slice(q, i * block, block)

        def run(begin: Array, size: int) -> tuple[Array, Array]:
            mask = visible(layout, (i * block, block), (begin, size))
            scores = capped(_scores(q_block, _slice(k, begin, size)), softcap)
            scores = jnp.where(mask, scores, LOW)
            top = scores.max(-1, keepdims=True)
            weights = jnp.where(mask, jnp.exp(scores - top), 0.0)
            total = weights.sum(-1, keepdims=True)
            safe = jnp.where(total == 0, 1.0, total)
            out = jnp.einsum(
                "bgmqk,bgkh->bgmqh",
                weights.astype(v.dtype),
                _slice(v, begin, size),
                preferred_element_type=jnp.float32,
            )
            lse = jnp.where(total == 0, 0.0, top + jnp.log(safe))
            return (out / safe).astype(q.dtype), lse

        return _over_keys(layout, i, block, run)

    out, lse = jax.lax.map(one, jnp.arange(q.shape[3] // block))
    return _unblock(out), _unblock(lse)


def _unblock(x: Array) -> Array:
    """[blocks, b, g, m, block, h] -> [b, g, m, t, h]."""
    return jnp.moveaxis(x, 0, 3).reshape(*x.shape[1:4], -1, x.shape[-1])


def _blocked_fwd(
    q: Array, k: Array, v: Array, layout: RowLayout, block: int, softcap: float | None
) -> tuple[tuple[Array, Array], Any]:
    # The masks do not depend on the layer, so under a scan of rematerialised layers the
    # compiler would compute all of them once, [t, t] for every head, and read them back
    # in each layer. Tied to the queries, they stay where they are used.
    tied, q = jax.lax.optimization_barrier((layout, q))
    out, lse = _forward(q, k, v, tied, block, softcap)
    out = checkpoint_name(out, SAVED_NAMES[0])
    lse = checkpoint_name(lse, SAVED_NAMES[1])
    return (out, lse), (q, k, v, layout, out, lse)


def _blocked_bwd(
    block: int, softcap: float | None, residuals: Any, grads: tuple[Array, Array]
) -> tuple[Any, ...]:
    q, k, v, layout, out, lse = residuals
    grad, d_lse = grads
    # sum_j p_ij dp_ij, which the softmax's derivative subtracts; the log-sum-exp's own
    # derivative is p_ij.
    inner = (grad.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1, keepdims=True)
    inner = inner - d_lse

    def one(carry: tuple[Array, Array], i: Array) -> tuple[tuple[Array, Array], Array]:
        q_block, g_block, lse_block, inner_block = (
            _slice(x, i * block, block) for x in (q, grad, lse, inner)
        )

        def run(
            d_k: Array, d_v: Array, begin: Array, size: int
        ) -> tuple[tuple[Array, Array], Array]:
            mask = visible(layout, (i * block, block), (begin, size))
            keys, values = _slice(k, begin, size), _slice(v, begin, size)
            scores = capped(_scores(q_block, keys), softcap)
            weights = jnp.where(mask, jnp.exp(scores - lse_block), 0.0)
            d_scores = weights * (_scores(g_block, values) - inner_block)
            if softcap is not None:
                d_scores = d_scores * (1 - jnp.square(scores / softcap))
            d_scores = d_scores.astype(q.dtype)
            d_q = jnp.einsum(
                "bgmqk,bgkh->bgmqh",
                d_scores,
                keys,
                preferred_element_type=jnp.float32,
            )

            def add(total: Array, left: Array, right: Array) -> Array:
                update = jnp.einsum(
                    "bgmqk,bgmqh->bgkh", left, right, preferred_element_type=jnp.float32
                )
                return jax.lax.dynamic_update_slice_in_dim(
                    total, _slice(total, begin, size) + update, begin, axis=2
                )

            d_k = add(d_k, d_scores, q_block)
            d_v = add(d_v, weights.astype(q.dtype), g_block)
            return (d_k, d_v), d_q.astype(q.dtype)

        return _over_keys(layout, i, block, run, *carry)

    zeros = (jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32))
    (d_k, d_v), d_q = jax.lax.scan(one, zeros, jnp.arange(q.shape[3] // block))
    return _unblock(d_q), d_k.astype(k.dtype), d_v.astype(v.dtype), None


_blocked.defvjp(_blocked_fwd, _blocked_bwd)
