"""Drawing tokens of which some may not come and others are more or less likely.

The engine's step in two programs, where a slot is steered: the first draws, and while
the second runs the model on what was drawn, the host makes the next masks.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, UInt32

from jaxalign.generation import steps
from jaxalign.generation.steps import Slots, TokenScores


__all__ = ["Edits", "SlotEdits", "begin", "draw", "no_edits"]


class Edits(NamedTuple):
    """What changes the logits of each slot, see ``steering.Steering``."""

    bias: Float[Array, "b v"]
    made: Int[Array, "b v"]
    """How often each token has been made in the slot's text."""
    presence: Float[Array, " b"]
    frequency: Float[Array, " b"]
    some: Bool[Array, " b"]
    """Whether there is anything to change."""


class SlotEdits(NamedTuple):
    """What a slot begins with."""

    bias: Float[Array, " v"]
    presence: Float[Array, ""]
    frequency: Float[Array, ""]
    some: Bool[Array, ""]


def no_edits(*, slots: int, vocab: int, mesh: Mesh | None = None) -> Edits:
    """Return edits that change nothing.

    Args:
      slots: how many.
      vocab: logits of a token.
      mesh: devices, if several.
    """
    zeros = jnp.zeros((slots, vocab), jnp.float32)
    none = jnp.zeros(slots, jnp.float32)
    made = Edits(zeros, zeros.astype(jnp.int32), none, none, none > 0)
    return steps.everywhere(made, mesh)


def begin(
    edits: Edits, slot: Int[Array, ""], new: SlotEdits, *, mesh: Mesh | None = None
) -> Edits:
    """Give a slot the edits of its new text, of which nothing is made yet."""

    def put(leaf: Array, value: Array) -> Array:
        return jax.lax.dynamic_update_index_in_dim(leaf, value, slot, axis=0)

    values = Edits(
        new.bias, jnp.zeros_like(edits.made[0]), new.presence, new.frequency, new.some
    )
    return steps.everywhere(jax.tree.map(put, edits, values), mesh)


def draw(
    slots: Slots,
    edits: Edits,
    active: Bool[Array, " b"],
    ranked: Bool[Array, ""],
    steered: Bool[Array, " b"],
    masks: UInt32[Array, "b w"],
    *,
    mesh: Mesh | None = None,
) -> tuple[TokenScores, Edits]:
    """Draw the next token of every active slot.

    Args:
      slots: all of them.
      edits: of the slots.
      active: those that have a text.
      ranked: whether anybody wants to know the most probable tokens.
      steered: slots whose masks and edits count.
      masks: tokens that may come, a bit each, the first in the lowest bit of a word.
      mesh: devices, if several.
    Returns:
      What was drawn, and what the model thought of it among the tokens that may come,
      as vLLM and SGLang tell it; and edits that know of it.
    """
    bits = (masks[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)[None, None]) & 1
    allowed = bits.reshape(masks.shape[0], -1)[:, : slots.logits.shape[1]] > 0
    logits = jnp.where(allowed | ~steered[:, None], slots.logits, -jnp.inf)
    tokens = steps.choose(_edited(logits, edits, steered), slots, active)
    scores = steps.scores(logits, tokens, ranked)
    rows = jnp.arange(tokens.shape[0])
    counted = (active & steered).astype(jnp.int32)
    edits = edits._replace(made=edits.made.at[rows, tokens].add(counted))
    return steps.everywhere((scores, edits), mesh)


def _edited(
    logits: Float[Array, "b v"], edits: Edits, steered: Bool[Array, " b"]
) -> Float[Array, "b v"]:
    wanted = steered & edits.some

    def apply() -> Array:
        made = edits.made.astype(jnp.float32)
        less = edits.frequency[:, None] * made + edits.presence[:, None] * (made > 0)
        return jnp.where(wanted[:, None], logits + edits.bias - less, logits)

    return jax.lax.cond(wanted.any(), apply, lambda: logits)
