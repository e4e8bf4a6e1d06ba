"""Sampling from a model that has no cache: the whole text again for every token.

What a cache holds here are the tokens so far; the model runs over all of them each
time. Slow, n times the work of a text of n tokens, and all that a model of one's own
needs to be sampled from.
"""

import functools
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxalign import progress
from jaxalign.types import Bound, Model, ModelInputs


__all__ = ["with_cache"]


def with_cache(model: Model) -> Model:
    """Return the model, with cache functions that recompute if it has none.

    It is said once that they do. Such a model is shown no pictures: every new token
    would encode them again.
    """
    if model.decode_fn is not None and model.cache_fn is not None:
        return model
    _tell()
    return model._replace(
        decode_fn=Bound(_decode, model), cache_fn=Bound(_cache, model), image_fn=None
    )


@functools.cache
def _tell() -> None:
    progress.say(
        "the model has no cache functions (decode_fn, cache_fn): each new token runs "
        "it over the whole text, which is slow"
    )


def _cache(
    model: Model,
    variables: Any,
    slots: int,
    length: int,
    dtype: Any = None,
    block: int | None = None,
) -> dict[str, Int[Array, "1 b t"]]:
    """Return room for the tokens of each slot; slots are the second axis."""
    del model, variables, dtype, block
    return {"tokens": jnp.zeros((1, slots, length), jnp.int32)}


def _decode(
    model: Model,
    variables: Any,
    cache: dict[str, Int[Array, "1 b n"]],
    tokens: Int[Array, "b t"],
    positions: Int[Array, "b t"],
    valid: Bool[Array, "b t"],
    lengths: Int[Array, " b"] | None = None,
) -> tuple[Float[Array, "b t d"], dict[str, Int[Array, "1 b n"]]]:
    """Put tokens in their places and run the model over all that are there so far."""
    del lengths
    known = cache["tokens"][0]
    rows, length = jnp.arange(known.shape[0])[:, None], known.shape[1]
    places = jnp.where(valid, positions, length)
    known = known.at[rows, places].set(tokens, mode="drop")
    index = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), known.shape)
    # An empty slot keeps its first place: no softmax is over nothing.
    last = jnp.where(valid, positions, 0).max(axis=1, keepdims=True)
    there = (index <= last).astype(jnp.int32)
    # What is not there yet is as the padding of packed rows: a model may have learnt no
    # positions beyond its own longest text.
    inputs = ModelInputs(known * there, index * there, there, jnp.zeros_like(known))
    hidden = model.hidden_fn(variables, inputs)
    mine = jnp.take_along_axis(
        hidden, jnp.minimum(positions, length - 1)[..., None], axis=1
    )
    return mine, {"tokens": known[None]}
