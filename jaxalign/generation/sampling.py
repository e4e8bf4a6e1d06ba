"""Choosing the next token: greedy, or at random under a temperature and truncation.

Each row has its own controls and its own source of randomness, so what a row gets does
not depend on the rows beside it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32


__all__ = ["Controls", "key_of", "penalised", "sample"]

_SLACK = 1e-6
"""By how much a sum of float32 probabilities may miss ``top_p`` and still reach it."""

_BLOCK = 128

_ABOVE_INFINITY = 0x7F800001
"""The bits of a float32 that follow those of infinity, as an integer."""


_Weigh = Callable[[Array], Array]
"""Gives the weights of tokens from their logits, whose first axis is the rows."""


class Controls(NamedTuple):
    """How each row's next token is chosen."""

    temperature: Float[Array, "*b"]
    """Logits are divided by it; 0 takes the most probable token."""
    top_k: Int[Array, "*b"]
    """Only the k most probable tokens; 0 is all."""
    top_p: Float[Array, "*b"]
    """Of those, the smallest set whose probabilities reach p; 1 is all."""
    min_p: Float[Array, "*b"]
    """Only tokens at least this share as probable as the most probable; 0 is all."""
    repetition_penalty: Float[Array, "*b"]
    """Positive logits of tokens seen before are divided by it, others multiplied; 1
    changes nothing (CTRL, https://arxiv.org/abs/1909.05858, section 4.1)."""


def key_of(
    seed: int | UInt32[Array, ""], sample: int | Int[Array, ""]
) -> UInt32[Array, "2"]:
    """Return the key of one of a request's samples, as data.

    Always threefry, whatever JAX's default is: a seed stands for the same text.

    >>> key_of(7, 0).tolist() == key_of(7, 0).tolist(), key_of(7, 0).shape
    (True, (2,))
    """
    key = jax.random.key(seed, impl="threefry2x32")
    return jax.random.key_data(jax.random.fold_in(key, sample))


def sample(
    logits: Float[Array, "b v"],
    controls: Controls,
    keys: UInt32[Array, "b 2"],
    counts: Int[Array, " b"],
) -> Int[Array, " b"]:
    """Draw a token for every row from softmax(logits / temperature), truncated.

    The truncations are those of transformers, in its order: top-k, then top-p over what
    top-k left, then min-p. Among equally probable tokens the first ones count as more
    probable.

    No sorting: a token is drawn from all (by one uniform number and the running sum of
    probabilities) and taken if the truncation keeps it. If not, all that it kept is
    more probable than the token drawn, so the next draw is among those. What is taken
    has exactly the truncated distribution, after a few rounds (the method of
    FlashInfer, https://flashinfer.ai/2025/03/10/sampling.html).

    Args:
      logits: float32, any penalty applied.
      controls: of every row.
      keys: :func:`key_of` every row's request.
      counts: how many tokens each row has drawn before.
    Returns:
      A token of every row.
    Example:
      >>> logits = jnp.log(jnp.array([[0.1, 0.7, 0.2], [0.6, 0.0, 0.4]]))
      >>> one = jnp.ones(2)  # of both the most probable token alone, in two ways
      >>> heat, top_k = jnp.array([0.0, 1.0]), jnp.array([0, 1])
       >>> controls = Controls(heat, top_k, one, 0 * one, one)
      >>> keys = jnp.stack([key_of(7, 0), key_of(7, 1)])
      >>> sample(logits, controls, keys, jnp.zeros(2, jnp.int32)).tolist()
      [1, 0]
    """
    is_greedy = controls.temperature <= 0
    drawn = jax.lax.cond(
        is_greedy.all(),
        lambda: jnp.zeros(logits.shape[0], jnp.int32),
        lambda: _drawn(logits, controls, keys, counts),
    )
    best = jax.lax.cond(
        is_greedy.any(),
        lambda: jnp.argmax(logits, axis=-1).astype(jnp.int32),
        lambda: drawn,
    )
    return jnp.where(is_greedy, best, drawn)


def _drawn(
    logits: Float[Array, "b v"],
    controls: Controls,
    keys: UInt32[Array, "b 2"],
    counts: Int[Array, " b"],
) -> Int[Array, " b"]:
    """Draw a token for every row; a greedy one gets the first that comes."""
    is_greedy = controls.temperature <= 0
    heat = jnp.where(is_greedy, 1.0, controls.temperature)
    top = logits.max(axis=-1)
    hopeless = ~jnp.isfinite(top)  # nothing would ever be kept

    def weigh(values: Array) -> Array:
        """Return tokens' weights, 1 for the most probable.

        Made anew wherever they are needed: to keep those of all tokens takes longer.
        """
        shape = (-1, *[1] * (values.ndim - 1))
        depth = values - jnp.broadcast_to(top.reshape(shape), values.shape)
        return jnp.exp(depth / jnp.broadcast_to(heat.reshape(shape), values.shape))

    share = _top_k_share(logits, weigh, controls)
    cut = _truncates(controls)
    streams = jax.vmap(jax.random.fold_in)(
        jax.random.wrap_key_data(keys, impl="threefry2x32"), counts
    )

    def draw(live: Array, attempt: Array | int) -> tuple[Array, Array]:
        """Draw from what is live, and tell whether the truncation keeps it."""
        stream = jax.vmap(jax.random.fold_in, (0, None))(streams, attempt)
        token = _draw(live, weigh, jax.vmap(jax.random.uniform)(stream))
        fits = jax.lax.cond(
            cut.any(),
            lambda: _kept(logits, weigh, token, controls, share) | ~cut,
            lambda: jnp.ones_like(cut),
        )
        return token, fits | hopeless

    def draw_again(state: Any) -> Any:
        attempt, token, done = state
        live = jnp.where(_above(logits, token), logits, -jnp.inf)
        new, fits = draw(live, attempt)
        return attempt + 1, jnp.where(done, token, new), done | fits

    token, fits = draw(logits, 0)
    start = (jnp.ones((), jnp.int32), token, fits | is_greedy)
    return jax.lax.while_loop(lambda state: ~state[2].all(), draw_again, start)[1]


def _truncates(controls: Controls) -> Bool[Array, " b"]:
    """Tell which rows do not draw from all tokens."""
    some = (controls.top_k > 0) | (controls.top_p < 1) | (controls.min_p > 0)
    return some & (controls.temperature > 0)


def _above(logits: Float[Array, "b v"], token: Int[Array, " b"]) -> Bool[Array, "b v"]:
    """Tell which tokens are more probable than one."""
    level = _at(logits, token)[:, None]
    first = jnp.arange(logits.shape[1])[None] < token[:, None]
    return (logits > level) | ((logits == level) & first)


def _kept(
    logits: Float[Array, "b v"],
    weigh: _Weigh,
    token: Int[Array, " b"],
    controls: Controls,
    share: Float[Array, " b"],
) -> Bool[Array, " b"]:
    """Tell whether the truncation keeps a row's token.

    Args:
      logits: float32, any penalty applied.
      weigh: gives tokens' weights.
      token: of every row.
      controls: of every row.
      share: the probability that top-k leaves.
    """
    higher, weights = _above(logits, token), weigh(logits)
    mass = jnp.where(higher, weights, 0.0).sum(axis=-1) / weights.sum(axis=-1)
    rank = higher.sum(axis=-1)
    in_k = (controls.top_k <= 0) | (rank < controls.top_k)
    # The most probable token always stays, also with top_p 0.
    in_p = (
        (mass < controls.top_p * share - _SLACK) | (rank == 0) | (controls.top_p >= 1)
    )
    in_min = weigh(_at(logits, token)) >= controls.min_p
    return in_k & in_p & in_min


def penalised(
    logits: Float[Array, "b v"],
    penalty: Float[Array, " b"],
    seen: Bool[Array, "b v"],
) -> Float[Array, "b v"]:
    """Make tokens that were seen before less probable, see :class:`Controls`.

    >>> logits, seen = jnp.array([[2.0, -2.0, 2.0]]), jnp.array([[True, True, False]])
    >>> penalised(logits, jnp.array([2.0]), seen).tolist()
    [[1.0, -4.0, 2.0]]
    """

    def apply() -> Array:
        factor = jnp.broadcast_to(penalty[:, None], logits.shape)
        lowered = jnp.where(logits > 0, logits / factor, logits * factor)
        return jnp.where(seen, lowered, logits)

    return jax.lax.cond((penalty != 1).any(), apply, lambda: logits)


def _at(values: Float[Array, "b v"], token: Int[Array, " b"]) -> Array:
    return jnp.take_along_axis(values, token[:, None], axis=1)[:, 0]


def _draw(
    live: Float[Array, "b v"], weigh: _Weigh, uniform: Float[Array, " b"]
) -> Array:
    """Return the first token at which the weights' running sum passes its share.

    In two steps, blocks and then within one, so that no running sum over all tokens is
    made.
    """
    rows, vocab = live.shape
    rest = -vocab % _BLOCK
    padded = jnp.pad(live, ((0, 0), (0, rest)), constant_values=-jnp.inf)
    blocks = padded.reshape(rows, -1, _BLOCK)

    def pick(values: Array, target: Array) -> tuple[Array, Array]:
        """Return where the sum passes the target, and the sum before."""
        sums = jnp.cumsum(values, axis=-1)
        passed = (sums > target[:, None]) & (values > 0)
        # Rounding may leave the target at or above the last sum.
        at_last = values.shape[1] - 1 - jnp.argmax(values[:, ::-1] > 0, axis=-1)
        place = jnp.where(passed.any(-1), jnp.argmax(passed, axis=-1), at_last)
        return place, _at(sums, place) - _at(values, place)

    totals = weigh(blocks).sum(axis=-1)
    target = uniform * totals.sum(axis=-1)
    block, before = pick(totals, target)
    inner = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    place, _ = pick(weigh(inner), target - before)
    # Where weights are no numbers it is the last place, which may be padding.
    return jnp.minimum(block * _BLOCK + place, vocab - 1).astype(jnp.int32)


def _top_k_share(
    logits: Float[Array, "b v"], weigh: _Weigh, controls: Controls
) -> Float[Array, " b"]:
    """Return the probability of the k most probable tokens of rows that need it.

    That is where top-p follows top-k; 1 elsewhere. The level of the k-th is found by
    halving the range of the floats' bits, at most 32 times.
    """
    ones = jnp.ones(logits.shape[0], jnp.float32)
    needed = (controls.top_k > 0) & (controls.top_p < 1) & (controls.temperature > 0)

    def find() -> Array:
        # The bits of non-negative floats have the floats' order.
        top = logits.max(axis=-1)
        depth = jnp.broadcast_to(top[:, None], logits.shape) - logits
        bits = jax.lax.bitcast_convert_type(depth, jnp.int32)
        want = jnp.minimum(controls.top_k, logits.shape[1])

        def halve(_: Any, state: tuple[Array, Array]) -> tuple[Array, Array]:
            low, high = state  # fewer than k tokens are at low, k or more at high
            middle = low + (high - low) // 2
            enough = (bits <= middle[:, None]).sum(axis=-1) >= want
            return jnp.where(enough, low, middle), jnp.where(enough, middle, high)

        low = jnp.full(want.shape, -1, jnp.int32)
        high = jnp.full(want.shape, _ABOVE_INFINITY, jnp.int32)
        _, level = jax.lax.fori_loop(0, 32, halve, (low, high))
        higher, weights = bits < level[:, None], weigh(logits)
        mass = jnp.where(higher, weights, 0.0).sum(axis=-1)
        tied = want - higher.sum(axis=-1)
        last = top - jax.lax.bitcast_convert_type(level, jnp.float32)
        mass = mass + tied * weigh(last)
        return jnp.where(needed, mass / weights.sum(axis=-1), 1.0)

    return jax.lax.cond(needed.any(), find, lambda: ones)
