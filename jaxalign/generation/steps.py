"""The engine's steps on the device, as pure functions over a pytree of slots."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, UInt32

from jaxalign.generation import sampling
from jaxalign.generation.sampling import Controls
from jaxalign.models.attention.cached import PLACES_AXIS
from jaxalign.parallel import sharding
from jaxalign.parallel.mesh import BATCH_AXES
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


class Slots(NamedTuple):
    """Texts in the making, one a slot."""

    cache: Any
    """Keys and values, see ``types.Model.cache_fn``."""
    logits: Float[Array, "b v"]
    """Of the next token, float32."""
    positions: Int[Array, " b"]
    """The next token's place."""
    counts: Int[Array, " b"]
    """How many tokens have been drawn."""
    keys: UInt32[Array, "b 2"]
    controls: Controls
    seen: Bool[Array, "b v"]
    """Tokens that a repetition penalty lowers."""
    offsets: Int[Array, " b"] | None = None
    """Of a model that sees: the next token's rotary position, less its place. The
    positions of multimodal rotary end before the places do."""


class TokenScores(NamedTuple):
    """Tokens, and what the model thought of them: without temperature or truncation."""

    tokens: Int[Array, " n"]
    logps: Float[Array, " n"]
    """Under softmax(logits)."""
    best: Int[Array, "n k"]
    """The most probable tokens in their place, from the first on, if asked for."""
    best_logps: Float[Array, "n k"]


class Start(NamedTuple):
    """What a slot begins with, beside its prompt's keys and values."""

    slot: Int[Array, ""]
    position: Int[Array, ""]
    """Tokens of the prompt."""
    seed: UInt32[Array, ""]
    sample: Int[Array, ""]
    """Which of the request's samples: with the seed it gives the slot's key."""
    controls: Controls
    """Numbers."""
    seen: Bool[Array, " v"]
    offset: Int[Array, ""] | None = None
    """Of the slot's ``offsets``."""


class Sights(NamedTuple):
    """What a piece of a prompt with pictures has beside its tokens."""

    features: Float[Array, "c d"]
    """In the place of each token that stands for one."""
    which: Int[Array, "1 c"]
    """-1 for the other tokens."""
    turned: Int[Array, "1 c *axes"] | None
    """Rotary positions, where they are not the tokens' places."""


def widths(model: Model, variables: Any) -> tuple[int, Any]:
    """Return how many logits a token has, and its hidden state's shape and dtype.

    Nothing is computed.
    """
    assert model.cache_fn is not None
    cache_fn = functools.partial(model.cache_fn, slots=1, length=1)
    cache = jax.eval_shape(cache_fn, variables)
    piece = jax.ShapeDtypeStruct((1, 1), jnp.int32)

    def run(variables: Any, cache: Any, *given: Any) -> tuple[Array, Array]:
        assert model.decode_fn is not None
        tokens, positions, valid, lengths = given
        hidden = model.decode_fn(
            variables, cache, tokens, positions, valid > 0, lengths
        )[0]
        return model.logits_fn(variables, hidden[0]), hidden[0, 0]

    lengths = jax.ShapeDtypeStruct((1,), jnp.int32)
    found = jax.eval_shape(run, variables, cache, piece, piece, piece, lengths)
    return found[0].shape[-1], found[1]


def empty(
    variables: Any,
    *,
    model: Model,
    slots: int,
    length: int,
    vocab: int,
    dtype: Any = None,
    block: int | None = None,
    mesh: Mesh | None = None,
) -> Slots:
    """Return slots with nothing in them.

    Args:
      variables: of the model, see ``types.Model.cache_fn``.
      model: a language model.
      slots: how many.
      length: most tokens of a slot.
      vocab: logits of a token.
      dtype: of keys and values; default the model's.
      block: places of one array of the cache; default all.
      mesh: devices, if several.
    """
    assert model.cache_fn is not None
    integers, floats = jnp.zeros(slots, jnp.int32), jnp.zeros(slots, jnp.float32)
    made = Slots(
        model.cache_fn(variables, slots, length, dtype, block),
        jnp.zeros((slots, vocab), jnp.float32),
        integers,
        integers,
        jnp.zeros((slots, 2), jnp.uint32),
        Controls(floats, integers, floats + 1, floats, floats + 1),
        jnp.zeros((slots, vocab), bool),
        None if model.image_fn is None else integers,
    )
    return _placed(made, mesh)


def _placed(slots: Slots, mesh: Mesh | None) -> Slots:
    """Say where slots lie: caches by slot and head, all else everywhere."""
    rest = everywhere(slots._replace(cache=None), mesh)
    return rest._replace(cache=_placed_cache(slots.cache, mesh))


def everywhere(tree: Any, mesh: Mesh | None) -> Any:
    """Say that arrays lie whole on every device.

    >>> everywhere({"logits": 1.0}, None)
    {'logits': 1.0}
    """
    if mesh is None:
        return tree
    return jax.lax.with_sharding_constraint(tree, sharding.replicated(mesh))


def _placed_cache(cache: Any, mesh: Mesh | None) -> Any:
    if mesh is None:
        return cache

    def place(leaf: Array) -> Array:
        spec = P(*(None, BATCH_AXES, "tensor")[: leaf.ndim])
        where = NamedSharding(mesh, sharding.fitted(spec, leaf.shape, mesh))
        return jax.lax.with_sharding_constraint(leaf, where)

    return jax.tree.map(place, cache)


def encode(
    variables: Any, images: ImageInputs, *, model: Model, mesh: Mesh | None = None
) -> Float[Array, "u d"]:
    """Return the features of a prompt's pictures, for a model that sees."""
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
    return logits, _placed_cache(cache, mesh), found


def scores(
    logits: Float[Array, "n v"], tokens: Int[Array, " n"], ranked: Bool[Array, ""]
) -> TokenScores:
    """Return what the model thought of tokens, with the best ones if asked for."""
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


def admit(
    slots: Slots,
    row: Any,
    logits: Float[Array, "1 v"],
    start: Start,
    *,
    extent: int,
    mesh: Mesh | None = None,
) -> Slots:
    """Copy a prompt's keys and values to a slot.

    Args:
      slots: all of them.
      row: cache of one row, which the prompt was put in.
      logits: that it ended with.
      start: of the slot.
      extent: places that are copied, at least the prompt's.
      mesh: devices, if several.
    """

    def copy(path: Any, leaf: Array, new: Array) -> Array:
        if new.ndim > 3:  # keys and values; a gate's sum is [l, b]
            axis = PLACES_AXIS[path[-2].key]
            size = new.shape[axis]
            count = min(extent - path[-1].idx * size, size)
            if count <= 0:
                return leaf
            new = jax.lax.slice_in_dim(new, 0, count, axis=axis)
        begin = (0, start.slot, *(0 for _ in new.shape[2:]))
        return jax.lax.dynamic_update_slice(leaf, new.astype(leaf.dtype), begin)

    def put(leaf: Array, value: Any) -> Array:
        # Not `leaf.at[slot].set`, a scatter, which takes longer to compile.
        return jax.lax.dynamic_update_index_in_dim(leaf, value, start.slot, axis=0)

    slots = Slots(
        jax.tree.map_with_path(copy, slots.cache, row),
        put(slots.logits, logits[0]),
        put(slots.positions, start.position),
        put(slots.counts, jnp.zeros((), jnp.int32)),
        put(slots.keys, sampling.key_of(start.seed, start.sample)),
        jax.tree.map(put, slots.controls, start.controls),
        put(slots.seen, start.seen),
        None if slots.offsets is None else put(slots.offsets, start.offset),
    )
    return _placed(slots, mesh)


def choose(
    logits: Float[Array, "b v"], slots: Slots, active: Bool[Array, " b"]
) -> Int[Array, " b"]:
    """Draw the next token of every active slot from logits, as the slot wants it."""
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
    """Run the model on the token of every active slot."""
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
    return _placed(slots, mesh)


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
    """
    tokens = choose(slots.logits, slots, active)
    told = scores(slots.logits, tokens, ranked)
    slots = advance(variables, slots, tokens, active, model=model, mesh=mesh)
    return slots, everywhere(told, mesh)
