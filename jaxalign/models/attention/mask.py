"""Who may see whom in attention.

A query at index q sees a key at index j if and only if ``j <= q``, both are of the same
non-zero sequence, and the key's branch is the prompt (0) or the query's own.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jaxalign.types import ModelInputs


__all__ = [
    "LOW",
    "CacheLayout",
    "Pieces",
    "RowLayout",
    "attention_mask",
    "both_ways",
    "capped",
    "lengths",
    "pieces",
    "row_layout",
    "run_ends",
    "visible",
]


LOW = -1e30
"""Stands for minus infinity where a difference of two must not be NaN."""


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
    ends: Int[Array, " t"] | None = None
    """Where tokens see later ones too: for each index the first one behind all that any
    row's token there can see."""


class CacheLayout(NamedTuple):
    """Where new tokens stand that are decoded against a cache of earlier ones."""

    positions: Int[Array, "b t"]
    """From 0, one after the other in each row; they are places in the cache too."""
    valid: Bool[Array, "b t"]
    """False for tokens that only fill up the array: they leave no trace."""
    window: Int[Array, ""] | None = None
    """As in :class:`RowLayout`."""
    lengths: Int[Array, " b"] | None = None
    """How long each text is that is read in pieces; None if the new tokens end it."""


def row_layout(inputs: ModelInputs) -> RowLayout:
    """Return the layout of packed rows."""
    ids = inputs.sequence_ids
    index, start = jnp.arange(ids.shape[1]), _run_starts(ids)
    # Padding sees nothing, so it asks for no key.
    start = jnp.where(ids > 0, start, index)
    positions = inputs.positions
    if positions.ndim > 2:  # the last of time, row and column
        positions = positions.max(axis=-1)
    return RowLayout(ids, inputs.branch_ids, start.min(axis=0), positions)


def both_ways(ids: Int[Array, "b t"]) -> RowLayout:
    """Return the layout of rows whose tokens see all with the same non-zero number.

    Each number's tokens are one stretch of the row, as an image's patches are.
    """
    index = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    real = ids > 0
    start = jnp.where(real, _run_starts(ids), index)
    end = jnp.where(real, run_ends(ids) + 1, index)
    return RowLayout(
        ids, jnp.zeros_like(ids), start.min(axis=0), index, ends=end.max(axis=0)
    )


def attention_mask(
    inputs: ModelInputs, *, window: int | None = None
) -> Bool[Array, "b 1 t t"]:
    """Return which keys (last axis) each query of packed rows sees, for any model.

    True where ``j <= q``, both are of the same sequence, and the key's branch is the
    prompt (0) or the query's own; with a window also ``position_q - position_j <
    window``. A place of padding sees itself, so that no softmax is over nothing. The
    second axis is that of heads, as ``flax.linen`` and ``flax.nnx`` attention take
    ``mask``; positions for rotary or learnt embeddings are ``inputs.positions``.

    Args:
      inputs: packed rows.
      window: how far back a query sees, in positions, itself included.
    Example:
      >>> ids = jnp.array([[1, 1, 1, 0]])
      >>> branches = jnp.array([[0, 1, 2, 0]])
      >>> rows = ModelInputs(ids, jnp.array([[0, 1, 1, 0]]), ids, branches)
      >>> attention_mask(rows)[0, 0].astype(int).tolist()
      [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 1]]
    """
    layout = row_layout(inputs)
    if window is not None:
        layout = layout._replace(window=jnp.asarray(window))
    whole = (0, inputs.tokens.shape[1])
    seen = visible(layout, whole, whole)[:, :, 0]
    return seen | jnp.eye(whole[1], dtype=bool)[None, None]


class Pieces(NamedTuple):
    """Where in its row each token's sequence, prompt and own piece begin.

    A piece is a stretch that is causal in itself: a prompt with the first branch, or
    any further branch, which sees the prompt too. Padding has empty ones.
    """

    start: Int[Array, "b t"]
    """First index of the token's sequence."""
    prompt_end: Int[Array, "b t"]
    """Index behind the sequence's prompt, as far as it lies before the token."""
    piece: Int[Array, "b t"]
    """First index of the token's own piece."""
    behind: Bool[Array, "b t"]
    """Whether the token is of a further branch, whose prompt is another piece."""


def pieces(layout: RowLayout) -> Pieces:
    """Return the pieces of rows in which every sequence is one stretch.

    It holds its prompt first and then branches 1, 2, ..., each of them one stretch, as
    ``data.packing`` lays rows out.
    """
    ids, branches = layout.sequence_ids, layout.branch_ids
    index = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    start = _run_starts(ids)
    piece = jnp.maximum(start, _run_starts(jnp.maximum(branches, 1)))
    in_prompt = (branches == 0) & (ids > 0)
    prompt_end = jax.lax.cummax(jnp.where(in_prompt, index + 1, 0), axis=1)
    return Pieces(
        start, jnp.maximum(prompt_end, start), piece, (branches > 1) & (ids > 0)
    )


def _run_starts(ids: Array) -> Array:
    """Return for each index the first one of its run of equal numbers."""
    index = jnp.arange(ids.shape[1])
    new = jnp.concatenate(
        [jnp.ones_like(ids[:, :1], bool), ids[:, 1:] != ids[:, :-1]], axis=1
    )
    return jax.lax.cummax(jnp.where(new, index, 0), axis=1)


def run_ends(ids: Array) -> Array:
    """Return for each index the last one of its run of equal numbers."""
    ends = jnp.pad(ids[:, 1:] != ids[:, :-1], [(0, 0), (0, 1)], constant_values=True)
    index = jnp.where(ends, jnp.arange(ids.shape[1]), ids.shape[1])
    return jax.lax.cummin(index, axis=1, reverse=True)


def lengths(layout: RowLayout | CacheLayout) -> Int[Array, "b t"]:
    """Return for each token how long the sequence is that it stands in.

    Against a cache, how long it is so far.
    """
    positions = layout.positions
    if isinstance(layout, CacheLayout):
        if layout.lengths is not None:
            return jnp.broadcast_to(layout.lengths[:, None], positions.shape)
        longest = jnp.where(layout.valid, positions, 0).max(axis=1, keepdims=True)
        return jnp.broadcast_to(longest + 1, positions.shape)
    rows = jnp.arange(positions.shape[0])[:, None]
    ids = layout.sequence_ids
    most = jnp.zeros((positions.shape[0], positions.shape[1] + 1), positions.dtype)
    return most.at[rows, ids].max(positions + 1)[rows, ids]


def visible(
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
    seen = same & mine
    if layout.ends is None:
        seen &= (k_index[None, :] <= q_index[:, None])[None]
    if layout.window is not None:
        q_position = cut(layout.positions, queries)[:, :, None]
        seen &= q_position - cut(layout.positions, keys)[:, None] < layout.window
    return seen[:, None, None]


def capped(scores: Array, softcap: float | None) -> Array:
    """Return ``softcap * tanh(scores / softcap)``, or the scores if there is no cap."""
    return scores if softcap is None else softcap * jnp.tanh(scores / softcap)
