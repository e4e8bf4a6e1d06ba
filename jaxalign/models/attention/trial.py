"""A kernel tried out on the device of a run, before anything is loaded."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxalign.errors import UserError
from jaxalign.models.attention.attend import attention
from jaxalign.models.attention.choice import (
    AttentionOption,
    Implementation,
    KernelChoice,
    Work,
    choose,
    machine_of,
)
from jaxalign.models.attention.mask import RowLayout, row_layout
from jaxalign.types import ModelInputs


__all__ = ["choose_tried", "try_out"]

_TOLERANCE = 0.03
"""Of the largest value: a few roundings in bfloat16."""


def choose_tried(
    option: AttentionOption, work: Work, mesh: Mesh, *, softcap: float | None = None
) -> KernelChoice:
    """Return the kernel for some work. A fused one is tried out first.

    Args:
      option: what was asked for.
      work: what attention has to do.
      mesh: devices.
      softcap: of the scores.
    Raises:
      UserError: the kernel that is asked for cannot run, or is wrong on this device.
        With ``auto`` that is said in the reason for ``xla``.
    """
    chosen = choose(option, machine_of(mesh.devices.flat[0]), work)
    if chosen.implementation not in ("cudnn", "splash"):
        return chosen
    try:
        error = try_out(chosen.implementation, mesh.local_devices[0], work, softcap)
    except UserError as failure:
        if option != "auto":
            raise
        return KernelChoice("xla", f"{chosen.reason}; {failure}")
    reason = f"{chosen.reason}; within {error:.1%} of the plain formula on a trial"
    return chosen._replace(reason=reason)


def try_out(
    name: Implementation,
    device: Any,
    work: Work,
    softcap: float | None = None,
    **options: Any,
) -> float:
    """Compare a kernel with the plain formula, on the device where it will run.

    A small batch: two pairs with shared prompts and padding, the run's heads and dtype;
    outputs and gradients.

    Args:
      name: the kernel.
      device: where.
      work: what it has to do in the run.
      softcap: of the scores.
      **options: more of ``attention``'s.
    Returns:
      The largest difference, in parts of the largest value.
    Raises:
      UserError: it is more than rounding explains.
    """
    (q, k, v, weights), layout = _batch(device, work)

    def results(name: Implementation, **options: Any) -> tuple[jax.Array, ...]:
        def total(q: Any, k: Any, v: Any) -> tuple[jax.Array, jax.Array]:
            out, _ = attention(
                q,
                k,
                v,
                layout,
                scale=work.head_dim**-0.5,
                softcap=softcap,
                implementation=name,
                **options,
            )
            return (out * weights).astype(jnp.float32).sum(), out

        graded = jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))
        (_, out), grads = graded(q, k, v)
        return out, *grads

    try:
        got = jax.block_until_ready(results(name, sequences=2, **options))
    except (ValueError, RuntimeError) as error:
        # NotImplementedError and the compiler's errors are RuntimeErrors.
        raise UserError(
            f"attention {name} fails on {device.device_kind}: {error}. Use --attention "
            "xla, and report it with what `jaxalign env` prints"
        ) from error
    with jax.default_matmul_precision("highest"):
        wanted = results("dense")
    worst = 0.0
    for a, b in zip(got, wanted, strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        # NaN counts as wrong.
        error = np.nan_to_num(np.abs(a - b), nan=np.inf).max() / np.abs(b).max()
        worst = max(worst, float(error))
    if worst > _TOLERANCE:
        raise UserError(
            f"attention {name} is wrong on {device.device_kind}: on a small trial it "
            f"differs from the plain formula by {worst:.3g} of the largest value, "
            f"expected at most {_TOLERANCE}. Use --attention xla, and report it with "
            "what `jaxalign env` prints"
        )
    return worst


def _batch(device: Any, work: Work) -> tuple[list[jax.Array], RowLayout]:
    """Return queries, keys, values and weights of the outputs, and who sees whom."""
    lengths = [(50, 30, 40), (20, 60, 30)]
    pieces = [p for pair in lengths for p in enumerate(pair)]
    pad = 26
    branches = np.repeat([b for b, _ in pieces] + [0], [n for _, n in pieces] + [pad])
    ids = np.repeat([1, 2, 0], [*map(sum, lengths), pad])
    places = [
        np.arange(n) + (pair[0] if branch else 0)
        for pair in lengths
        for branch, n in enumerate(pair)
    ]
    positions = np.concatenate([*places, np.zeros(pad, int)])
    rng = np.random.default_rng(0)

    def normal(heads: int) -> jax.Array:
        values = rng.normal(size=(1, len(ids), heads, work.head_dim))
        return jax.device_put(jnp.asarray(values, work.dtype), device)

    arrays = [normal(n) for n in (work.heads, work.kv_heads, work.kv_heads, work.heads)]
    row = [jax.device_put(x.astype(np.int32)[None], device) for x in (ids, branches)]
    place = jax.device_put(positions.astype(np.int32)[None], device)
    layout = row_layout(ModelInputs(row[0], place, *row))
    if work.windows:
        layout = layout._replace(window=jax.device_put(jnp.int32(25), device))
    return arrays, layout
