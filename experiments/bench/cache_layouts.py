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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.models.attention import cached
from jaxalign.models.attention.mask import CacheLayout


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
    """Keys [b, g, h, s] and values [b, g, s, h], in as many arrays as are given."""
    layout = CacheLayout(positions, jnp.ones_like(positions, bool))
    return cached.attend(q, k, v, layout, scale=1.0)[0]


def paged(q: Any, k: Any, v: Any, positions: Any, table: Any) -> Any:
    """Pages of 64 places in any order, found through a table [b, pages of a text]."""
    grouped = q.reshape(-1, GROUPS, SHARED, WIDTH)

    def join(index: Any, state: Any) -> Any:
        top, total, out = state
        mine = jax.lax.dynamic_index_in_dim(table, index, axis=1, keepdims=False)
        scores = jnp.einsum("bgmh,bghs->bgms", grouped, k[mine])
        scores = jax.lax.optimization_barrier(scores)
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


class Layout(NamedTuple):
    """How a cache lies and is read."""

    attend: Callable[..., Any]
    stored: Callable[..., Any]
    """Turns keys or values [b, s, g, h] of a layer into what ``attend`` takes."""


def _in_blocks(size: int | None) -> Callable[..., Any]:
    def stored(x: np.ndarray, is_key: bool, _: Any) -> list[Any]:
        blocks = np.split(x, x.shape[1] // (size or x.shape[1]), axis=1)
        axes = (0, 2, 3, 1) if is_key else (0, 2, 1, 3)
        return [jnp.asarray(block.transpose(axes)) for block in blocks]

    return stored


def _in_pages(x: np.ndarray, is_key: bool, table: np.ndarray) -> Any:
    slots, length = x.shape[:2]
    cut = x.reshape(slots, -1, PAGE, GROUPS, WIDTH)
    cut = cut.transpose((0, 1, 3, 4, 2) if is_key else (0, 1, 3, 2, 4))
    pages = np.empty((slots * length // PAGE, *cut.shape[2:]), np.float32)
    pages[table] = cut
    return jnp.asarray(pages)


LAYOUTS = {
    "slots, tokens first, whole": Layout(tokens_first, lambda x, *_: jnp.asarray(x)),
    "slots, heads first, whole": Layout(heads_first, _in_blocks(None)),
    "slots, heads first, in blocks of 128 (the engine's)": Layout(
        heads_first, _in_blocks(128)
    ),
    "pages of 64": Layout(paged, _in_pages),
}


def measure(
    layout: Layout, slots: int, args: argparse.Namespace
) -> tuple[float, float]:
    """Return milliseconds, and megabytes of scratch memory."""
    rng = np.random.default_rng(0)
    shape = (2, slots, args.length, GROUPS, WIDTH)
    plain = rng.standard_normal(shape, dtype=np.float32)
    positions = rng.integers(20, args.longest, (slots, 1)).astype(np.int32)
    q = rng.standard_normal((slots, 1, HEADS, WIDTH), dtype=np.float32)
    table = rng.permutation(slots * args.length // PAGE).reshape(slots, -1)
    arrays = [
        [
            layout.stored(x, is_key, table)
            for is_key, x in zip((True, False), plain, strict=True)
        ]
        for _ in range(LAYERS)
    ]

    def step(q: Any, arrays: Any, positions: Any, table: Any) -> Any:
        first = None
        for k, v in arrays:
            out = layout.attend(q, k, v, positions, table)
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


if __name__ == "__main__":
    main()
