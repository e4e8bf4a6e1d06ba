"""The engine's slots on the device: made, filled and laid over a mesh."""

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
from jaxalign.types import Model


__all__ = [
    "Slots",
    "Start",
    "admit",
    "empty",
    "everywhere",
    "placed",
    "placed_cache",
    "widths",
]


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


def widths(model: Model, variables: Any) -> tuple[int, Any]:
    """Return how many logits a token has, and its hidden state's shape and dtype.

    Nothing is computed.

    Args:
      model: a language model with ``cache_fn`` and ``decode_fn``.
      variables: arrays or shapes.
    Example:
      >>> bigrams = Model(
      ...     *(lambda table, x: table[x.tokens], lambda table, hidden: hidden),
      ...     decode_fn=lambda table, cache, tokens, *_: (table[tokens], cache),
      ...     cache_fn=lambda table, slots, *_, **__: {})
      >>> vocab, hidden = widths(bigrams, jnp.zeros((4, 4)))
      >>> vocab, hidden.shape
      (4, (4,))
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
    Example:
      >>> bigrams = Model(
      ...     *(lambda table, x: table[x.tokens], lambda table, hidden: hidden),
      ...     decode_fn=lambda table, cache, tokens, *_: (table[tokens], cache),
      ...     cache_fn=lambda table, slots, *_, **__: {})
      >>> sizes = {"slots": 2, "length": 8, "vocab": 4}
      >>> empty(jnp.zeros((4, 4)), model=bigrams, **sizes).logits.shape
      (2, 4)
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
    return placed(made, mesh)


def placed(slots: Slots, mesh: Mesh | None) -> Slots:
    """Say where slots lie: caches by slot and head, all else everywhere.

    Example::

      slots = placed(slots._replace(cache=cache), mesh)  # in a compiled program
    """
    rest = everywhere(slots._replace(cache=None), mesh)
    return rest._replace(cache=placed_cache(slots.cache, mesh))


def everywhere(tree: Any, mesh: Mesh | None) -> Any:
    """Say that arrays lie whole on every device.

    >>> everywhere({"logits": 1.0}, None)
    {'logits': 1.0}
    """
    if mesh is None:
        return tree
    return jax.lax.with_sharding_constraint(tree, sharding.replicated(mesh))


def placed_cache(cache: Any, mesh: Mesh | None) -> Any:
    """Say where a cache lies: its slots and heads over the devices.

    >>> placed_cache({"key": (1.0,)}, None)
    {'key': (1.0,)}
    """
    if mesh is None:
        return cache

    def place(leaf: Array) -> Array:
        spec = P(*(None, BATCH_AXES, "tensor")[: leaf.ndim])
        where = NamedSharding(mesh, sharding.fitted(spec, leaf.shape, mesh))
        return jax.lax.with_sharding_constraint(leaf, where)

    return jax.tree.map(place, cache)


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
    Returns:
      The slots with that one filled; nothing has been drawn for it.
    Example:
      >>> bigrams = Model(
      ...     *(lambda table, x: table[x.tokens], lambda table, hidden: hidden),
      ...     decode_fn=lambda table, cache, tokens, *_: (table[tokens], cache),
      ...     cache_fn=lambda table, slots, *_, **__: {})
      >>> sizes = {"slots": 2, "length": 8, "vocab": 4}
      >>> slots = empty(jnp.zeros((4, 4)), model=bigrams, **sizes)
      >>> numbers = jax.tree.map(lambda x: x[0], slots.controls)
      >>> place = jnp.int32(1), jnp.int32(3)  # which slot, tokens of the prompt
      >>> draw = jnp.uint32(7), jnp.int32(0), numbers
      >>> start = Start(*place, *draw, seen=jnp.zeros(4, bool))
      >>> logits = jnp.arange(4.0)[None]  # that a prompt of 3 tokens ended with
      >>> slots = admit(slots, {}, logits, start, extent=8)
      >>> slots.logits.tolist(), slots.positions.tolist()
      ([[0.0, 0.0, 0.0, 0.0], [0.0, 1.0, 2.0, 3.0]], [0, 3])
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
    return placed(slots, mesh)
