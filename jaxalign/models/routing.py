"""Mixtures of experts: which experts a token goes to, and the way there and back."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxalign.types import RouterSums


__all__ = ["Routes", "combine", "dispatch", "route", "sums"]


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
    return (back * weights[..., None]).sum(-2)
