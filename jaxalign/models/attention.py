"""Attention over packed rows with shared prompts.

One entry point, :func:`attention`. A query at index q sees a key at index j if and only
if ``j <= q``, both are of the same non-zero sequence, and the key's branch is the
prompt (0) or the query's own.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from jaxalign.types import ModelInputs


__all__ = [
    "SAVED_NAMES",
    "CacheLayout",
    "Implementation",
    "RowLayout",
    "attention",
    "available",
    "cached_attention",
    "capped",
    "lengths",
    "row_layout",
]

Implementation = Literal["xla", "dense"]

SAVED_NAMES = ("attention_out", "attention_lse")
"""Names under which a remat policy may keep attention's results."""


def available(platform: str) -> dict[str, str]:
    """Return which implementations there are, and whether they run on a platform."""
    return {
        "xla": f"runs on {platform}; blocks of queries and keys, skips what is unseen",
        "dense": f"runs on {platform}; the plain formula, for comparison",
        "cudnn": "not built in",
        "splash": "not built in",
    }


class RowLayout(NamedTuple):
    """Who may see whom, in the form that attention needs. Made once a forward pass."""

    sequence_ids: Int[Array, "b t"]
    branch_ids: Int[Array, "b t"]
    starts: Int[Array, " t"]
    """For each index the first one that any row's token there can see."""
    positions: Int[Array, "b t"]
    """Distances in a sliding window are those of positions, not of places in the row:
    what a shared prompt's second response sees lies behind the first one."""
    window: Int[Array, ""] | None = None
    """A query at position q sees keys at positions above q - window; None is all."""


def row_layout(inputs: ModelInputs) -> RowLayout:
    """Return the layout of packed rows."""
    ids = inputs.sequence_ids
    index = jnp.arange(ids.shape[1])
    new = jnp.concatenate(
        [jnp.ones_like(ids[:, :1], bool), ids[:, 1:] != ids[:, :-1]], axis=1
    )
    start = jax.lax.cummax(jnp.where(new, index, 0), axis=1)
    # Padding sees nothing, so it asks for no key.
    start = jnp.where(ids > 0, start, index)
    return RowLayout(ids, inputs.branch_ids, start.min(axis=0), inputs.positions)


def lengths(layout: "RowLayout | CacheLayout") -> Int[Array, "b t"]:
    """Return for each token how long the sequence is that it stands in.

    Against a cache, how long it is so far.
    """
    positions = layout.positions
    if isinstance(layout, CacheLayout):
        longest = jnp.where(layout.valid, positions, 0).max(axis=1, keepdims=True)
        return jnp.broadcast_to(longest + 1, positions.shape)
    rows = jnp.arange(positions.shape[0])[:, None]
    ids = layout.sequence_ids
    most = jnp.zeros((positions.shape[0], positions.shape[1] + 1), positions.dtype)
    return most.at[rows, ids].max(positions + 1)[rows, ids]


def attention(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b t g h"],
    v: Float[Array, "b t g h"],
    layout: RowLayout,
    *,
    scale: float,
    softcap: float | None = None,
    implementation: Implementation = "xla",
    block: int = 64,
) -> tuple[Float[Array, "b t n h"], Float[Array, "b t n"]]:
    """Return softmax(scale q k^T) v under the mask of packed rows; 0 for padding.

    And the log-sum-exp of the scores that each query sees, by which attention over
    further keys can be joined exactly; 0 for padding too.

    Args:
      q: queries; ``n`` heads, a multiple of the ``g`` heads of keys and values.
      k: keys, rotated.
      v: values.
      layout: who sees whom.
      scale: of the scores, usually 1/sqrt(h).
      softcap: scores s become ``softcap * tanh(s / softcap)``.
      implementation: ``xla`` works in blocks of queries, forward and backward, holds no
        [t, t] array and leaves out keys that no query of the block can see; ``dense``
        is the plain formula, for comparison.
      block: queries of a block.
    """
    if implementation == "dense":
        return _dense(q, k, v, layout, scale, softcap)
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


class CacheLayout(NamedTuple):
    """Where new tokens stand that are decoded against a cache of earlier ones."""

    positions: Int[Array, "b t"]
    """From 0, one after the other in each row; they are places in the cache too."""
    valid: Bool[Array, "b t"]
    """False for tokens that only fill up the array: they leave no trace."""
    window: Int[Array, ""] | None = None
    """As in :class:`RowLayout`."""


def cached_attention(
    q: Float[Array, "b t n h"],
    keys: Float[Array, "b s g h"],
    values: Float[Array, "b s g h"],
    layout: CacheLayout,
    *,
    scale: float,
    softcap: float | None = None,
) -> tuple[Float[Array, "b t n h"], Float[Array, "b t n"]]:
    """Return attention over a cache, and its log-sum-exp.

    Args:
      q: rotated queries.
      keys: of all tokens so far, at their positions; what lies behind is not seen.
      values: likewise.
      layout: where the queries stand.
      scale: of the scores.
      softcap: see :func:`attention`.
    """
    rows, length, heads, width = q.shape
    groups = keys.shape[2]
    q = q.reshape(rows, length, groups, heads // groups, width)
    scores = jnp.einsum(
        "btgmh,bsgh->btgms", q * scale, keys, preferred_element_type=jnp.float32
    )
    places = jnp.arange(keys.shape[1])[None, None]
    seen = places <= layout.positions[..., None]
    if layout.window is not None:
        seen &= layout.positions[..., None] - places < layout.window
    scores = capped(scores, softcap)
    scores = jnp.where(seen[:, :, None, None], scores, _LOW)
    lse = jax.nn.logsumexp(scores, axis=-1)
    weights = jnp.exp(scores - lse[..., None]).astype(values.dtype)
    out = jnp.einsum("btgms,bsgh->btgmh", weights, values)
    shape = (rows, length, heads)
    return out.reshape(*shape, width), lse.reshape(shape)


def _visible(
    layout: RowLayout, queries: tuple[Any, int], keys: tuple[Any, int]
) -> Array:
    """Return the mask [b, 1, 1, queries, keys] of a block, from (begin, size) pairs."""

    def cut(ids: Array, piece: tuple[Any, int]) -> Array:
        return jax.lax.dynamic_slice_in_dim(ids, piece[0], piece[1], axis=1)

    q_seq, k_seq = cut(layout.sequence_ids, queries), cut(layout.sequence_ids, keys)
    q_branch, k_branch = cut(layout.branch_ids, queries), cut(layout.branch_ids, keys)
    q_index = queries[0] + jnp.arange(queries[1])
    k_index = keys[0] + jnp.arange(keys[1])
    same = (q_seq[:, :, None] == k_seq[:, None, :]) & (k_seq[:, None, :] > 0)
    branch = k_branch[:, None, :]
    mine = (branch == 0) | (branch == q_branch[:, :, None])
    causal = k_index[None, :] <= q_index[:, None]
    seen = same & mine & causal[None]
    if layout.window is not None:
        q_position = cut(layout.positions, queries)[:, :, None]
        seen &= q_position - cut(layout.positions, keys)[:, None] < layout.window
    return seen[:, None, None]


def capped(scores: Array, softcap: float | None) -> Array:
    """Return ``softcap * tanh(scores / softcap)``, or the scores if there is no cap."""
    return scores if softcap is None else softcap * jnp.tanh(scores / softcap)


def _dense(
    q: Array,
    k: Array,
    v: Array,
    layout: RowLayout,
    scale: float,
    softcap: float | None,
) -> tuple[Array, Array]:
    rows, length, heads, width = q.shape
    groups = k.shape[2]
    q = q.reshape(rows, length, groups, heads // groups, width)
    scores = jnp.einsum(
        "bqgmh,bkgh->bgmqk", q * scale, k, preferred_element_type=jnp.float32
    )
    scores = capped(scores, softcap)
    mask = _visible(layout, (0, length), (0, length))
    weights = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), axis=-1, where=mask)
    weights = jnp.where(mask, weights, 0.0)
    out = jnp.einsum("bgmqk,bkgh->bqgmh", weights.astype(v.dtype), v)
    seen = mask.any(-1)
    safe = jnp.where(mask, scores, jnp.where(seen[..., None], _LOW, 0.0))
    lse = jnp.where(seen, jax.nn.logsumexp(safe, axis=-1), 0.0)
    lse = jnp.moveaxis(lse, 3, 1).reshape(rows, length, heads)
    return out.reshape(rows, length, heads, width), lse


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
    needed = i + 1 - starts.min() // block
    choice = jnp.searchsorted(jnp.asarray(sizes), needed)

    def branch(size: int) -> Callable[..., Any]:
        # Near the row's beginning a stretch may reach beyond the queries; the mask
        # hides what is later than they are.
        return lambda *xs: run(*xs, jnp.maximum(i + 1 - size, 0) * block, size * block)

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
            mask = _visible(layout, (i * block, block), (begin, size))
            scores = capped(_scores(q_block, _slice(k, begin, size)), softcap)
            scores = jnp.where(mask, scores, _LOW)
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


_LOW = -1e30
"""Stands for minus infinity where a difference of two must not be NaN."""


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
            mask = _visible(layout, (i * block, block), (begin, size))
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
