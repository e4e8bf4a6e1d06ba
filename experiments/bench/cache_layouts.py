"""Ways to keep the keys and values of earlier tokens, timed for a step of decoding.

    python experiments/bench/cache_layouts.py --out experiments/bench/cache_layouts.md

Every layout holds the same texts (32 or 64 of them, of unlike lengths, in a cache of
``--length`` places) and is asked for the attention of one new token each, over as many
layers and heads as SmolLM2-135M has; all give the same numbers, which is checked. About
two minutes on two quiet cores.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.models.kernels import cached
from jaxalign.models.layouts import CacheLayout


LAYERS, GROUPS, SHARED, WIDTH, PAGE = 30, 3, 3, 64, 64
HEADS = GROUPS * SHARED
LOW = -1e30


def main() -> None:
    """Time every layout and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", help="Markdown file")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--longest", type=int, default=250)
    args = parser.parse_args()
    lines = [
        f"Attention of one step over {LAYERS} layers, cache of {args.length} places, "
        f"texts of 20 to {args.longest} tokens; best of 10.",
        "",
        "| layout | 32 texts, ms | 64 texts, ms | scratch, MB |",
        "|---|---:|---:|---:|",
    ]
    for name, layout in LAYOUTS.items():
        found = [measure(layout, slots, args) for slots in (32, 64)]
        times = " | ".join(f"{ms:.0f}" for ms, _ in found)
        lines.append(f"| {name} | {times} | {found[-1][1]:.0f} |")
        print(lines[-1], flush=True)
    if args.out:
        Path(args.out).write_text("\n".join(lines) + "\n")


def tokens_first(q: Any, k: Any, v: Any, positions: Any, _: Any) -> Any:
    """One product over [b, s, g, h]."""
    grouped = q.reshape(-1, GROUPS, SHARED, WIDTH)
    scores = jnp.einsum("bgmh,bsgh->bgms", grouped, k)
    seen = jnp.arange(k.shape[1])[None] <= positions
    scores = jnp.where(seen[:, None, None], scores, LOW)
    out = jnp.einsum("bgms,bsgh->bgmh", jax.nn.softmax(scores, axis=-1), v)
    return out.reshape(q.shape)


def heads_first(q: Any, k: Any, v: Any, positions: Any, _: Any) -> Any:
    """One product over [b, g, s, h]."""
    layout = CacheLayout(positions, jnp.ones_like(positions, bool))
    return cached.attend(q, k, v, layout, scale=1.0, block=k.shape[2])[0]


def in_blocks(q: Any, k: Any, v: Any, positions: Any, _: Any) -> Any:
    """The engine's: [b, g, s, h], no further than the longest text reaches."""
    layout = CacheLayout(positions, jnp.ones_like(positions, bool))
    return cached.attend(q, k, v, layout, scale=1.0, block=PAGE)[0]


def paged(q: Any, k: Any, v: Any, positions: Any, table: Any) -> Any:
    """Pages [n, g, 64, h] in any order, found through a table [b, pages of a text]."""
    grouped = q.reshape(-1, GROUPS, SHARED, WIDTH)

    def join(index: Any, state: Any) -> Any:
        top, total, out = state
        mine = jax.lax.dynamic_index_in_dim(table, index, axis=1, keepdims=False)
        scores = jnp.einsum("bgsh,bgmh->bgsm", k[mine], grouped)
        scores = jax.lax.optimization_barrier(scores).swapaxes(2, 3)
        seen = index * PAGE + jnp.arange(PAGE)[None] <= positions
        scores = jnp.where(seen[:, None, None], scores, LOW)
        new_top = jnp.maximum(top, scores.max(axis=-1))
        weights = jnp.exp(scores - new_top[..., None])
        kept = jnp.exp(top - new_top)
        weighed = jax.lax.optimization_barrier(weights)
        found = jnp.einsum("bgms,bgsh->bgmh", weighed, v[mine])
        total = total * kept + weights.sum(axis=-1)
        return new_top, total, out * kept[..., None] + found

    shape = grouped.shape[:3]
    start = (jnp.full(shape, LOW), jnp.zeros(shape), jnp.zeros(grouped.shape))
    pages = positions.max() // PAGE + 1
    _, total, out = jax.lax.fori_loop(0, pages, join, start)
    return (out / total[..., None]).reshape(q.shape)


LAYOUTS: dict[str, Callable[..., Any]] = {
    "slots, tokens first, whole": tokens_first,
    "slots, heads first, whole": heads_first,
    "slots, heads first, in blocks (the engine's)": in_blocks,
    "pages of 64": paged,
}


def measure(
    layout: Callable[..., Any], slots: int, args: argparse.Namespace
) -> tuple[float, float]:
    """Return milliseconds, and megabytes of scratch memory."""
    rng = np.random.default_rng(0)
    shape = (2, slots, args.length, GROUPS, WIDTH)
    plain = rng.standard_normal(shape, dtype=np.float32)
    positions = rng.integers(20, args.longest, (slots, 1)).astype(np.int32)
    q = rng.standard_normal((slots, 1, HEADS, WIDTH), dtype=np.float32)
    table = rng.permutation(slots * args.length // PAGE).reshape(slots, -1)
    stored = {
        tokens_first: lambda x: x,
        heads_first: lambda x: x.swapaxes(1, 2),
        in_blocks: lambda x: x.swapaxes(1, 2),
        paged: lambda x: _to_pages(x, table),
    }[layout]
    arrays = [[jnp.asarray(stored(x)) for x in plain] for _ in range(LAYERS)]

    def step(q: Any, arrays: Any, positions: Any, table: Any) -> Any:
        first = None
        for k, v in arrays:
            out = layout(q, k, v, positions, table)
            first = out if first is None else first
            q = q + 1e-3 * out
        return first, q

    with jax.numpy_rank_promotion("allow"):
        program = jax.jit(step).lower(q, arrays, positions, table).compile()
        want = tokens_first(q, *plain, positions, None)
    times = []
    for _ in range(11):
        began = time.monotonic()
        got = jax.block_until_ready(program(q, arrays, positions, table))
        times.append(time.monotonic() - began)
    np.testing.assert_allclose(got[0], want, atol=1e-4)
    return min(times[1:]) * 1e3, program.memory_analysis().temp_size_in_bytes / 1e6


def _to_pages(x: np.ndarray, table: np.ndarray) -> np.ndarray:
    slots, length = x.shape[:2]
    pages = np.empty((slots * length // PAGE, GROUPS, PAGE, WIDTH), np.float32)
    pages[table] = x.reshape(slots, -1, PAGE, GROUPS, WIDTH).swapaxes(2, 3)
    return pages


if __name__ == "__main__":
    main()
