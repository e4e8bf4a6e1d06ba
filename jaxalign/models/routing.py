"""Mixtures of experts: which experts a token goes to, and what they make of it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from jaxalign import products
from jaxalign.adapters import low_rank
from jaxalign.models import quantised
from jaxalign.parallel.mesh import BATCH_AXES
from jaxalign.types import RouterSums


__all__ = [
    "ExpertWeights",
    "MLPWeights",
    "Routes",
    "apply",
    "combine",
    "dispatch",
    "route",
    "sums",
]


class Routes(NamedTuple):
    """What a router says of every token."""

    experts: Int[Array, "b t k"]
    """The likeliest experts, the likeliest first."""
    weights: Float[Array, "b t k"]
    """Of what they give."""
    probs: Float[Array, "b t e"]
    """Of all experts."""


def route(logits: Float[Array, "b t e"], per_token: int, *, normalize: bool) -> Routes:
    """Choose the ``per_token`` experts of largest ``softmax(logits)``, in float32.

    Args:
      logits: of the router.
      per_token: k.
      normalize: whether the weights of the k are divided by their sum.
    """
    probs = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    weights, experts = jax.lax.top_k(probs, per_token)
    if normalize:
        weights = weights / weights.sum(-1, keepdims=True)
    return Routes(experts, weights, probs)


def sums(routes: Routes, valid: Bool[Array, "b t"]) -> RouterSums:
    """Return what the balance of the experts is measured by; padding does not count."""
    counted = valid[..., None].astype(jnp.float32)
    chosen = jax.nn.one_hot(routes.experts, routes.probs.shape[-1]).sum(-2)
    return RouterSums(
        (chosen * counted).sum(1), (routes.probs * counted).sum(1), counted.sum((1, 2))
    )


def dispatch(
    x: Float[Array, "b t d"], experts: Int[Array, "b t k"], count: int
) -> tuple[Float[Array, "m d"], Int[Array, " m"], Int[Array, " e"]]:
    """Copy each token to its experts and sort the copies by expert.

    Args:
      x: tokens.
      experts: of each token.
      count: of all experts.
    Returns:
      The m = b t k rows, the place of each among the copies in the tokens' order, and
      how many each expert has.
    """
    flat = experts.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    rows = x.reshape(-1, x.shape[-1])[order // experts.shape[-1]]
    return rows, order, jnp.bincount(flat, length=count)


def combine(
    out: Float[Array, "m d"],
    order: Int[Array, " m"],
    weights: Float[Array, "b t k"],
) -> Float[Array, "b t d"]:
    """Add up what each token's experts gave, weighed; undoes :func:`dispatch`."""
    back = out[jnp.argsort(order)].reshape(*weights.shape, -1)
    return (back * weights[..., None]).sum(-2).astype(out.dtype)


class ExpertWeights(NamedTuple):
    """A linear layer for each expert."""

    kernel: Any
    """[e, fan_in, fan_out], or codes of it."""
    lora: dict[str, Array]
    """Leaves of the update, {} for none."""


class MLPWeights(NamedTuple):
    """A gated MLP for each expert."""

    gate: ExpertWeights
    up: ExpertWeights
    down: ExpertWeights


def apply(
    x: Float[Array, "b t d"],
    experts: Int[Array, "b t k"],
    weights: Float[Array, "b t k"],
    mlps: MLPWeights,
    *,
    activation: Callable[[Array], Array],
    saved_name: str,
    mesh: Mesh | None = None,
) -> Float[Array, "b t d"]:
    """Return the weighed sum of ``down(act(gate(x)) * up(x))`` of each token's experts.

    Each expert's products are taken over its own tokens (``jax.lax.ragged_dot``): no
    token is dropped and none is padded.

    Args:
      x: tokens.
      experts: of each.
      weights: of what they give, float32.
      mlps: all experts.
      activation: of the gate.
      saved_name: name under which a remat policy may keep what linear layers compute.
      mesh: of several devices: each sorts the tokens of its own rows. A compiler left
        to itself would sort all tokens together, on every device.
    """

    def run(
        x: Array, experts: Array, weights: Array, mlps: MLPWeights
    ) -> Float[Array, "b t d"]:
        rows, order, sizes = dispatch(x, experts, mlps.gate.kernel.shape[0])

        def dense(part: ExpertWeights, x: Array) -> Array:
            y = quantised.apply(
                lambda x, w: products.ragged_dot(x, w, sizes), x, part.kernel
            )
            if part.lora:
                y = low_rank.apply_experts(y, x, part.lora, sizes)
            return checkpoint_name(y.astype(x.dtype), saved_name)

        out = activation(dense(mlps.gate, rows)) * dense(mlps.up, rows)
        return combine(dense(mlps.down, out), order, weights)

    split = mesh is not None and any(mesh.shape[axis] > 1 for axis in BATCH_AXES)
    if mesh is not None and split:
        rows = P(BATCH_AXES)

        def run_split(x: Array, experts: Array, weights: Array, mlps: Any) -> Array:
            # The derivative of a weight is the sum over the devices' rows.
            mlps = jax.tree.map(
                lambda w: jax.lax.pcast(w, BATCH_AXES, to="varying"), mlps
            )
            return run(x, experts, weights, mlps)

        call = jax.shard_map(
            run_split,
            mesh=mesh,
            in_specs=(rows, rows, rows, P()),
            out_specs=rows,
            axis_names=set(BATCH_AXES),
        )
        return call(x, experts, weights, mlps)
    return run(x, experts, weights, mlps)
