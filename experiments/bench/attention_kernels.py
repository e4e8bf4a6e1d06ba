"""Attention kernels on this machine: parity and speed.

    python experiments/bench/attention_kernels.py --out attention_kernels.md

One row of 2k, 8k and 32k tokens, 32 heads of 128 with 8 of keys, bfloat16: as one
sequence, and as packed pairs of 1024 tokens with shared prompts. The error is the
largest difference of outputs and gradients from ``xla`` in float32, in parts of the
largest value; times are medians. Kernels that this machine lacks are left out, by name.
No table of a GPU or TPU is kept beside this file yet: nobody has run it on one. On a
CPU try it with ``--lengths 256,512 --heads 4 --kv_heads 2 --head_dim 16``.
"""

import argparse
import functools
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.errors import UserError
from jaxalign.models import attention
from jaxalign.models.attention import choice
from jaxalign.types import ModelInputs


KERNELS = ("xla", "cudnn", "splash")


def row(length: int, packed: bool, pair: int = 1024) -> tuple[Any, int]:
    """Return the layout of one row, and the sequences in it.

    A packed pair is half prompt, a quarter chosen and a quarter rejected.
    """
    pair = min(pair, length // 2)
    pieces = [(pair // 2, pair // 4, pair // 4)] * (length // pair)
    if not packed:
        pieces = [(length,)]
    ids, branches, positions = np.zeros((3, 1, length), np.int32)
    at = 0
    for sequence, sizes in enumerate(pieces, 1):
        for branch, size in enumerate(sizes):
            place = slice(at, at + size)
            ids[0, place], branches[0, place] = sequence, branch
            positions[0, place] = np.arange(size) + sizes[0] * (branch > 0)
            at += size
    inputs = ModelInputs(*map(jnp.asarray, (ids, positions, ids, branches)))
    return attention.row_layout(inputs), len(pieces)


def median_ms(run: Any, repeats: int) -> float:
    """Return the median time of a call that was compiled before."""
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - began)
    return 1000 * statistics.median(times)


def functions(name: Any, layout: Any, sequences: int, weights: Any) -> tuple[Any, Any]:
    """Return compiled forward, and gradients with the output."""
    attend = functools.partial(
        attention.attention,
        layout=layout,
        scale=weights.shape[-1] ** -0.5,
        implementation=name,
        sequences=sequences,
    )

    def total(q: Any, k: Any, v: Any) -> tuple[Any, Any]:
        out = attend(q, k, v)[0]
        return (out * weights.astype(out.dtype)).astype(jnp.float32).sum(), out

    forward = jax.jit(lambda q, k, v: attend(q, k, v)[0])
    return forward, jax.jit(jax.grad(total, (0, 1, 2), has_aux=True))


def measure(args: argparse.Namespace, length: int, packed: bool) -> list[list[str]]:
    """Return the lines of one length."""
    layout, sequences = row(length, packed)
    rng = np.random.default_rng(0)
    q, k, v, weights = (
        jnp.asarray(rng.normal(size=(1, length, n, args.head_dim)), args.dtype)
        for n in (args.heads, args.kv_heads, args.kv_heads, args.heads)
    )
    machine = choice.machine_of(jax.devices()[0])
    work = choice.Work(
        dtype=args.dtype,
        heads=args.heads,
        kv_heads=args.kv_heads,
        head_dim=args.head_dim,
        rows=1,
        row_length=length,
    )
    with jax.default_matmul_precision("highest"):
        _, graded = functions("xla", layout, sequences, weights)
        wide = [x.astype(jnp.float32) for x in (q, k, v)]
        wanted = jax.device_get(jax.tree.leaves(graded(*wide)))
    lines = []
    for name in KERNELS:
        try:
            choice.choose(name, machine, work)
        except UserError as error:
            print(error)
            continue
        forward, graded = functions(name, layout, sequences, weights)
        got = jax.device_get(jax.tree.leaves(graded(q, k, v)))
        error = max(
            float(np.abs(a.astype(np.float32) - b).max() / np.abs(b).max())
            for a, b in zip(got, wanted, strict=True)
        )
        jax.block_until_ready(forward(q, k, v))
        times = [
            median_ms(lambda run=run: run(q, k, v), args.repeats)
            for run in (forward, graded)
        ]
        kind = f"{sequences} pairs" if packed else "one sequence"
        lines.append(
            [f"{length:,}", kind, name, f"{error:.4f}", *(f"{t:.2f}" for t in times)]
        )
        print(*lines[-1], flush=True)
    return lines


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", default="2048,8192,32768")
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv_heads", type=int, default=8)
    parser.add_argument("--head_dim", type=int, default=128)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    head = ["tokens", "row", "kernel", "error", "forward ms", "with backward ms"]
    lines = [head, ["---:", "---", "---", "---:", "---:", "---:"]]
    for length in map(int, args.lengths.split(",")):
        for packed in (False, True):
            lines += measure(args, length, packed)
    device = jax.devices()[0]
    title = (
        f"{device.device_kind}, jax {jax.__version__}, {args.heads} heads of "
        f"{args.head_dim}, {args.kv_heads} of keys, {args.dtype}"
    )
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    text = f"{title}\n\n{table}\n"
    print("\n" + text)
    if args.out is not None:
        args.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
