"""One training step and one evaluation step, as pure functions."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, Key

from jaxalign.types import Mean, Metrics, PreferenceBatch


__all__ = ["LossFn", "TrainState", "init", "make_eval_step", "make_train_step"]

LossFn = Callable[[Any, Any, PreferenceBatch, Any], tuple[Any, Metrics]]
"""``(trainable, frozen, batch, key) -> (mean loss, metrics)``.

The metrics hold ``loss`` with the number of pairs as its weight."""


class TrainState(NamedTuple):
    """All that training changes."""

    step: Int[Array, ""]
    """Updates made so far."""
    trainable: Any
    opt_state: optax.OptState
    key: Key[Array, ""]


def init(
    trainable: Any, tx: optax.GradientTransformation, *, key: Key[Array, ""]
) -> TrainState:
    """Return the state before the first update."""
    return TrainState(jnp.zeros((), jnp.int32), trainable, tx.init(trainable), key)


def make_train_step(
    loss_fn: LossFn, tx: optax.GradientTransformation, *, dropout: bool = False
) -> Callable[[TrainState, Any, PreferenceBatch], tuple[TrainState, Metrics]]:
    """Return ``(state, frozen, batch) -> (state, metrics)``.

    The batch has the leading axes [accumulation, rows]. Each micro-batch's gradient is
    weighed by its pairs, so that a step equals that of one large batch exactly, however
    the pairs fall on the micro-batches. An update that is not finite is left out and
    counted in ``nonfinite``.

    Args:
      loss_fn: what to minimise.
      tx: optimiser over the trained leaves.
      dropout: whether ``loss_fn`` gets a key, another one for each micro-batch.
    """
    gradient = jax.value_and_grad(loss_fn, has_aux=True)

    def one(
        state: TrainState, frozen: Any, batch: PreferenceBatch, micro: Array
    ) -> tuple[Any, Metrics]:
        key = None
        if dropout:
            key = jax.random.fold_in(jax.random.fold_in(state.key, state.step), micro)
        (_, metrics), grads = gradient(state.trainable, frozen, batch, key)
        weight = metrics["loss"].weight
        return jax.tree.map(lambda g: g * weight.astype(g.dtype), grads), metrics

    def accumulate(
        state: TrainState, frozen: Any, batches: PreferenceBatch
    ) -> tuple[Any, Metrics]:
        count = batches.pair_mask.shape[0]
        first = jax.tree.map(lambda leaf: leaf[0], batches)
        if count == 1:
            return one(state, frozen, first, jnp.zeros((), jnp.int32))
        shapes = jax.eval_shape(one, state, frozen, first, jnp.zeros((), jnp.int32))
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

        def body(total: Any, xs: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, one(state, frozen, *xs)), None

        return jax.lax.scan(body, zeros, (batches, jnp.arange(count)))[0]

    def train_step(
        state: TrainState, frozen: Any, batch: PreferenceBatch
    ) -> tuple[TrainState, Metrics]:
        sums, metrics = accumulate(state, frozen, batch)
        pairs = jnp.maximum(metrics["loss"].weight, 1)
        grads = jax.tree.map(lambda g: g / pairs.astype(g.dtype), sums)
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(norm) & jnp.isfinite(metrics["loss"].total)
        safe = jax.tree.map(lambda g: jnp.where(finite, g, 0), grads)
        updates, opt_state = tx.update(safe, state.opt_state, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)

        def keep(new: Array, old: Array) -> Array:
            return jnp.where(finite, new, old)

        new = TrainState(
            step=state.step + 1,
            trainable=jax.tree.map(keep, trainable, state.trainable),
            opt_state=jax.tree.map(keep, opt_state, state.opt_state),
            key=state.key,
        )
        one_step = jnp.ones(())
        metrics["grad_norm"] = Mean(norm, one_step)
        metrics["nonfinite"] = Mean((~finite).astype(jnp.float32), one_step)
        metrics["pairs"] = Mean(metrics["loss"].weight, one_step)
        tokens = (batch.inputs.sequence_ids > 0).sum()
        metrics["tokens"] = Mean(tokens, one_step)
        return new, metrics

    return train_step


def make_eval_step(
    loss_fn: LossFn,
) -> Callable[[Any, Any, PreferenceBatch], Metrics]:
    """Return ``(trainable, frozen, batch) -> metrics``, without dropout.

    The batch has the leading axes [1, rows], as the loader gives it.
    """

    def eval_step(trainable: Any, frozen: Any, batch: PreferenceBatch) -> Metrics:
        single = jax.tree.map(lambda leaf: leaf[0], batch)
        return loss_fn(trainable, frozen, single, None)[1]

    return eval_step
