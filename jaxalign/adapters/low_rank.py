"""What the LoRA of one layer computes: beside its weight, or merged into it.

For the leaves and their formulas see ``adapters.lora``.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from jaxalign import products
from jaxalign.adapters import gates
from jaxalign.errors import UserError
from jaxalign.variables import check_params


__all__ = [
    "LEAVES",
    "SAVED_NAME",
    "apply",
    "apply_experts",
    "delta",
    "embed",
    "merge",
    "unmerge",
]

LEAVES = ("a", "b", "scale", "bias", "a0", "b0", "magnitude", *gates.GATES)
"""All that the adapter of one layer may have."""

SAVED_NAME = "lora_low"
"""Name under which a remat policy may keep x A, and what DoRA multiplies."""


@jax.custom_vjp
def delta(
    x: Float[Array, "*n fan_in"],
    a: Float[Array, "fan_in rank"],
    b: Float[Array, "rank fan_out"],
    scale: Float[Array, "..."],
) -> Float[Array, "*n fan_out"]:
    """Return ``scale (x A) B``, of factors in the dtype of x and not rounded.

    Its derivative is written out, because the compiler, left to itself, transposes the
    tokens × width arrays instead of the tokens × rank ones.

    Args:
      x: inputs.
      a: factor A.
      b: factor B.
      scale: one number, or one a token, [*n, 1].
    """
    return _delta_fwd(x, a, b, scale)[0]


def _delta_fwd(x: Array, a: Array, b: Array, scale: Array) -> tuple[Array, Any]:
    low = checkpoint_name(products.matmul(x, a).astype(x.dtype), SAVED_NAME)
    out = products.matmul(_scaled(low, scale).astype(x.dtype), b)
    return out, (x, low, a, b, scale)


def _scaled(low: Array, scale: Array) -> Array:
    scale = jnp.broadcast_to(scale.astype(jnp.float32), (*low.shape[:-1], 1))
    return low.astype(jnp.float32) * scale


def _delta_bwd(residuals: Any, grad: Array) -> tuple[Array, ...]:
    x, low, a, b, scale = residuals
    grad = grad.astype(x.dtype)
    d_scaled = products.matmul(grad, b.T)
    along = d_scaled.astype(jnp.float32) * low.astype(jnp.float32)
    d_scale = along.sum(-1, keepdims=True) if scale.ndim else along.sum()
    d_low = _scaled(d_scaled, scale).astype(x.dtype)

    def weight_grad(narrow: Array, wide: Array) -> Array:
        # The barrier keeps the transpose on the narrow side.
        left = jax.lax.optimization_barrier(narrow.reshape(-1, narrow.shape[-1]).T)
        right = wide.reshape(-1, wide.shape[-1])
        return jnp.matmul(left, right, preferred_element_type=jnp.float32)

    d_a = weight_grad(d_low, x).T
    if scale.ndim:
        d_b = weight_grad(_scaled(low, scale).astype(x.dtype), grad)
    else:
        d_b = weight_grad(low, grad) * scale
    d_x = products.matmul(d_low, a.T)
    return (
        d_x.astype(x.dtype),
        d_a.astype(a.dtype),
        d_b.astype(b.dtype),
        d_scale.astype(scale.dtype),
    )


delta.defvjp(_delta_fwd, _delta_bwd)


def apply(
    y: Float[Array, "*n fan_out"],
    x: Float[Array, "*n fan_in"],
    leaves: Mapping[str, Array],
    *,
    kernel: Any,
    mean: gates.Mean | None = None,
    dropped: Float[Array, "*n fan_in"] | None = None,
) -> Float[Array, "*n fan_out"]:
    """Return the adapted layer's output from the plain one's, not rounded either.

    Args:
      y: ``x W``, without bias, not rounded.
      x: inputs, which the gate reads too.
      leaves: of this layer's adapter.
      kernel: W [fan_in, fan_out], or codes of it, which DoRA measures.
      mean: see ``gates.value``.
      dropped: x with dropout, for the update alone.
    Example:
      >>> x, w, ones = jnp.array([[1.0, 2.0]]), jnp.eye(2), jnp.ones((2, 1))
      >>> leaves = {"a": ones, "b": ones.T, "scale": jnp.array(2.0)}
      >>> apply(x @ w, x, leaves, kernel=w).tolist()  # x W + scale (x A) B
      [[7.0, 8.0]]
    """
    a, b = _factors(leaves)
    gate = gates.value(leaves, x, mean)
    scale = leaves["scale"] if gate is None else leaves["scale"] * gate
    y = y + delta(x if dropped is None else dropped, a, b, scale)
    if "bias" in leaves:
        own = jnp.broadcast_to(leaves["bias"].astype(y.dtype), y.shape)
        y = y + jnp.broadcast_to(scale.astype(y.dtype), (*y.shape[:-1], 1)) * own
    if "magnitude" not in leaves:
        return y
    # The lengths count as constants, as in the paper's section 4.3. What the derivative
    # of the magnitude needs is kept, instead of the layer's output.
    y = checkpoint_name(y.astype(x.dtype), SAVED_NAME).astype(jnp.float32)
    lengths = jax.lax.stop_gradient(_lengths(kernel, a, b, leaves["scale"]))
    lengths = checkpoint_name(lengths, SAVED_NAME)
    ratio = (leaves["magnitude"] / _not_zero(lengths)).astype(jnp.float32)
    return y * jnp.broadcast_to(ratio, y.shape)


def apply_experts(
    y: Float[Array, "m fan_out"],
    x: Float[Array, "m fan_in"],
    leaves: Mapping[str, Array],
    sizes: Int[Array, " e"],
) -> Float[Array, "m fan_out"]:
    """Return the adapted output of experts that have an A and a B each, not rounded.

    Args:
      y: each row through its own expert, not rounded.
      x: inputs, sorted by expert.
      leaves: of the layer's adapter: a [e, fan_in, rank], b [e, rank, fan_out].
      sizes: rows of each expert.
    Example:
      >>> x, a, b = jnp.ones((3, 2)), jnp.ones((2, 2, 1)), jnp.ones((2, 1, 2))
      >>> leaves = {"a": a, "b": b, "scale": jnp.array(0.5)}
      >>> apply_experts(0 * x, x, leaves, jnp.array([1, 2])).tolist()
      [[1.0, 1.0], [1.0, 1.0], [1.0, 1.0]]
    """
    a, b = _factors(leaves)
    scale = leaves["scale"] * leaves.get("gate", 1.0)
    low = products.ragged_dot(x, a, sizes).astype(x.dtype)
    low = checkpoint_name(low, SAVED_NAME)
    return y + products.ragged_dot(_scaled(low, scale).astype(x.dtype), b, sizes)


def _not_zero(lengths: Any, xp: Any = jnp) -> Any:
    """Let a column of zeros, as padded vocabularies have, stay one."""
    return xp.where(lengths == 0, 1.0, lengths)


def embed(
    tokens: Array, leaves: Mapping[str, Array], dtype: Any
) -> Float[Array, "*n d"]:
    """Return the update of the embeddings of tokens, ``scale A[tokens] B``.

    Of factors in ``dtype``, and not rounded.

    >>> leaves = {"a": jnp.eye(2), "b": jnp.ones((2, 3)), "scale": jnp.array(2.0)}
    >>> embed(jnp.array([1]), leaves, jnp.float32).tolist()
    [[2.0, 2.0, 2.0]]
    """
    low = _scaled(leaves["a"][tokens], leaves["scale"]).astype(dtype)
    return products.matmul(low, leaves["b"])


def _factors(leaves: Mapping[str, Any], xp: Any = jnp) -> tuple[Any, Any]:
    """Return A and B, with the part that PiSSA takes away beside them."""
    a, b = leaves["a"], leaves["b"]
    if "a0" in leaves:
        a = xp.concatenate([a, leaves["a0"]], axis=-1)
        b = xp.concatenate([b, -leaves["b0"]], axis=-2)
    return a, b


def _lengths(kernel: Any, a: Array, b: Array, scale: Array) -> Array:
    """Return |W + scale A B| of every column, without making that matrix."""
    wide = kernel.astype(jnp.float32)
    cross = jnp.einsum("...ir,...io->...ro", a, wide)
    gram = jnp.einsum("...ir,...is->...rs", a, a)
    scale = scale[..., None]
    squares = (
        jnp.square(wide).sum(-2)
        + 2 * scale * (cross * b).sum(-2)
        + jnp.square(scale) * (jnp.einsum("...rs,...so->...ro", gram, b) * b).sum(-2)
    )
    return jnp.sqrt(jnp.maximum(squares, 0.0))


def merge(params: Any, adapters: Any) -> Any:
    """Return the parameters with the adapted weight in place of each adapted one.

    ``W + scale g A B``, for DoRA with its columns brought to their lengths. The sum is
    taken in float32 and rounded once to the weight's dtype.

    Raises:
      UserError: a gate that depends on the input, which no one weight can stand for.
    Example:
      >>> ones = jnp.ones((2, 1))
      >>> leaves = {"a": ones, "b": ones.T, "scale": jnp.array(2.0)}
      >>> merge({"up": {"kernel": jnp.eye(2)}}, {"up": leaves})["up"]["kernel"].tolist()
      [[3.0, 2.0], [2.0, 3.0]]
    """
    _check(params, adapters, "low_rank.merge")
    return _map_adapted(_merged, params, adapters, 1)


def unmerge(params: Any, adapters: Any) -> Any:
    """Take the updates out of merged parameters again, up to one rounding of each.

    In a functional library the base weights are still there; this is for weights that
    came merged.

    Raises:
      UserError: an adapter that cannot be merged, or DoRA, whose merged weight no
        longer tells the lengths of the base's columns.
    Example:
      >>> ones = jnp.ones((2, 1))
      >>> leaves = {"a": ones, "b": ones.T, "scale": jnp.array(2.0)}
      >>> merged = {"up": {"kernel": jnp.array([[3.0, 2.0], [2.0, 3.0]])}}
      >>> unmerge(merged, {"up": leaves})["up"]["kernel"].tolist()
      [[1.0, 0.0], [0.0, 1.0]]
    """
    _check(params, adapters, "low_rank.unmerge")
    return _map_adapted(_unmerged, params, adapters, -1)


def _check(params: Any, adapters: Any, function: str) -> None:
    check_params(params, function)
    if isinstance(adapters, Mapping) and isinstance(adapters.get("lora"), Mapping):
        raise UserError(
            f"{function}: got variables, with the collections {', '.join(adapters)}: "
            'expected the adapters alone. Give variables["lora"]'
        )


def _map_adapted(fn: Any, params: Any, adapters: Any, sign: int) -> Any:
    changed = {}
    if "bias" in (adapters or {}) and "kernel" in params and "bias" not in params:
        raise UserError(
            "the adapter has biases (lora_bias) on layers that have none of their own, "
            "so no merged weight can stand for them: use --format peft"
        )
    for name, child in params.items():
        leaves = adapters.get(name) if isinstance(adapters, dict) else None
        if isinstance(child, dict) and leaves is not None:
            changed[name] = _map_adapted(fn, child, leaves, sign)
        elif name in ("kernel", "embedding") and "a" in (adapters or {}):
            changed[name] = fn(child, adapters)
        elif name == "bias" and "bias" in (adapters or {}):
            changed[name] = _shifted(child, adapters, sign)
        else:
            changed[name] = child
    return changed


def _shifted(bias: Any, leaves: Mapping[str, Any], sign: int) -> Any:
    """Return a layer's bias with the adapter's own, in the bias's dtype."""
    xp = np if isinstance(bias, np.ndarray) else jnp
    own, scale = (xp.asarray(leaves[k], dtype=xp.float32) for k in ("bias", "scale"))
    scale = scale * xp.asarray(leaves.get("gate", 1.0), dtype=xp.float32)
    return (bias.astype(xp.float32) + sign * scale[..., None] * own).astype(bias.dtype)


def _update(weight: Any, leaves: Mapping[str, Any]) -> tuple[Any, Any]:
    """Return ``scale g A B`` in float32 and the array library that made it."""
    for name in gates.FEATURE_GATES:
        if name in leaves:
            raise UserError(
                f"the adapter has a {name}, which depends on the input, so no merged "
                "weight can stand for it: use --format peft, or train with gate static"
            )
    xp = np if isinstance(weight, np.ndarray) else jnp
    wide = {k: xp.asarray(v, dtype=xp.float32) for k, v in leaves.items()}
    update = xp.matmul(*_factors(wide, xp))
    scale = wide["scale"] * wide.get("gate", xp.float32(1))
    return update * scale.reshape(scale.shape + (1,) * (update.ndim - scale.ndim)), xp


def _merged(weight: Any, leaves: Mapping[str, Any]) -> Any:
    update, xp = _update(weight, leaves)
    merged = weight.astype(xp.float32) + update
    if "magnitude" in leaves:
        lengths = _not_zero(xp.linalg.norm(merged, axis=-2), xp)
        ratio = xp.asarray(leaves["magnitude"], dtype=xp.float32) / lengths
        merged = merged * ratio[..., None, :]
    return merged.astype(weight.dtype)


def _unmerged(weight: Any, leaves: Mapping[str, Any]) -> Any:
    if "magnitude" in leaves:
        raise UserError(
            "DoRA cannot be taken out of a merged weight, which no longer tells how "
            "long the base's columns were: load the base model again"
        )
    update, xp = _update(weight, leaves)
    return (weight.astype(xp.float32) - update).astype(weight.dtype)
