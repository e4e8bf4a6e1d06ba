"""Attention on TPUs, by JAX's splash kernels.

Their mask is a function of a number that each query brings and of the key's index. The
number holds two, the ends of a stretch of keys: that says everything about causality,
packing and sliding windows at once. What a query sees of packed rows with shared
prompts is two stretches, of its own piece and of its prompt (see ``mask.pieces``),
so there are two calls, whose results are joined by their log-sum-exps. Blocks in which
nobody sees anything are not computed: which ones these are is found as the program
runs, so short pairs in long rows cost little.

The backward kernels take the log-sum-exp from outside: they get that of both stretches,
which makes the derivatives exact, that of the log-sum-exp itself included
(https://arxiv.org/abs/2205.14135, appendix B).
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from jaxalign.models.attention import mask
from jaxalign.models.attention.mask import LOW, RowLayout
from jaxalign.models.attention.xla import SAVED_NAMES


__all__ = ["LONGEST", "attend"]

LONGEST = 2**15
"""Most places of a row: two indices must fit into one number."""

_BITS = 16
_BLOCKS = (512, 256, 128)
_MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)


class Options(NamedTuple):
    """What the kernels are compiled for."""

    block: int
    softcap: float | None
    interpret: bool


def attend(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b t g h"],
    v: Float[Array, "b t g h"],
    layout: RowLayout,
    *,
    scale: float,
    softcap: float | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "b t n h"], Float[Array, "b t n"]]:
    """Return attention and its log-sum-exp, see ``models.attention.attention``.

    Args:
      q: queries.
      k: keys.
      v: values.
      layout: who sees whom.
      scale: of the scores.
      softcap: of the scores.
      interpret: run the kernels step by step on any platform, for tests.
    Raises:
      ValueError: rows of more than ``LONGEST`` places.
    """
    length = q.shape[1]
    extra = -length % 128
    block = next(size for size in _BLOCKS if (length + extra) % size == 0)
    if length + extra > LONGEST:
        raise ValueError(f"splash takes rows of at most {LONGEST} places: got {length}")

    def heads_first(x: Array) -> Array:
        x = jnp.pad(x, [(0, 0), (0, extra), (0, 0), (0, 0)])
        return x.transpose(0, 2, 1, 3)

    numbers = jax.tree.map(
        lambda x: jnp.pad(x, [(0, 0), (0, extra)], constant_values=_NOTHING),
        stretches(layout),
    )
    found: Any = _attend(
        heads_first(q * scale),
        heads_first(k),
        heads_first(v),
        numbers,
        Options(block, softcap, interpret),
    )
    out, lse = found
    return out.transpose(0, 2, 1, 3)[:, :length], lse.transpose(0, 2, 1)[:, :length]


_NOTHING = 1  # keys from 1 to 0


def _number(first: Array, last: Array) -> Array:
    return jnp.where(first <= last, (last << _BITS) | first, _NOTHING).astype(jnp.int32)


def _sees(number: Any, key: Any) -> Any:
    """Return whether a query with this number sees the key at an index."""
    return (key >= (number & (2**_BITS - 1))) & (key <= (number >> _BITS))


def stretches(layout: RowLayout) -> tuple[Int[Array, "b t"], Int[Array, "b t"]]:
    """Return, as numbers, the keys that each query sees in its own piece and prompt."""
    found = mask.pieces(layout)
    index = jnp.broadcast_to(jnp.arange(found.start.shape[1]), found.start.shape)
    real = layout.sequence_ids > 0
    own, prompt = found.piece, found.start
    if layout.ends is not None:
        last = jnp.where(real, mask.run_ends(layout.sequence_ids), -1)
        return _number(found.start, last), jnp.full_like(index, _NOTHING)
    if layout.window is not None:
        # Positions count up by one within a piece, so there they differ as places do.
        positions = layout.positions
        at_start = jnp.take_along_axis(positions, found.start, axis=1)
        own = jnp.maximum(own, index - layout.window + 1)
        prompt = jnp.maximum(
            prompt, found.start + positions - at_start - layout.window + 1
        )
    nothing = jnp.full_like(index, -1)
    return (
        _number(own, jnp.where(real, index, nothing)),
        _number(prompt, jnp.where(found.behind, found.prompt_end - 1, nothing)),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(
    q: Array, k: Array, v: Array, numbers: tuple[Array, Array], options: Options
) -> tuple[Array, Array]:
    return _forward(q, k, v, numbers, options)


def _forward(
    q: Array, k: Array, v: Array, numbers: tuple[Array, Array], options: Options
) -> tuple[Array, Array]:
    def call(*args: Any) -> tuple[Array, Array]:
        q, k, v, number = args
        out, (lse,) = _kernels()._splash_attention_forward(
            _mask_info(number, options.block),
            q,
            k,
            v,
            None,
            None,
            mask_value=_MASKED,
            is_mqa=False,
            block_sizes=_kernels().BlockSizes(options.block, options.block),
            residual_checkpoint_name=None,
            save_residuals=True,
            mask_function=_sees,
            attn_logits_soft_cap=options.softcap,
            interpret=options.interpret,
        )
        # What sees nothing comes out as anything.
        seen = number != _NOTHING
        out = jnp.where(seen[None, :, None], out.astype(jnp.float32), 0.0)
        return out, jnp.where(seen[None], lse, LOW)

    def nothing(*args: Any) -> tuple[Array, Array]:
        q, *_ = args
        return jnp.zeros(q.shape, jnp.float32), jnp.full(q.shape[:2], LOW)

    def row(args: Any) -> tuple[Array, Array]:
        *tensors, own, prompt = args
        out, lse = call(*tensors, own)
        shared = (prompt != _NOTHING).any()
        other, other_lse = jax.lax.cond(shared, call, nothing, *tensors, prompt)
        both = jnp.logaddexp(lse, other_lse)
        out = out * jnp.exp(lse - both)[..., None]
        out = out + other * jnp.exp(other_lse - both)[..., None]
        return out.astype(q.dtype), jnp.where(own[None] != _NOTHING, both, 0.0)

    # Row by row: which blocks are computed differs from row to row.
    return jax.lax.map(row, (q, k, v, *numbers))


def _attend_fwd(
    q: Array, k: Array, v: Array, numbers: tuple[Array, Array], options: Options
) -> tuple[tuple[Array, Array], Any]:
    out, lse = _forward(q, k, v, numbers, options)
    out = checkpoint_name(out, SAVED_NAMES[0])
    lse = checkpoint_name(lse, SAVED_NAMES[1])
    return (out, lse), (q, k, v, numbers, out, lse)


def _attend_bwd(
    options: Options, residuals: Any, grads: tuple[Array, Array]
) -> tuple[Any, ...]:
    q, k, v, numbers, out, lse = residuals
    grad, d_lse = grads
    # As in ``blocks``: what the softmax's derivative subtracts, less the log-sum-exp's.
    inner = (grad.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1) - d_lse
    block = options.block

    def call(*args: Any) -> tuple[Array, Array, Array]:
        q, k, v, lse, grad, inner, number = args
        kernels, head_minor = _kernels(), _kernels().QKVLayout.HEAD_DIM_MINOR
        shared: dict[str, Any] = {
            "is_mqa": False,
            "mask_value": _MASKED,
            "attn_logits_soft_cap": options.softcap,
            "q_layout": head_minor,
            "k_layout": head_minor,
            "v_layout": head_minor,
            "mask_function": _sees,
            "interpret": options.interpret,
            "bq": block,
            "bkv": block,
        }
        given = (q, k, v, None, None, lse, grad, inner)
        d_q = kernels._splash_attention_bwd_dq(
            *given, mask_info=_mask_info(number, block), **shared
        )
        _, d_k, d_v = kernels._splash_attention_bwd_dkv(
            *given,
            mask_info=_mask_info(number, block, by_key=True),
            bkv_compute=block,
            use_fused_bwd_kernel=False,
            **shared,
        )
        return d_q, d_k, d_v

    def nothing(*args: Any) -> tuple[Array, Array, Array]:
        q, k, v, *_ = args
        return jnp.zeros_like(q), jnp.zeros_like(k), jnp.zeros_like(v)

    def row(args: Any) -> tuple[Array, ...]:
        *given, own, prompt = args
        first = call(*given, own)
        shared = (prompt != _NOTHING).any()
        second = jax.lax.cond(shared, call, nothing, *given, prompt)
        return tuple(a + b for a, b in zip(first, second, strict=True))

    d_q, d_k, d_v = jax.lax.map(row, (q, k, v, lse, grad, inner, *numbers))
    return d_q, d_k, d_v, None


_attend.defvjp(_attend_fwd, _attend_bwd)


def _mask_info(number: Array, block: int, by_key: bool = False) -> Any:
    """Return which blocks to compute, [query blocks, key blocks], and what to fetch.

    Args:
      number: of each query.
      block: queries, and keys, of a block.
      by_key: go through the queries of each block of keys, not the other way round.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_mask_info as mask_info,
    )

    blocks = number.shape[0] // block
    begin = jnp.arange(blocks)[None] * block
    first, last = number & (2**_BITS - 1), number >> _BITS
    seen = (first[:, None] < begin + block) & (last[:, None] >= begin)
    seen &= (first <= last)[:, None]
    seen = seen.reshape(blocks, block, blocks).any(axis=1)
    # A step without work names the block that is needed next, so that it is there.
    axis = 0 if by_key else 1
    index = jnp.arange(blocks)[:, None] if by_key else jnp.arange(blocks)[None]
    index = jnp.where(seen, index, blocks - 1)
    following = jax.lax.cummin(index, axis=axis, reverse=True)
    return mask_info.MaskInfo(
        data_next=following[None].astype(jnp.int32),
        mask_next=None,
        block_mask=seen[None].astype(jnp.int32),
        partial_mask_blocks=None,
        q_sequence=number,  # pyright: ignore[reportArgumentType]
    )


def _kernels() -> Any:
    # Imported late: it takes a while, and only TPUs need it.
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel,
    )

    return splash_attention_kernel
