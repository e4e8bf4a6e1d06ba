"""From checked inputs to a session: weights, state, a compiled step, batches."""

import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import Mesh

from jaxalign import progress, trees
from jaxalign.adapters import adapter
from jaxalign.adapters.adapter import NoAdapter
from jaxalign.checkpoints import adapter_files, runs
from jaxalign.checkpoints.state import StateStore
from jaxalign.data import loader, packing
from jaxalign.models import decoder
from jaxalign.objectives import objective
from jaxalign.parallel import sharding
from jaxalign.training import compilation, evaluation, reference
from jaxalign.training import optimizer as optimizer_lib
from jaxalign.training import start as start_lib
from jaxalign.training import step as step_lib
from jaxalign.training.compilation import StepCompilation
from jaxalign.training.config import TrainConfig
from jaxalign.training.inputs import RunInputs
from jaxalign.training.preemption import Preemption
from jaxalign.training.start import StartingPolicy, StartLayout
from jaxalign.training.step import LossFn, TrainState
from jaxalign.types import Metrics, Model, Variables


__all__ = ["Session", "setup"]


class Session(NamedTuple):
    """A run that is ready to step."""

    config: TrainConfig
    run: Path
    """Its directory."""
    state: TrainState
    """Where to go on; donated to the first step."""
    start: int
    """Updates made already."""
    frozen: Variables
    source: loader.StepSource
    batches: Any
    """Host batches from step ``start`` on, with ``get_state`` and ``set_state``."""
    put: Callable[[Any], Any]
    """Sends a host batch to the devices."""
    step_fn: Callable[[TrainState, Any, Any], tuple[TrainState, Metrics]]
    """Compiled."""
    evaluate: Callable[[TrainState], dict[str, float]] | None
    """Returns ``eval_*`` values."""
    store: StateStore


def setup(
    inputs: RunInputs,
    run: Path,
    store: StateStore,
    *,
    preemption: Preemption | None = None,
) -> Session:
    """Load the model, restore what an earlier start saved, compile the step.

    Args:
      inputs: see ``inputs.read_inputs``.
      run: directory of the run.
      store: its checkpoints.
      preemption: evaluation stops when it comes.
    Raises:
      UserError: weights that are not what their headers said.
    """
    config, data, source = inputs.config, inputs.data, inputs.source
    rows = source.rows_of_epoch(0)
    fill = packing.fill(rows, data.train.lengths, data.shape.row_length)
    progress.say(f"rows: {len(rows)} of {data.shape.row_length}, {fill:.1%} full")
    tx = optimizer_lib.make_optimizer(config.optimizer, source.num_steps)
    put = functools.partial(sharding.put_batch, mesh=inputs.mesh, leading=1)
    layout = start_lib.lay_out(config, run / runs.ADAPTER_START)
    ahead = _compile_ahead(inputs, layout, tx, put)
    policy = _load(inputs, layout, run / runs.ADAPTER_START)
    numbers = _frozen_numbers(inputs, run, policy)
    policy = policy._replace(frozen={**policy.frozen, **numbers.variables})
    source.ref_logps, source.token_weights = numbers.ref.train, numbers.weights.train
    state, start, data_state = _restore(
        store, _initial_state(config, policy, tx, inputs.mesh), source.num_steps
    )
    loss_fn, to_minimise = _losses(inputs, policy.checkpoint.model)
    step_fn = _compiled(
        ahead,
        _train_step(inputs, to_minimise, tx),
        state,
        policy.frozen,
        put(source[start]),
    )
    batches = loader.make_iterator(source, workers=config.data_workers)
    if data_state is not None:
        batches.set_state(data_state)
    evaluate = evaluation.make_evaluate(
        config,
        data,
        policy.frozen,
        loss_fn,
        ref_logps=numbers.ref.evaluation,
        token_weights=numbers.weights.evaluation,
        put=put,
        preemption=preemption,
    )
    return Session(
        config=config,
        run=run,
        state=state,
        start=start,
        frozen=policy.frozen,
        source=source,
        batches=batches,
        put=put,
        step_fn=step_fn,
        evaluate=evaluate,
        store=store,
    )


def _load(inputs: RunInputs, layout: StartLayout, start: Path) -> StartingPolicy:
    """Load the starting policy, and keep the adapter's part of it."""
    config = inputs.config
    began = time.monotonic()
    policy = start_lib.load_start(
        config,
        inputs.mesh,
        layout,
        **_kernel(inputs),
    )
    if not isinstance(config.adapter, NoAdapter) and not start.is_file():
        whole = trees.combine(policy.trainable, policy.frozen)
        own = {name: whole[name] for name in adapter.COLLECTIONS if name in whole}
        if jax.process_index() == 0:
            adapter_files.write_start(own, start)
    shapes = decoder.param_shapes(policy.checkpoint.config.text)
    progress.say(
        f"model: {trees.num_params(shapes):,} weights, "
        f"{trees.num_params(policy.trainable):,} trained, loaded in "
        f"{time.monotonic() - began:.1f} s"
    )
    return policy


class _FrozenNumbers(NamedTuple):
    """What frozen models give to the run."""

    variables: Variables
    """A separate reference's weights, if there is one."""
    ref: reference.PerToken
    weights: reference.PerToken


def _frozen_numbers(
    inputs: RunInputs, run: Path, policy: StartingPolicy
) -> _FrozenNumbers:
    config, data = inputs.config, inputs.data
    scorer = reference.Scorer(
        config,
        Path(config.reference_cache or run / "reference"),
        data.train,
        data.evaluation,
        data.shape,
        inputs.mesh,
        inputs.fingerprints,
    )
    weights = reference.estimated_weights(scorer)
    frozen, ref = reference.reference_of(scorer, policy.checkpoint, policy.trainable)
    return _FrozenNumbers(frozen, ref, weights)


def _losses(
    inputs: RunInputs, model: Model
) -> tuple[LossFn, LossFn | step_lib.Coupled]:
    """Return the loss of a batch, and the one that a step minimises."""
    config = inputs.config
    options: dict[str, Any] = {
        "config": config.objective,
        "aspects": inputs.data.aspects,
        "router_weight": config.router_weight,
    }
    loss_fn = functools.partial(objective.loss_fn, model=model, **options)
    if not objective.needs(config.objective).coupled:
        return loss_fn, loss_fn
    return loss_fn, step_lib.Coupled(
        functools.partial(objective.score, model=model, config=config.objective),
        functools.partial(objective.loss_of_tokens, **options),
    )


def _initial_state(
    config: TrainConfig,
    policy: StartingPolicy,
    tx: optax.GradientTransformation,
    mesh: Mesh,
) -> TrainState:
    """Make the state, every leaf on the mesh where its weight is."""
    everywhere = sharding.replicated(mesh)
    # A copy: the state is donated, and the starting values may still be the reference.
    trainable = jax.tree.map(lambda leaf: leaf.copy(), policy.trainable)
    where = jax.tree.map(lambda leaf: leaf.sharding, trainable)
    key = jax.random.fold_in(jax.random.key(config.seed), 2)
    state = step_lib.init(trainable, tx, key=key)
    opt_state = optax.tree_map_params(
        tx,
        jax.device_put,
        state.opt_state,
        where,
        transform_non_params=lambda leaf: jax.device_put(leaf, everywhere),
    )
    return TrainState(
        step=jax.device_put(state.step, everywhere),
        trainable=trainable,
        opt_state=opt_state,
        key=jax.device_put(state.key, everywhere),
    )


def _restore(
    store: StateStore, state: TrainState, num_steps: int
) -> tuple[TrainState, int, dict[str, Any] | None]:
    """Return the newest saved state, its step, and where the data stood then."""
    saved = store.restore(*step_lib.to_saved(state))
    if saved is None:
        return state, 0, None
    progress.say(f"going on after step {saved.step} of {num_steps}")
    state = step_lib.from_saved(saved.trainable, saved.optimizer)
    return state, saved.step, saved.data


def _train_step(
    inputs: RunInputs,
    to_minimise: LossFn | step_lib.Coupled,
    tx: optax.GradientTransformation,
) -> Callable[..., Any]:
    dropout = adapter.dropout(inputs.config.adapter) > 0
    return step_lib.make_train_step(to_minimise, tx, dropout=dropout)


def _compile_ahead(
    inputs: RunInputs,
    layout: StartLayout,
    tx: optax.GradientTransformation,
    put: Callable[[Any], Any],
) -> StepCompilation | None:
    """Begin to compile the step by what config and headers tell of the weights.

    None where that is not all: weights held as they are stored or as codes, and
    numbers of a reference that is computed first.
    """
    config = inputs.config
    if config.dtype == "auto" or config.quantize != "none":
        return None
    if config.reference != "adapter_off" or objective.weight_models(config.objective):
        return None
    trainable, frozen = start_lib.expected_start(config, inputs.mesh, layout)
    frozen = {**frozen, **reference.starting_reference(config, trainable)}
    model = start_lib.expected_model(config, inputs.mesh, layout, **_kernel(inputs))
    train_step = _train_step(inputs, _losses(inputs, model)[1], tx)
    state = compilation.abstract_state(trainable, tx, inputs.mesh)
    return compilation.compile_ahead(train_step, state, frozen, put(inputs.source[0]))


def _kernel(inputs: RunInputs) -> dict[str, Any]:
    return {
        "attention": inputs.kernel.implementation,
        "sequences": inputs.data.shape.pairs,
    }


def _compiled(
    ahead: StepCompilation | None,
    train_step: Callable[..., Any],
    state: TrainState,
    frozen: Variables,
    batch: Any,
) -> Callable[..., Any]:
    began = time.monotonic()
    progress.say("compiling the training step ...")
    if ahead is None:
        ahead = compilation.compile_ahead(train_step, state, frozen, batch)
    step_fn = ahead.result(state, frozen, batch)
    progress.say(f"compiled in {time.monotonic() - began:.1f} s")
    return step_fn
