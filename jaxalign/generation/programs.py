"""The engine's compiled steps, and how they get compiled at the same time."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import jax

from jaxalign.generation import steps


__all__ = ["admit", "compile_together", "empty", "prefill", "step"]

empty = jax.jit(
    steps.empty,
    static_argnames=("model", "slots", "length", "vocab", "dtype", "block", "mesh"),
)
prefill = jax.jit(
    steps.prefill, static_argnames=("model", "mesh"), donate_argnames="cache"
)
admit = jax.jit(
    steps.admit, static_argnames=("extent", "mesh"), donate_argnames="slots"
)
step = jax.jit(steps.step, static_argnames=("model", "mesh"), donate_argnames="slots")


def compile_together(lowerings: Iterable[Callable[[], jax.stages.Lowered]]) -> None:
    """Compile programs at the same time, each in a thread of its own.

    Most of a compilation is one core's work, and needs no lock of Python's. What is
    compiled here is in JAX's cache: a call of the function with such arguments finds
    it there.

    Args:
      lowerings: each gives one program, before it is compiled. They are called one
        after the other, in this thread, as JAX's settings may be this thread's own.
    """
    with ThreadPoolExecutor() as pool:
        for done in [pool.submit(lowering().compile) for lowering in lowerings]:
            done.result()
