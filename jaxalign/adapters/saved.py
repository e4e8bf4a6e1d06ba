"""Weights that an adapter has in the place of base weights: heads, norms, biases, rows.

The collection ``saved`` mirrors ``params``, and a layer that finds a leaf there uses it
instead of its own: PEFT's ``modules_to_save`` and the biases that it trains in place.
Embeddings and head may have single rows instead, those of a few tokens (PEFT's
``trainable_token_indices``): ``rows`` [n, width] and, not trained, ``indices`` [n].

Where the head is tied to the embeddings it goes on reading the base's, unless the
collection has a ``lm_head/kernel`` [width, vocabulary] for it; rows of the embeddings
are the head's too, unless it has rows of its own. So it is in PEFT.
"""

from collections.abc import Mapping

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxalign import products


__all__ = ["COLLECTION", "ROWS", "put_logits", "put_rows"]

COLLECTION = "saved"

ROWS = ("rows", "indices")
"""Leaves of embeddings or head that stand for some of its rows."""


def put_rows(
    x: Float[Array, "*n d"],
    tokens: Int[Array, "*n"],
    leaves: Mapping[str, Array],
    vocab_size: int,
) -> Float[Array, "*n d"]:
    """Return embeddings with those of the saved tokens in their places."""
    rows, indices = (leaves[name] for name in ROWS)
    slots = jnp.full(vocab_size, -1, jnp.int32)
    slot = slots.at[indices].set(jnp.arange(len(indices), dtype=jnp.int32))[tokens]
    own = rows[jnp.maximum(slot, 0)].astype(x.dtype)
    return jnp.where((slot >= 0)[..., None], own, x)


def put_logits(
    logits: Float[Array, "*n v"],
    hidden: Float[Array, "*n d"],
    leaves: Mapping[str, Array],
) -> Float[Array, "*n v"]:
    """Return logits with those of the saved tokens in their places."""
    rows, indices = (leaves[name] for name in ROWS)
    own = products.einsum("...d,nd->...n", hidden, rows)
    return logits.at[..., indices].set(own.astype(logits.dtype))
