"""Slices of bfloat16 arrays on CPUs, read and written as bits.

XLA's CPU code turns an array of narrow floats to float32 before it reads or writes a
slice of it, and back afterwards. A scan over a stack of layers reads its weights and
writes what its derivative needs as slices: the whole stack would be turned at every
layer. As integers of the same width the slices stay where they are. This changes no
number, and nothing on other devices.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters import mlir
from jaxtyping import Array


__all__ = ["as_bits", "from_bits", "register"]

_REGISTERED: list[Any] = []


def as_bits(x: Array) -> Array:
    """Return an array's bits as unsigned integers of the same width."""
    return jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))


def from_bits(bits: Array, dtype: Any) -> Array:
    """Return the array of a dtype that has these bits."""
    return jax.lax.bitcast_convert_type(bits, dtype)


def register() -> None:
    """Have programs for CPUs, made from here on, move narrow floats as bits.

    JAX has no public way to the rule that other types keep. Where a later version hides
    it, nothing is registered: programs are then slower, and as right.
    """
    rules = getattr(mlir, "_lowerings", {})
    for primitive, as_moved in (
        (jax.lax.dynamic_slice_p, _slice),
        (jax.lax.dynamic_update_slice_p, _update),
    ):
        if primitive not in rules or primitive in _REGISTERED:
            continue
        rule = _rule(as_moved, getattr(rules[primitive], "rule", rules[primitive]))
        mlir.register_lowering(primitive, rule, platform="cpu")
        _REGISTERED.append(primitive)


def _slice(x: Array, *start: Array, **options: Any) -> Array:
    if not start:  # of a scalar
        return x
    # Without the barrier the compiler takes the bits of a whole stack out of a loop.
    x, first, *rest = jax.lax.optimization_barrier((x, *start))
    bits = jax.lax.dynamic_slice_p.bind(as_bits(x), first, *rest, **options)
    return from_bits(bits, x.dtype)


def _update(x: Array, update: Array, *start: Array, **options: Any) -> Array:
    bits = jax.lax.dynamic_update_slice_p.bind(
        as_bits(x), as_bits(update), *start, **options
    )
    return from_bits(bits, x.dtype)


def _rule(as_moved: Any, plain: Any) -> Any:
    as_bits_rule = mlir.lower_fun(as_moved, multiple_results=False)

    def rule(ctx: Any, *args: Any, **options: Any) -> Any:
        moved = ctx.avals_in[0].dtype in (jnp.bfloat16, jnp.float16)
        return (as_bits_rule if moved else plain)(ctx, *args, **options)

    return rule
