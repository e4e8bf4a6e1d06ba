"""Products whose sums are float32, forward and backward.

Units that multiply bfloat16 add in float32. A product that is asked for in bfloat16
rounds that sum, and on CPUs does not use these units at all: both factors are turned to
float32 first. JAX's own derivative of a product with a float32 result would multiply
float32 by bfloat16, with the same end. So here the factors of every product, of those
in the derivative too, have the dtype of ``x``, and every result is float32 until it
becomes the derivative of something narrower. What follows a product rounds it, once.

Where ``x`` is float32 these are JAX's own functions, to the last bit. Inside
``jax.shard_map`` both factors must vary over the same axes of the mesh.
"""

import functools
import math
import string
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


__all__ = ["einsum", "matmul", "ragged_dot"]


def matmul(
    x: Float[Array, "*n fan_in"], weight: Float[Array, "fan_in fan_out"]
) -> Float[Array, "*n fan_out"]:
    """Return ``x W``, not rounded.

    Args:
      x: inputs, whose dtype both factors have.
      weight: of any float type; its derivative has the same.
    """
    return einsum("...y,yz->...z", x, weight)


def einsum(spec: str, x: Float[Array, "..."], y: Float[Array, "..."]) -> Array:
    """Return ``jnp.einsum(spec, x, y)``, not rounded.

    Args:
      spec: of two factors; an axis is of at least two of the three arrays. ``...``
        stands for the leading axes of x and the result.
      x: whose dtype both factors have.
      y: of any float type; its derivative has the same.
    """
    if not _narrow(x):
        return jnp.einsum(
            spec, x, y.astype(x.dtype), preferred_element_type=jnp.float32
        )
    free = x.ndim - len(spec.split(",")[0].replace("...", ""))
    spec = spec.replace("...", string.ascii_uppercase[:free])
    return _product(spec, x, y)


def ragged_dot(
    x: Float[Array, "m fan_in"],
    weights: Float[Array, "e fan_in fan_out"],
    sizes: Int[Array, " e"],
) -> Float[Array, "m fan_out"]:
    """Return each row's product with the weight of its group, not rounded.

    Args:
      x: rows, sorted by group, whose dtype both factors have.
      weights: one a group, of any float type; their derivative has the same.
      sizes: rows of each group.
    """
    if not _narrow(x):
        return jax.lax.ragged_dot(x, weights.astype(x.dtype), sizes)
    return _ragged(x, weights, sizes)


def _narrow(x: Array) -> bool:
    return x.dtype.itemsize < 4


def _wide(spec: str, x: Array, y: Array) -> Array:
    inputs, out = spec.split("->")
    left, right = inputs.split(",")
    both = "".join(axis for axis in left if axis in right and axis in out)
    if not both:
        return jnp.einsum(spec, x, y, preferred_element_type=jnp.float32)
    # Of a product with such axes XLA's CPU compiler may exchange the factors after it
    # has chosen the code, and then has none. The barriers keep them as they are.
    summed = "".join(axis for axis in left if axis in right and axis not in out)
    mine = "".join(axis for axis in left if axis not in right)
    theirs = "".join(axis for axis in right if axis not in left)
    x = jnp.einsum(f"{left}->{both}{mine}{summed}", x)
    y = jnp.einsum(f"{right}->{both}{summed}{theirs}", y)
    shape = (*x.shape[: len(both + mine)], *y.shape[len(both + summed) :])
    groups, terms = x.shape[: len(both)], x.shape[len(both + mine) :]
    x = x.reshape(*groups, -1, math.prod(terms))
    y = y.reshape(*groups, math.prod(terms), -1)
    x, y = jax.lax.optimization_barrier((x, y))
    found = jnp.matmul(x, y, preferred_element_type=jnp.float32)
    found = jax.lax.optimization_barrier(found).reshape(shape)
    return jnp.einsum(f"{both}{mine}{theirs}->{out}", found)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(spec: str, x: Array, y: Array) -> Array:
    return _wide(spec, x, y.astype(x.dtype))


def _product_fwd(spec: str, x: Array, y: Array) -> tuple[Array, Any]:
    return _product(spec, x, y), (x, y)


def _product_bwd(spec: str, factors: Any, grad: Array) -> tuple[Array, Array]:
    x, y = factors
    inputs, out = spec.split("->")
    left, right = inputs.split(",")
    grad = grad.astype(x.dtype)
    d_x = _wide(f"{out},{right}->{left}", grad, y.astype(x.dtype))
    d_y = _wide(f"{left},{out}->{right}", x, grad)
    return d_x.astype(x.dtype), d_y.astype(y.dtype)


_product.defvjp(_product_fwd, _product_bwd)

_WITH_WEIGHTS = jax.lax.RaggedDotDimensionNumbers(
    (((1,), (2,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[0]
)
"""[m, fan_out] and [e, fan_in, fan_out] to [m, fan_in]."""

_WITHIN_GROUPS = jax.lax.RaggedDotDimensionNumbers(
    (((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
)
"""[m, fan_in] and [m, fan_out] to [e, fan_in, fan_out]."""


@jax.custom_vjp
def _ragged(x: Array, weights: Array, sizes: Array) -> Array:
    return jax.lax.ragged_dot(
        x, weights.astype(x.dtype), sizes, preferred_element_type=jnp.float32
    )


def _ragged_fwd(x: Array, weights: Array, sizes: Array) -> tuple[Array, Any]:
    return _ragged(x, weights, sizes), (x, weights, sizes)


def _ragged_bwd(factors: Any, grad: Array) -> tuple[Array, Array, None]:
    x, weights, sizes = factors
    grad = grad.astype(x.dtype)
    product = functools.partial(
        jax.lax.ragged_dot_general,
        group_sizes=sizes,
        preferred_element_type=jnp.float32,
    )
    d_x = product(
        grad, weights.astype(x.dtype), ragged_dot_dimension_numbers=_WITH_WEIGHTS
    )
    d_weights = product(x, grad, ragged_dot_dimension_numbers=_WITHIN_GROUPS)
    return d_x.astype(x.dtype), d_weights.astype(weights.dtype), None


_ragged.defvjp(_ragged_fwd, _ragged_bwd)
