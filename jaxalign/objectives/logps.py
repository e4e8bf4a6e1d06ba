"""The one log-probability primitive, and the sums that objectives are made of."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float, Int

from jaxalign.types import Completions, Variables


__all__ = ["response_sums", "segment_sums", "segment_token_counts", "token_logps"]

LogitsFn = Callable[[Any, Any], Any]


def token_logps(
    logits_fn: LogitsFn,
    variables: Variables,
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
    """
    rows, wanted = completions.target.shape
    if chunk_size is None:
        # Small, because the last chunk of a row is part padding.
        chunk_size = max(128, 16 * rows)
    per_row = min(wanted, max(1, chunk_size // rows))
    chunks = -(-wanted // per_row)

    def split(x: Array, fill: int) -> Array:
        padded = jnp.pad(
            x, [(0, 0), (0, chunks * per_row - wanted)], constant_values=fill
        )
        return padded.reshape(rows, chunks, per_row).swapaxes(0, 1)

    source = split(completions.source, 0)
    target = split(completions.target, 0)
    valid = split(completions.response, -1) >= 0
    index = source.swapaxes(0, 1).reshape(rows, chunks * per_row, 1)
    picked = jnp.take_along_axis(hidden, index, axis=1)
    picked = picked.reshape(rows, chunks, per_row, -1).swapaxes(0, 1)
    logps = _chunked(logits_fn)(variables, picked, target, valid)
    return logps.swapaxes(0, 1).reshape(rows, chunks * per_row)[:, :wanted]


def _chunk_logps(
    logits_fn: LogitsFn,
    variables: Variables,
    hidden: Array,
    target: Array,
    valid: Array,
) -> Array:
    logits = logits_fn(variables, hidden).astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0]
    logps = chosen - jax.nn.logsumexp(logits, axis=-1)
    return jnp.where(valid, logps, 0.0)


def _chunked(logits_fn: LogitsFn) -> Callable[..., Array]:
    """Return ``(variables, hidden [k b m d], target, valid) -> logps [k b m]``."""

    def skipping(compute: Callable[..., Any], chunk: tuple[Array, ...]) -> Any:
        empty = jax.tree.map(jnp.zeros_like, jax.eval_shape(compute, chunk))
        return jax.lax.cond(jnp.any(chunk[-1]), compute, lambda _: empty, chunk)

    @jax.custom_vjp
    def apply(
        variables: Variables, hidden: Array, target: Array, valid: Array
    ) -> Array:
        def compute(chunk: tuple[Array, ...]) -> Array:
            return _chunk_logps(logits_fn, variables, *chunk)

        return jax.lax.map(lambda c: skipping(compute, c), (hidden, target, valid))

    def recomputing(
        variables: Variables, hidden: Array, target: Array, valid: Array
    ) -> Array:
        def compute(chunk: tuple[Array, ...]) -> Array:
            return _chunk_logps(logits_fn, variables, *chunk)

        body = jax.checkpoint(lambda c: skipping(compute, c), prevent_cse=False)
        return jax.lax.map(body, (hidden, target, valid))

    def with_gradient(
        variables: Variables, hidden: Array, target: Array, valid: Array
    ) -> tuple[Array, Array]:
        def compute(chunk: tuple[Array, ...]) -> tuple[Array, Array]:
            states, targets, keep = chunk
            logps, pull = jax.vjp(
                lambda h: _chunk_logps(logits_fn, variables, h, targets, keep), states
            )
            return logps, pull(jnp.ones_like(logps))[0]

        return jax.lax.map(lambda c: skipping(compute, c), (hidden, target, valid))

    def forward(
        variables: Any, hidden: Any, target: Any, valid: Any
    ) -> tuple[Any, Any]:
        values = jax.tree.map(lambda leaf: leaf.value, variables)
        arrays = (hidden.value, target.value, valid.value)
        if _head_is_trained(logits_fn, variables, hidden.value[0]):
            logps, pull = jax.vjp(
                lambda v, h: recomputing(v, h, arrays[1], arrays[2]), values, arrays[0]
            )
            return logps, (pull, None)
        logps, gradient = with_gradient(values, *arrays)
        return logps, (None, gradient)

    def backward(residuals: Any, cotangent: Any) -> tuple[Any, Any, None, None]:
        pull, gradient = residuals
        if isinstance(cotangent, SymbolicZero):
            return None, None, None, None
        if pull is not None:
            return (*pull(cotangent), None, None)
        weighted = gradient * cotangent[..., None].astype(gradient.dtype)
        return None, weighted, None, None

    apply.defvjp(forward, backward, symbolic_zeros=True)
    return apply


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


def _bucket_sums(values: Array, index: Array, buckets: int) -> Array:
    """Sum each row's values by index; negative indices go nowhere."""
    index = jnp.where(index < 0, buckets, index)

    def row(v: Array, i: Array) -> Array:
        return jnp.zeros(buckets + 1, v.dtype).at[i].add(v)[:buckets]

    return jax.vmap(row)(values, index)


def response_sums(
    values: Float[Array, "b c"], response: Int[Array, "b c"], pairs: int
) -> Float[Array, "b p 2"]:
    """Sum token values over each response (chosen, rejected) of each pair."""
    rows = values.shape[0]
    return _bucket_sums(values, response, 2 * pairs).reshape(rows, pairs, 2)


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
    """
    pairs, segments = shape
    owned = (completions.segment >= 0) & (completions.response >= 0)
    index = jnp.where(owned, completions.response * segments + completions.segment, -1)
    sums = _bucket_sums(values, index, 2 * pairs * segments)
    return sums.reshape(values.shape[0], pairs, 2, segments)


def segment_token_counts(
    completions: Completions, shape: tuple[int, int]
) -> Float[Array, "b p 2 s"]:
    """Count the tokens of each segment."""
    ones = jnp.ones(completions.target.shape, jnp.float32)
    return segment_sums(ones, completions, shape)
