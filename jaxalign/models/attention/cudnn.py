"""Attention on GPUs, by cuDNN's fused kernels.

cuDNN takes rows that are cut into segments, each causal in itself (a packed layout; a
Hopper GPU or a later one). A prompt with its first response is such a segment. A second
response is none, for between it and its prompt stands the first: so it gets a copy of
its prompt, in a row that is twice as long. Only attention sees the copies, so the rest
of the model computes a prompt once all the same, and no two results must be joined: the
kernels give no derivative for a log-sum-exp. What lies between segments costs nothing
and is never read: what the kernels leave there may be anything.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxalign.models.attention import mask
from jaxalign.models.attention.mask import RowLayout


__all__ = ["Segments", "attend", "segments"]


class Segments(NamedTuple):
    """Rows of doubled length, as segments."""

    source: Int[Array, "b 2*t"]
    """Which token of the row stands at each place."""
    used: Bool[Array, "b 2*t"]
    place: Int[Array, "b t"]
    """Where each token's result is found."""
    offsets: Int[Array, "b m+1"]
    """Where each segment begins; -1 behind the last one."""
    lengths: Int[Array, "b m"]
    fits: Bool[Array, " b"]
    """Whether the row has no more segments than m, and no third branch."""


def attend(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b t g h"],
    v: Float[Array, "b t g h"],
    layout: RowLayout,
    *,
    scale: float,
    sequences: int,
) -> tuple[Float[Array, "b t n h"], Float[Array, "b t n"]]:
    """Return attention, see ``models.attention.attention``; NaN for the log-sum-exp.

    A row with more than ``sequences`` sequences, or with a third branch, comes out as
    NaN.

    Args:
      q: queries, in bfloat16 or float16.
      k: keys.
      v: values.
      layout: who sees whom, without a window.
      scale: of the scores.
      sequences: most of them in a row.
    """
    # Every sequence is up to two segments; one alone would not be the packed layout.
    cut = segments(layout, 2 * sequences)
    used = cut.used[..., None, None]

    def spread(x: Array) -> Array:
        x = jnp.take_along_axis(x, cut.source[..., None, None], axis=1)
        # Also keeps the derivative's unwritten places away from the tokens.
        return jnp.where(used, x, 0)

    # As many heads as queries have: jax 0.10 computes the offsets of fewer ones wrongly
    # (0.11 does not).
    repeats = q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(x, repeats, axis=2) for x in (k, v))
    out = _kernel(spread(q), spread(k), spread(v), cut.lengths, cut.offsets, scale)
    out = jnp.take_along_axis(out, cut.place[..., None, None], axis=1)
    real = (layout.sequence_ids > 0)[..., None, None]
    out = jnp.where(real, out, 0)
    out = jnp.where(cut.fits[:, None, None, None], out, jnp.nan)
    return out, jnp.full(q.shape[:3], jnp.nan, jnp.float32)


def segments(layout: RowLayout, most: int) -> Segments:
    """Return rows in which every second response follows a copy of its prompt.

    The first half of a row is the row itself, in which second responses are unused; a
    copy of a prompt and its second response begin in the second half where their
    sequence does in the first.

    Args:
      layout: who sees whom.
      most: segments of a row.
    """
    found = mask.pieces(layout)
    real = layout.sequence_ids > 0
    rows, length = real.shape
    index = jnp.broadcast_to(jnp.arange(length), real.shape)
    last = mask.run_ends(layout.sequence_ids)

    def at_end(x: Array) -> Array:
        return jnp.take_along_axis(x, last, axis=1)

    second, prompt_end = at_end(found.piece), at_end(found.prompt_end)
    prompt = prompt_end - found.start
    offset = index - found.start
    copied = real & at_end(found.behind) & (offset < prompt + last + 1 - second)
    source = jnp.where(offset < prompt, index, second + offset - prompt)
    trunk = real & ~found.behind
    used = jnp.concatenate([trunk, copied], axis=1)
    behind = length + prompt_end + index - found.piece
    new = [index == found.piece, index == found.start]
    begins = used & jnp.concatenate(new, axis=1)
    # A segment ends where the next place is unused or another segment's first.
    goes_on = jnp.pad((used & ~begins)[:, 1:], [(0, 0), (0, 1)])
    first, final = (_indices(x, most) for x in (begins, used & ~goes_on))
    fits = (begins.sum(axis=1) <= most) & (layout.branch_ids.max(axis=1) <= 2)
    return Segments(
        source=jnp.concatenate([index, jnp.where(copied, source, 0)], axis=1),
        used=used,
        place=jnp.where(found.behind, behind, index),
        offsets=jnp.pad(first, [(0, 0), (0, 1)], constant_values=-1),
        lengths=jnp.where(first < 0, -1, final - first + 1),
        fits=fits,
    )


def _indices(marked: Array, most: int) -> Array:
    """Return the indices of each row's first marked places, then -1."""

    def row(marked: Array) -> Array:
        return jnp.nonzero(marked, size=most, fill_value=-1)[0].astype(jnp.int32)

    return jax.vmap(row)(marked)


def _kernel(
    q: Array, k: Array, v: Array, lengths: Array, offsets: Array, scale: float
) -> Any:
    # jax.nn.dot_product_attention knows no segments; this is what it calls.
    from jax._src.cudnn.fused_attention_stablehlo import (
        MaskType,
        dot_product_attention,
    )

    return dot_product_attention(
        q,
        k,
        v,
        q_seqlen=lengths,
        kv_seqlen=lengths,
        q_offsets=offsets,
        kv_offsets=offsets,
        scale=scale,
        mask_type=MaskType.PADDING_CAUSAL,
    )
