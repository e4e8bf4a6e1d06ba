"""The engine's steps on the device, as pure functions over a pytree of slots."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from jaxalign.generation import sampling
from jaxalign.generation.slots import (
    Slots,
    Start,
    admit,
    empty,
    everywhere,
    placed,
    placed_cache,
    widths,
)
from jaxalign.types import ImageInputs, Model


__all__ = [
    "MOST_RANKED",
    "Sights",
    "Slots",
    "Start",
    "TokenScores",
    "admit",
    "advance",
    "choose",
    "empty",
    "encode",
    "everywhere",
    "pick",
    "prefill",
    "scores",
    "step",
    "widths",
]

MOST_RANKED = 20
"""How many of the most probable tokens can be told, as many as OpenAI's API tells."""


class TokenScores(NamedTuple):
    """Tokens, and what the model thought of them: without temperature or truncation."""

    tokens: Int[Array, " n"]
    logps: Float[Array, " n"]
    """Under softmax(logits)."""
    best: Int[Array, "n k"]
    """The most probable tokens in their place, from the first on, if asked for."""
    best_logps: Float[Array, "n k"]


class Sights(NamedTuple):
    """What a piece of a prompt with pictures has beside its tokens."""

    features: Float[Array, "c d"]
    """In the place of each token that stands for one."""
    which: Int[Array, "1 c"]
    """-1 for the other tokens."""
    turned: Int[Array, "1 c *axes"] | None
    """Rotary positions, where they are not the tokens' places."""


def encode(
    variables: Any, images: ImageInputs, *, model: Model, mesh: Mesh | None = None
) -> Float[Array, "u d"]:
    """Return the features of a prompt's pictures, for a model that sees.

    Args:
      variables: of the model.
      images: a row of their own, [1, ...].
      model: with ``image_fn``.
      mesh: devices, if several.
    Example::

      features = encode(base.variables, request.images, model=base.model)
    """
    assert model.image_fn is not None
    return everywhere(model.image_fn(variables, images)[0], mesh)


def pick(
    features: Float[Array, "u d"],
    which: Int[Array, "1 c"],
    *,
    dtype: Any,
    mesh: Mesh | None = None,
) -> Float[Array, "c d"]:
    """Return the feature of each token of a piece, any where ``which`` is -1.

    A piece has as many whatever the pictures are, so that one program reads all.

    >>> features = jnp.array([[1.0, 2.0], [3.0, 4.0]])
    >>> pick(features, jnp.array([[-1, 1, 0]]), dtype="float32").tolist()[1:]
    [[3.0, 4.0], [1.0, 2.0]]
    """
    return everywhere(features[jnp.maximum(which[0], 0)].astype(dtype), mesh)


def prefill(
    variables: Any,
    cache: Any,
    tokens: Int[Array, "1 c"],
    begin: Int[Array, ""],
    count: Int[Array, ""],
    length: Int[Array, ""],
    following: Int[Array, " c"] | None = None,
    sights: Sights | None = None,
    *,
    model: Model,
    mesh: Mesh | None = None,
) -> tuple[Float[Array, "1 v"], Any, TokenScores | None]:
    """Put a piece of a prompt in a cache of one row.

    Args:
      variables: of the model.
      cache: holds the prompt's first ``begin`` tokens.
      tokens: those that follow; the first ``count`` count.
      begin: place of the first.
      count: how many there are.
      length: tokens of the whole prompt.
      following: the token behind each, to be judged; default none is.
      sights: features and positions, of a prompt with pictures.
      model: a language model.
      mesh: devices, if several.
    Returns:
      The logits that the last one predicts the next by, the cache, and what the model
      thought of ``following``.
    Example:
      >>> bigrams = Model(
      ...     *(lambda table, x: table[x.tokens], lambda table, hidden: hidden),
      ...     decode_fn=lambda table, cache, tokens, *_: (table[tokens], cache),
      ...     cache_fn=lambda table, slots, *_, **__: {})
      >>> table, begin, count = jnp.eye(4), jnp.int32(0), jnp.int32(2)
      >>> tokens = jnp.array([[3, 1, 0]])  # the last is padding
      >>> prefill(table, {}, tokens, begin, count, count, model=bigrams)[0].tolist()
      [[0.0, 1.0, 0.0, 0.0]]
    """
    assert model.decode_fn is not None
    index = jnp.arange(tokens.shape[1])[None]
    seen: dict[str, Any] = {}
    if sights is not None:
        which = jnp.where(sights.which >= 0, index, -1)
        seen = {"turned": sights.turned, "pictures": (sights.features, which)}
    hidden, cache = model.decode_fn(
        variables, cache, tokens, begin + index, index < count, length[None], **seen
    )
    if following is None:
        last = jax.lax.dynamic_slice_in_dim(hidden, count - 1, 1, axis=1)[:, 0]
        logits, found = everywhere(model.logits_fn(variables, last), mesh), None
    else:
        every = everywhere(model.logits_fn(variables, hidden[0]), mesh)
        logits = jax.lax.dynamic_slice_in_dim(every, count - 1, 1)
        told = scores(every, following, jnp.ones((), bool))
        found = everywhere(told, mesh)
    return logits, placed_cache(cache, mesh), found


def scores(
    logits: Float[Array, "n v"], tokens: Int[Array, " n"], ranked: Bool[Array, ""]
) -> TokenScores:
    """Return what the model thought of tokens, with the best ones if asked for.

    Args:
      logits: of the tokens' places, without temperature.
      tokens: of each place.
      ranked: whether the best ones are asked for; else theirs mean nothing.
    Example:
      >>> logits = jnp.log(jnp.array([[0.25, 0.5, 0.25]]))
      >>> found = scores(logits, jnp.array([0]), jnp.array(True))
      >>> print(f"{found.logps[0]:.4f}", found.best[0, 0])  # log 1/4
      -1.3863 1
    """
    total = jax.nn.logsumexp(logits, axis=-1)
    drawn = jnp.take_along_axis(logits, tokens[:, None], axis=1)[:, 0]
    most = min(MOST_RANKED, logits.shape[1])
    nothing = jnp.zeros((logits.shape[0], most), jnp.float32)
    values, best = jax.lax.cond(
        ranked,
        lambda: tuple(jax.lax.top_k(logits, most)),
        lambda: (nothing, nothing.astype(jnp.int32)),
    )
    return TokenScores(tokens, drawn - total, best, values - total[:, None])


def choose(
    logits: Float[Array, "b v"], slots: Slots, active: Bool[Array, " b"]
) -> Int[Array, " b"]:
    """Draw the next token of every active slot from logits, as the slot wants it.

    Args:
      logits: of the next token.
      slots: their controls, keys and counts are read.
      active: which of them have a text.
    Example::

      tokens = choose(slots.logits, slots, active)  # in a compiled program
    """
    penalty = slots.controls.repetition_penalty
    chosen = sampling.penalised(logits, penalty, slots.seen)
    # A slot without a text draws greedily, which takes no round of its own.
    heat = jnp.where(active, slots.controls.temperature, 0.0)
    controls = slots.controls._replace(temperature=heat)
    return sampling.sample(chosen, controls, slots.keys, slots.counts)


def advance(
    variables: Any,
    slots: Slots,
    tokens: Int[Array, " b"],
    active: Bool[Array, " b"],
    *,
    model: Model,
    mesh: Mesh | None = None,
) -> Slots:
    """Run the model on the token of every active slot.

    Args:
      variables: of the model.
      slots: all of them.
      tokens: the next of each.
      active: which of them have a text; the others stay where they are.
      model: a language model.
      mesh: devices, if several.
    Example::

      tokens = choose(slots.logits, slots, active)
      slots = advance(variables, slots, tokens, active, model=model)
    """
    assert model.decode_fn is not None
    turned: dict[str, Any] = {}
    if slots.offsets is not None:
        turned["turned"] = (slots.positions + slots.offsets)[:, None]
    hidden, cache = model.decode_fn(
        variables,
        slots.cache,
        tokens[:, None],
        slots.positions[:, None],
        active[:, None],
        **turned,
    )
    moved = active.astype(jnp.int32)
    slots = slots._replace(
        cache=cache,
        logits=model.logits_fn(variables, hidden[:, 0]),
        positions=slots.positions + moved,
        counts=slots.counts + moved,
        seen=slots.seen.at[jnp.arange(tokens.shape[0]), tokens].set(True),
    )
    return placed(slots, mesh)


def step(
    variables: Any,
    slots: Slots,
    active: Bool[Array, " b"],
    ranked: Bool[Array, ""],
    *,
    model: Model,
    mesh: Mesh | None = None,
) -> tuple[Slots, TokenScores]:
    """Draw the next token of every active slot, and run the model on it.

    Args:
      variables: of the model.
      slots: all of them.
      active: those that have a text.
      ranked: whether anybody wants to know the most probable tokens.
      model: a language model.
      mesh: devices, if several.
    Returns:
      The slots, and what was drawn, whatever temperature, penalty and truncation it
      was drawn with.
    Example::

      run = jax.jit(step, static_argnames="model", donate_argnames="slots")
      slots, told = run(variables, slots, active, jnp.array(False), model=model)
    """
    tokens = choose(slots.logits, slots, active)
    told = scores(slots.logits, tokens, ranked)
    slots = advance(variables, slots, tokens, active, model=model, mesh=mesh)
    return slots, everywhere(told, mesh)
