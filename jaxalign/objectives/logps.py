"""The one log-probability primitive, and the sums that objectives are made of."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float, Int

from jaxalign.types import Completions


__all__ = [
    "bucket_sums",
    "response_sums",
    "segment_sums",
    "segment_token_counts",
    "token_logps",
    "token_logps_and_kl",
    "token_positions",
]

LogitsFn = Callable[[Any, Any], Any]


def token_logps(
    logits_fn: LogitsFn,
    variables: Any,
    hidden: Float[Array, "b t d"],
    completions: Completions,
    *,
    chunk_size: int | None = None,
) -> Float[Array, "b c"]:
    """Return log p(token | what comes before) of every completion token, in float32.

    ``logp = logits[target] - logsumexp(logits)``, taken over ``chunk_size`` tokens at a
    time, so that at most ``chunk_size × vocabulary`` logits exist at once, forward and
    backward. Chunks that hold padding only are skipped.

    Backward: the log-probability of a token depends on its own hidden state only, so
    while the logits of a chunk are at hand the forward pass under differentiation also
    takes ``d logp / d hidden`` (one vector a token) and the backward pass is a
    product. Only where the head itself is trained are the logits computed again.

    Args:
      logits_fn: head of the model, ``(variables, [*n d]) -> [*n v]``.
      variables: what ``logits_fn`` reads its weights from.
      hidden: last hidden state of every token of the rows.
      completions: which tokens are wanted and which hidden state predicts each.
      chunk_size: tokens whose logits exist at once, at least one a row; default 128,
        or 16 a row where there are more rows.
    Returns:
      Natural logarithms, 0 for padding. Not summed, not weighted.
    Example:
      >>> def head(w, hidden): return hidden @ w
      >>> none = jnp.zeros((1, 1), jnp.int32)
      >>> first = Completions(source=none, target=none, response=none, segment=none)
      >>> logp = token_logps(head, jnp.zeros((2, 4)), jnp.ones((1, 3, 2)), first)
      >>> print(f"{logp[0, 0]:.4f}")  # log 1/4: four words, equal logits
      -1.3863
    """

    def one(variables: Any, states: Array, aux: Any, fixed: Any) -> tuple[Array]:
        del fixed
        logits = logits_fn(variables, states).astype(jnp.float32)
        chosen = _picked(logits, aux["target"])
        return (chosen - jax.nn.logsumexp(logits, axis=-1),)

    chunks = _Chunks(completions, chunk_size)
    out = _chunked(one, logits_fn)(
        variables, chunks.states(hidden), chunks.aux(completions), ()
    )
    return chunks.join(out[0])


def token_logps_and_kl(
    logits_fn: LogitsFn,
    variables: Any,
    hidden: Float[Array, "b t d"],
    ref_variables: Any,
    ref_hidden: Float[Array, "b t d"],
    completions: Completions,
    *,
    chunk_size: int | None = None,
) -> tuple[Float[Array, "b c"], Float[Array, "b c"], Float[Array, "b c"]]:
    """Return log-probabilities, the reference's, and KL(reference || policy) a token.

    The divergence is taken over the whole vocabulary at the place that predicts each
    completion token, ``sum_v p_ref (log p_ref - log p)``, a chunk at a time like
    :func:`token_logps`; the two full distributions never exist for more than
    ``chunk_size`` tokens. The reference gets no gradient.

    Args:
      logits_fn: the head of both, see ``types.Model``.
      variables: the policy's.
      hidden: its hidden states of the rows.
      ref_variables: the reference's.
      ref_hidden: its hidden states, [b, t, d] as the policy's.
      completions: which tokens are wanted.
      chunk_size: most tokens of all rows whose distributions exist at once.
    Returns:
      Three numbers a completion token, 0 for padding.
    Example:
      >>> one = jnp.zeros((1, 1), jnp.int32)
      >>> wanted = Completions(source=one, target=one, response=one, segment=one)
      >>> states, reference = jnp.zeros((1, 1, 2)), jnp.log(jnp.array([[[0.9, 0.1]]]))
      >>> found = token_logps_and_kl(
      ...     lambda head, hidden: hidden, {}, states, {}, reference, wanted)
      >>> print([f"{float(logp[0, 0]):.3f}" for logp in found])
      ['-0.693', '-0.105', '0.368']
    """

    def one(variables: Any, states: Array, aux: Any, fixed: Any) -> tuple[Array, ...]:
        mine = jax.nn.log_softmax(logits_fn(variables, states).astype(jnp.float32))
        ref = jax.nn.log_softmax(logits_fn(fixed, aux["states"]).astype(jnp.float32))
        kl = (jnp.exp(ref) * (ref - mine)).sum(-1)
        return _picked(mine, aux["target"]), _picked(ref, aux["target"]), kl

    chunks = _Chunks(completions, chunk_size)
    aux = {**chunks.aux(completions), "states": chunks.states(ref_hidden)}
    out = _chunked(one, logits_fn)(variables, chunks.states(hidden), aux, ref_variables)
    return chunks.join(out[0]), chunks.join(out[1]), chunks.join(out[2])


def _picked(logps: Array, target: Array) -> Array:
    return jnp.take_along_axis(logps, target[..., None], axis=-1)[..., 0]


class _Chunks:
    """Cuts the completion tokens of a batch into chunks [k, b, m] and joins them."""

    def __init__(self, completions: Completions, chunk_size: int | None):
        self.rows, self.wanted = completions.target.shape
        if chunk_size is None:
            # Small, because the last chunk of a row is part padding.
            chunk_size = max(128, 16 * self.rows)
        self.per_row = min(self.wanted, max(1, chunk_size // self.rows))
        self.count = -(-self.wanted // self.per_row)
        self.source = self.split(completions.source, 0)

    def split(self, x: Array, fill: int) -> Array:
        extra = self.count * self.per_row - self.wanted
        padded = jnp.pad(x, [(0, 0), (0, extra)], constant_values=fill)
        return padded.reshape(self.rows, self.count, self.per_row).swapaxes(0, 1)

    def aux(self, completions: Completions) -> dict[str, Array]:
        return {
            "target": self.split(completions.target, 0),
            "valid": self.split(completions.response, -1) >= 0,
        }

    def states(self, hidden: Array) -> Array:
        """Return the hidden state that predicts each token, [k b m d]."""
        index = self.source.swapaxes(0, 1).reshape(self.rows, -1, 1)
        picked = jnp.take_along_axis(hidden, index, axis=1)
        picked = picked.reshape(self.rows, self.count, self.per_row, -1)
        return picked.swapaxes(0, 1)

    def join(self, values: Array) -> Array:
        return values.swapaxes(0, 1).reshape(self.rows, -1)[:, : self.wanted]


PerToken = Callable[[Any, Array, Any, Any], tuple[Array, ...]]
"""``(variables, states [b m d], aux, fixed) -> values [b m]``, each of which depends on
the state of its own token only. ``aux`` is of the chunk, ``fixed`` of all chunks."""


def _chunked(one: PerToken, logits_fn: LogitsFn) -> Callable[..., tuple[Array, ...]]:
    """Map over chunks, with derivatives towards ``variables`` and ``states`` only."""

    def masked(variables: Any, states: Array, aux: Any, fixed: Any) -> Any:
        values = one(variables, states, aux, fixed)
        return tuple(jnp.where(aux["valid"], value, 0.0) for value in values)

    @jax.custom_vjp
    def apply(variables: Any, states: Array, aux: Any, fixed: Any) -> Any:
        compute = _skipping(lambda chunk: masked(variables, chunk[0], chunk[1], fixed))
        return jax.lax.map(compute, (states, aux))

    def recomputing(variables: Any, states: Array, aux: Any, fixed: Any) -> Any:
        compute = _skipping(lambda chunk: masked(variables, chunk[0], chunk[1], fixed))
        return jax.lax.map(jax.checkpoint(compute, prevent_cse=False), (states, aux))

    def with_gradient(variables: Any, states: Array, aux: Any, fixed: Any) -> Any:
        def compute(chunk: Any) -> Any:
            values, pull = jax.vjp(
                lambda h: masked(variables, h, chunk[1], fixed), chunk[0]
            )
            zeros = tuple(jnp.zeros_like(value) for value in values)
            gradients = [
                pull((*zeros[:i], jnp.ones_like(value), *zeros[i + 1 :]))[0]
                for i, value in enumerate(values)
            ]
            return values, gradients

        return jax.lax.map(_skipping(compute), (states, aux))

    def forward(variables: Any, states: Any, aux: Any, fixed: Any) -> Any:
        plain = jax.tree.map(lambda leaf: leaf.value, (variables, states, aux, fixed))
        if _head_is_trained(logits_fn, variables, states.value[0]):
            values, pull = jax.vjp(
                lambda v, h: recomputing(v, h, *plain[2:]), *plain[:2]
            )
            return values, (pull, None)
        values, gradients = with_gradient(*plain)
        return values, (None, gradients)

    def backward(residuals: Any, cotangents: Any) -> tuple[Any, Any, None, None]:
        pull, gradients = residuals
        if pull is not None:
            return (*pull(jax.tree.map(_filled, cotangents)), None, None)
        total = None
        for gradient, cotangent in zip(gradients, cotangents, strict=True):
            if isinstance(cotangent, SymbolicZero):
                continue
            part = gradient * cotangent[..., None].astype(gradient.dtype)
            total = part if total is None else total + part
        return None, total, None, None

    apply.defvjp(forward, backward, symbolic_zeros=True)
    return apply


def _skipping(compute: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Let a function of a chunk (states, aux) give 0 where the chunk is all padding."""

    def run(chunk: Any) -> Any:
        empty = jax.tree.map(jnp.zeros_like, jax.eval_shape(compute, chunk))
        any_token = jnp.any(chunk[1]["valid"])
        return jax.lax.cond(any_token, compute, lambda _: empty, chunk)

    return run


def _filled(cotangent: Any) -> Any:
    if isinstance(cotangent, SymbolicZero):
        aval: Any = cotangent
        return jnp.zeros(aval.shape, aval.dtype)
    return cotangent


def _head_is_trained(logits_fn: LogitsFn, variables: Any, hidden: Array) -> bool:
    """Tell whether a differentiated leaf is read by the head at all.

    The variables hold the whole model; adapters in the layers are differentiated, but
    the head does not read them.
    """
    values = jax.tree.map(lambda leaf: leaf.value, variables)
    perturbed = jax.tree.leaves(jax.tree.map(lambda leaf: leaf.perturbed, variables))
    jaxpr = jax.make_jaxpr(logits_fn)(values, hidden).jaxpr
    read = {id(var) for eqn in jaxpr.eqns for var in eqn.invars}
    read |= {id(var) for var in jaxpr.outvars}
    inputs = jaxpr.invars[: len(perturbed)]
    return any(
        flag and id(var) in read for flag, var in zip(perturbed, inputs, strict=True)
    )


def bucket_sums(
    values: Float[Array, "b c"], index: Int[Array, "b c"], buckets: int
) -> Float[Array, "b k"]:
    """Sum each row's values by index; negative indices go nowhere.

    >>> values, index = jnp.array([[1.0, 2.0, 4.0]]), jnp.array([[0, -1, 1]])
    >>> bucket_sums(values, index, 2).tolist()
    [[1.0, 4.0]]
    """
    index = jnp.where(index < 0, buckets, index)

    def row(v: Array, i: Array) -> Array:
        return jnp.zeros(buckets + 1, v.dtype).at[i].add(v)[:buckets]

    return jax.vmap(row)(values, index)


def response_sums(
    values: Float[Array, "b c"], completions: Completions, pairs: int
) -> Float[Array, "b p 2"]:
    """Sum token values over each response (chosen, rejected) of each pair.

    Args:
      values: one number a completion token.
      completions: which response each is of.
      pairs: of a row.
    Example:
      >>> row = jnp.zeros((1, 3), jnp.int32)
      >>> which = Completions(row, row, jnp.array([[0, 1, 1]]), row)
      >>> response_sums(jnp.array([[1.0, 2.0, 4.0]]), which, pairs=1).tolist()
      [[[1.0, 6.0]]]
    """
    sums = bucket_sums(values, completions.response, 2 * pairs)
    return sums.reshape(values.shape[0], pairs, 2)


def token_positions(response: Int[Array, "b c"]) -> Int[Array, "b c"]:
    """Return the place of each token in its own response, from 0.

    >>> token_positions(jnp.array([[0, 0, 1, 1, 1, -1]])).tolist()
    [[0, 1, 0, 1, 2, 0]]
    """
    index = jnp.broadcast_to(jnp.arange(response.shape[1]), response.shape)
    before = jnp.pad(response[:, :-1], [(0, 0), (1, 0)], constant_values=-2)
    start = jax.lax.cummax(jnp.where(response != before, index, 0), axis=1)
    return index - start


def segment_sums(
    values: Float[Array, "b c"],
    completions: Completions,
    shape: tuple[int, int],
) -> Float[Array, "b p 2 s"]:
    """Sum token values over each segment; tokens of no segment count nowhere.

    Args:
      values: one number a completion token.
      completions: which segment of which response owns each.
      shape: (pairs a row, segments a response).
    Example:
      >>> row = jnp.zeros((1, 3), jnp.int32)
      >>> which = Completions(row, row, jnp.array([[0, 1, 1]]), jnp.array([[0, 1, -1]]))
      >>> segment_sums(jnp.array([[1.0, 2.0, 4.0]]), which, (1, 2)).tolist()
      [[[[1.0, 0.0], [0.0, 2.0]]]]
    """
    pairs, segments = shape
    owned = (completions.segment >= 0) & (completions.response >= 0)
    index = jnp.where(owned, completions.response * segments + completions.segment, -1)
    sums = bucket_sums(values, index, 2 * pairs * segments)
    return sums.reshape(values.shape[0], pairs, 2, segments)


def segment_token_counts(
    completions: Completions, shape: tuple[int, int]
) -> Float[Array, "b p 2 s"]:
    """Count the tokens of each segment.

    >>> row = jnp.zeros((1, 3), jnp.int32)
    >>> which = Completions(row, row, jnp.array([[0, 1, 1]]), jnp.array([[0, 1, -1]]))
    >>> segment_token_counts(which, (1, 2)).tolist()
    [[[[1.0, 0.0], [0.0, 1.0]]]]
    """
    ones = jnp.ones(completions.target.shape, jnp.float32)
    return segment_sums(ones, completions, shape)
