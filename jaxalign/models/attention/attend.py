"""Attention over packed rows with shared prompts.

One entry point, :func:`attention`, over the kernels beside this file. A query at
index q sees a key at index j if and only if ``j <= q``, both are of the same non-zero
sequence, and the key's branch is the prompt (0) or the query's own. In a vision tower a
patch sees all of its image, ``mask.both_ways``.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from jaxalign import products
from jaxalign.models.attention import cudnn, splash, xla
from jaxalign.models.attention.choice import Implementation
from jaxalign.models.attention.mask import LOW, RowLayout, capped, visible
from jaxalign.models.attention.xla import SAVED_NAMES
from jaxalign.parallel.mesh import BATCH_AXES


__all__ = ["SAVED_NAMES", "attention"]

_Attend = Callable[[Array, Array, Array, RowLayout], tuple[Array, Array]]


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
    mesh: Mesh | None = None,
    sequences: int | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "b t n h"], Float[Array, "b t n"]]:
    """Return softmax(scale q k^T) v under the mask of packed rows; 0 for padding.

    And the log-sum-exp of the scores that each query sees, by which attention over
    further keys can be joined exactly; 0 for padding too. ``cudnn`` has none: NaN.

    Args:
      q: queries; ``n`` heads, a multiple of the ``g`` heads of keys and values.
      k: keys, rotated.
      v: values.
      layout: who sees whom.
      scale: of the scores, usually 1/sqrt(h).
      softcap: scores s become ``softcap * tanh(s / softcap)``.
      implementation: ``xla`` works in blocks of queries, forward and backward, holds no
        [t, t] array and leaves out keys that no query of the block can see; ``cudnn``
        and ``splash`` are kernels for GPUs and TPUs; ``dense`` is the plain formula,
        for comparison.
      block: queries of a block of ``xla``.
      mesh: of several devices, over which ``cudnn`` and ``splash`` split rows (data,
        fsdp) and heads (tensor) themselves; the compiler does for the others.
      sequences: most sequences of a row, which ``cudnn`` needs.
      interpret: run ``splash`` on any platform, step by step, for tests.
    Raises:
      ValueError: ``cudnn`` is asked for what it cannot do; ``attention.choice`` refuses
        that earlier, in words for users.
    """
    if implementation == "dense":
        return _dense(q, k, v, layout, scale, softcap)
    if implementation == "xla":
        return xla.attend(q, k, v, layout, scale=scale, softcap=softcap, block=block)
    if implementation == "splash":
        attend: _Attend = functools.partial(
            splash.attend, scale=scale, softcap=softcap, interpret=interpret
        )
    elif sequences is None or softcap is not None or layout.window is not None:
        raise ValueError("cudnn needs `sequences`, and has no window and no softcap")
    elif layout.ends is not None:
        raise ValueError("cudnn runs what is causal")
    else:
        attend = functools.partial(cudnn.attend, scale=scale, sequences=sequences)
    if mesh is None or mesh.size == 1:
        return attend(q, k, v, layout)
    return _split(attend, mesh)(q, k, v, layout)


def _split(attend: _Attend, mesh: Mesh) -> _Attend:
    """Run a kernel on each device's rows and heads; a compiler cannot split it."""
    rows, heads = P(BATCH_AXES), P(BATCH_AXES, None, "tensor")

    def run(q: Array, k: Array, v: Array, layout: RowLayout) -> tuple[Array, Array]:
        # Where there are fewer heads of keys than devices, several devices need one.
        tensor = mesh.shape["tensor"]
        repeats = tensor // math.gcd(k.shape[2], tensor)
        k, v = (jnp.repeat(x, repeats, axis=2) for x in (k, v))
        whole = jax.tree.map(lambda _: P(), layout)
        where = whole._replace(sequence_ids=rows, branch_ids=rows, positions=rows)
        return jax.shard_map(
            attend,
            mesh=mesh,
            in_specs=(heads, heads, heads, where),
            out_specs=(heads, heads),
            check_vma=False,
        )(q, k, v, layout)

    return run


def _dense(
    q: Array,
    k: Array,
    v: Array,
    layout: RowLayout,
    scale: float,
    softcap: float | None,
) -> tuple[Array, Array]:
    rows, length, heads, width = q.shape
    groups, dtype = k.shape[2], q.dtype
    q = q.reshape(rows, length, groups, heads // groups, width)
    scores = products.einsum("bqgmh,bkgh->bgmqk", q * scale, k)
    scores = capped(scores, softcap)
    mask = visible(layout, (0, length), (0, length))
    weights = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), axis=-1, where=mask)
    weights = jnp.where(mask, weights, 0.0)
    out = products.einsum("bgmqk,bkgh->bqgmh", weights.astype(v.dtype), v)
    seen = mask.any(-1)
    safe = jnp.where(mask, scores, jnp.where(seen[..., None], LOW, 0.0))
    lse = jnp.where(seen, jax.nn.logsumexp(safe, axis=-1), 0.0)
    lse = jnp.moveaxis(lse, 3, 1).reshape(rows, length, heads)
    return out.reshape(rows, length, heads, width).astype(dtype), lse
