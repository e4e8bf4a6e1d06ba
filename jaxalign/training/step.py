"""One training step and one evaluation step, as pure functions."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Int, Key

from jaxalign.parallel import sharding
from jaxalign.types import Mean, Metrics, PreferenceBatch


__all__ = [
    "Coupled",
    "LossFn",
    "TrainState",
    "from_saved",
    "init",
    "make_eval_step",
    "make_train_step",
    "to_saved",
]

LossFn = Callable[[Any, Any, PreferenceBatch, Any], tuple[Any, Metrics]]
"""``(trainable, frozen, batch, key) -> (mean loss, metrics)``.

The metrics hold ``loss`` with what the mean is over (pairs, tokens) as its weight."""


class TrainState(NamedTuple):
    """All that training changes."""

    step: Int[Array, ""]
    """Updates made so far."""
    trainable: Any
    opt_state: optax.OptState
    key: Key[Array, ""]


def init(
    trainable: Any,
    tx: optax.GradientTransformation,
    *,
    key: Key[Array, ""],
    mesh: Mesh | None = None,
) -> TrainState:
    """Return the state before the first update.

    Args:
      trainable: the leaves to train.
      tx: optimiser over them.
      key: for dropout.
      mesh: where the leaves lie: the optimiser's numbers are put where their weights
        are, all else on every device, as a step leaves them; or the second step would
        be compiled anew. Without one nothing is moved.
    Example:
      >>> state = init({"w": jnp.ones(2)}, optax.sgd(0.1), key=jax.random.key(0))
      >>> int(state.step), state.trainable["w"].tolist()
      (0, [1.0, 1.0])
    """
    state = TrainState(jnp.zeros((), jnp.int32), trainable, tx.init(trainable), key)
    if mesh is None:
        return state
    everywhere = sharding.replicated(mesh)
    return TrainState(
        step=sharding.put(state.step, everywhere),
        trainable=trainable,
        opt_state=optax.tree_map_params(
            tx,
            sharding.put,
            state.opt_state,
            jax.tree.map(lambda leaf: leaf.sharding, trainable),
            transform_non_params=lambda leaf: sharding.put(leaf, everywhere),
        ),
        key=sharding.put(key, everywhere),
    )


def to_saved(state: TrainState) -> tuple[Any, dict[str, Any]]:
    """Return a state as a checkpoint's two items: what is trained, and the rest.

    >>> state = TrainState(jnp.int32(3), {"w": 1.0}, (), jax.random.key(0))
    >>> trainable, rest = to_saved(state)
    >>> trainable, sorted(rest)
    ({'w': 1.0}, ['key', 'opt_state', 'step'])
    """
    rest = {"step": state.step, "opt_state": state.opt_state, "key": state.key}
    return state.trainable, rest


def from_saved(trainable: Any, optimizer: dict[str, Any]) -> TrainState:
    """Put together what :func:`to_saved` took apart.

    Args:
      trainable: what is trained.
      optimizer: ``step``, ``opt_state`` and ``key``.
    Example:
      >>> state = TrainState(jnp.int32(3), {"w": 1.0}, (), jax.random.key(0))
      >>> int(from_saved(*to_saved(state)).step)
      3
    """
    return TrainState(trainable=trainable, **optimizer)


class Coupled(NamedTuple):
    """A loss in two parts, for when a pair's loss depends on the whole batch."""

    score: Callable[[Any, Any, PreferenceBatch, Any], Any]
    """``(trainable, frozen, batch, key) -> arrays [rows, ...]``, row by row."""
    loss: Callable[[Any, PreferenceBatch], tuple[Any, Metrics]]
    """``(arrays, batch) -> (loss, metrics)`` of all rows together."""


def make_train_step(
    loss_fn: LossFn | Coupled,
    tx: optax.GradientTransformation,
    *,
    dropout: bool = False,
) -> Callable[[TrainState, Any, PreferenceBatch], tuple[TrainState, Metrics]]:
    """Return ``(state, frozen, batch) -> (state, metrics)``.

    The batch has the leading axes [accumulation, rows]. A step equals that of one large
    batch exactly, however the pairs fall on the micro-batches: each one's gradient is
    weighed by what its mean is over, and a coupled loss is taken of all micro-batches'
    scores, which costs one more forward pass. An update that is not finite is left out
    and counted in ``nonfinite``.

    Args:
      loss_fn: what to minimise.
      tx: optimiser over the trained leaves.
      dropout: whether ``loss_fn`` gets a key, another one for each micro-batch.
    Example::

      tx = optax.adamw(1e-4)
      state = step.init(trainable, tx, key=jax.random.key(0))
      train_step = make_train_step(loss_fn, tx)
      state, metrics = train_step(state, frozen, batches)  # leaves are [micro, b, ...]
    """

    def key_of(state: TrainState, micro: Any) -> Any:
        if not dropout:
            return None
        return jax.random.fold_in(jax.random.fold_in(state.key, state.step), micro)

    def gradients(
        state: TrainState, frozen: Any, batch: PreferenceBatch
    ) -> tuple[Any, Metrics]:
        if isinstance(loss_fn, Coupled):
            return _coupled_gradients(loss_fn, state, frozen, batch, key_of)
        return _mean_gradients(loss_fn, state, frozen, batch, key_of)

    def train_step(
        state: TrainState, frozen: Any, batch: PreferenceBatch
    ) -> tuple[TrainState, Metrics]:
        grads, metrics = gradients(state, frozen, batch)
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
        metrics["pairs"] = Mean(batch.pair_mask.sum(), one_step)
        tokens = (batch.inputs.sequence_ids > 0).sum()
        metrics["tokens"] = Mean(tokens, one_step)
        return new, metrics

    return train_step


KeyOf = Callable[[TrainState, Any], Any]


def _mean_gradients(
    loss_fn: LossFn, state: TrainState, frozen: Any, batches: Any, key_of: KeyOf
) -> tuple[Any, Metrics]:
    """Return the gradient of a mean over all micro-batches."""
    gradient = jax.value_and_grad(loss_fn, has_aux=True)

    def one(batch: PreferenceBatch, micro: Any) -> tuple[Any, Metrics]:
        (_, metrics), grads = gradient(
            state.trainable, frozen, batch, key_of(state, micro)
        )
        weight = metrics["loss"].weight
        return jax.tree.map(lambda g: g * weight.astype(g.dtype), grads), metrics

    sums, metrics = _sum_over_micro_batches(one, batches)
    total = jnp.maximum(metrics["loss"].weight, 1)
    return jax.tree.map(lambda g: g / total.astype(g.dtype), sums), metrics


def _coupled_gradients(
    coupled: Coupled, state: TrainState, frozen: Any, batches: Any, key_of: KeyOf
) -> tuple[Any, Metrics]:
    """Return the gradient of a loss of all micro-batches' scores together.

    The scores are computed once without derivatives, the loss gives each score its
    derivative, and the chain rule is then applied to one micro-batch after the other.
    """
    count = batches.pair_mask.shape[0]
    rows = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), batches)

    def score(trainable: Any, batch: PreferenceBatch, micro: Any) -> Any:
        return coupled.score(trainable, frozen, batch, key_of(state, micro))

    if count == 1:

        def whole(trainable: Any) -> tuple[Any, Metrics]:
            return coupled.loss(score(trainable, rows, 0), rows)

        (_, metrics), grads = jax.value_and_grad(whole, has_aux=True)(state.trainable)
        return grads, metrics
    index = jnp.arange(count)
    scores = jax.lax.map(lambda x: score(state.trainable, *x), (batches, index))
    flat = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), scores)
    (_, metrics), slopes = jax.value_and_grad(coupled.loss, has_aux=True)(flat, rows)
    slopes = jax.tree.map(lambda s, like: s.reshape(like.shape), slopes, scores)

    def one(batch: tuple[PreferenceBatch, Any], micro: Any) -> Any:
        inputs, slope = batch
        _, pull = jax.vjp(lambda t: score(t, inputs, micro), state.trainable)
        return pull(slope)[0]

    return _sum_over_micro_batches(one, (batches, slopes)), metrics


def _sum_over_micro_batches(one: Callable[[Any, Any], Any], batches: Any) -> Any:
    """Add up ``one(micro-batch, its index)``."""
    count = jax.tree.leaves(batches)[0].shape[0]
    first = jax.tree.map(lambda leaf: leaf[0], batches)
    if count == 1:
        return one(first, jnp.zeros((), jnp.int32))
    shapes = jax.eval_shape(one, first, jnp.zeros((), jnp.int32))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

    def body(total: Any, xs: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, one(*xs)), None

    return jax.lax.scan(body, zeros, (batches, jnp.arange(count)))[0]


def make_eval_step(
    loss_fn: LossFn,
) -> Callable[[Any, Any, PreferenceBatch], Metrics]:
    """Return ``(trainable, frozen, batch) -> metrics``, without dropout.

    The batch has the leading axes [1, rows], as the loader gives it.

    Args:
      loss_fn: the objective.
    Example:
      >>> def loss_fn(trainable, frozen, batch, key):
      ...     return 0.0, {"loss": Mean(trainable["w"] * batch.scores.sum(), 1.0)}
      >>> yes = jnp.ones((1, 1, 1, 2, 1), bool)  # one micro-batch, one row, one pair
      >>> batch = PreferenceBatch(None, None, 3.0 * yes[..., None], yes, yes[..., 0, 0])
      >>> metrics = make_eval_step(loss_fn)({"w": 0.5}, {}, batch)
      >>> float(metrics["loss"].value)
      3.0
    """

    def eval_step(trainable: Any, frozen: Any, batch: PreferenceBatch) -> Metrics:
        single = jax.tree.map(lambda leaf: leaf[0], batch)
        return loss_fn(trainable, frozen, single, None)[1]

    return eval_step
