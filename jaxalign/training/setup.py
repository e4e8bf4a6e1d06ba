"""From checked inputs to a session: weights, state, a compiled step, batches."""

import contextlib
import dataclasses
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
from jaxalign.checkpoints import adapter_files, fastest, runs
from jaxalign.checkpoints.load import Checkpoint
from jaxalign.checkpoints.state import StateStore
from jaxalign.configs import read_yaml
from jaxalign.data import loader, seen
from jaxalign.models import decoder
from jaxalign.objectives import objective as objective_lib
from jaxalign.objectives.options import ObjectiveConfig
from jaxalign.objectives.own import LossOfPairs
from jaxalign.objectives.record import Objective
from jaxalign.parallel import multihost, sharding
from jaxalign.training import (
    compilation,
    encoding,
    evaluation,
    kept_parts,
    reference,
    run_directory,
)
from jaxalign.training import optimizer as optimizer_lib
from jaxalign.training import start as start_lib
from jaxalign.training import step as step_lib
from jaxalign.training.compilation import StepCompilation
from jaxalign.training.config import TrainConfig
from jaxalign.training.inputs import RunInputs, read_inputs
from jaxalign.training.objects import (
    OwnModel,
    Rows,
    RunObjects,
    partitioned,
    with_names,
)
from jaxalign.training.preemption import Preemption
from jaxalign.training.session import Session
from jaxalign.training.start import StartingPolicy, StartLayout
from jaxalign.training.step import LossFn, TrainState
from jaxalign.types import Model, Variables


__all__ = ["open_session", "setup"]


def setup(
    config: TrainConfig,
    *,
    objective: Objective | LossOfPairs | ObjectiveConfig | None = None,
    model: Checkpoint | OwnModel | None = None,
    rows: Rows | None = None,
    eval_rows: Rows | None = None,
    tx: optax.GradientTransformation | None = None,
    preemption: Preemption | None = None,
) -> Session:
    """Return a run that is ready to step, with objects in the place of names.

    What is given as an object has an empty text in the config. With ``out=""`` the
    session keeps no files: no log (``fit`` has ``report``), no checkpoints, nothing to
    close. With a directory all is as with ``jaxalign train``, resuming included, and
    the session holds it until it is closed: ``with setup(...) as session``.

    Going on with a begun run, an objective is known by its name and code, rows by what
    they hold, a checkpoint by its files; that a model of another kind, changed weights,
    an optimiser or what a closure holds are the same, only the caller can know.

    Args:
      config: of the run.
      objective: a loss ``(tokens, batch) -> [b, p]`` of one's own, or all that
        ``objectives.own`` says; or the config of one of the library's.
      model: as ``load_hf`` returned it, with the groups that the adapter needs; or an
        ``OwnModel``, whose variables hold their adapter, or of which
        ``config.trainable`` says what is trained. ``config.model`` is then where its
        tokenizer is. What was given stays as it is: the session trains a copy. An NNX
        state, or whatever else is no dict, is ``params`` of the session's model and
        variables: ``session.variables["params"]`` is the trained state.
      rows: feedback records to train on, dicts or ``Record``; read once.
      eval_rows: those to evaluate on.
      tx: optimiser over the trained leaves, in the place of ``config.optimizer``; it
        clips and schedules itself.
      preemption: evaluation stops when it comes.
    Raises:
      UserError: something that was given is wrong.
    Example::

      base = load_hf("smollm2", adapter=LoRAConfig(rank=4))
      config = TrainConfig(model="", data="", out="", max_steps=10, row_length=512)
      session = setup(config, model=base, rows=[{"prompt": "2 + 2?", "chosen": "4",
                                                 "rejected": "5"}])
      fit(session)
      save_hf(session.variables, "tuned", like=base)
    """
    if isinstance(model, OwnModel):
        model = model.with_collections()
    objects = RunObjects(objective, model, rows, eval_rows, tx)
    config = with_names(config, objects)
    kept = fastest.kept_in(Path(config.out) / runs.CONFIG) if config.out else None
    dtype = fastest.resolve(config.dtype, config.model, kept=kept)
    inputs = read_inputs(dataclasses.replace(config, dtype=dtype), objects)
    if not config.out:
        return open_session(inputs, None, None, preemption=preemption)
    with contextlib.ExitStack() as stack:
        run = stack.enter_context(
            run_directory.claim(
                inputs.config,
                inputs.fingerprints,
                before=lambda run: read_yaml(run / runs.CONFIG),
            )
        )
        store = StateStore(run / runs.CHECKPOINTS, keep=config.save_total_limit)
        stack.callback(store.close)
        session = open_session(inputs, run, store, preemption=preemption)
        session.resources = stack.pop_all()
    return session


def open_session(
    inputs: RunInputs,
    run: Path | None,
    store: StateStore | None,
    *,
    preemption: Preemption | None = None,
) -> Session:
    """Load the model, restore what an earlier start saved, compile the step.

    Args:
      inputs: see ``inputs.read_inputs``.
      run: directory of the run, if it has one.
      store: its checkpoints, if it keeps any.
      preemption: evaluation stops when it comes.
    Raises:
      UserError: weights that are not what their headers said.
    Example::

      inputs = read_inputs(config, RunObjects())
      session = open_session(inputs, run=None, store=None)
      state = fit(session)
    """
    if run is not None and inputs.seen is not None and multihost.is_first():
        seen.write(run / seen.SEEN, inputs.seen)
    inputs = encoding.encoded_inputs(inputs, run)
    config, data, source = inputs.config, inputs.data, inputs.source
    rows = source.rows_of_epoch(0)
    progress.say(f"rows: {loader.filled(rows, data.train, data.shape)}")
    tx = inputs.objects.tx
    schedule = None
    if tx is None:
        tx = optimizer_lib.make_optimizer(config.optimizer, source.num_steps)
        schedule = optimizer_lib.make_schedule(config.optimizer, source.num_steps)
    put = functools.partial(sharding.put_batch, mesh=inputs.mesh, leading=1)
    ahead, policy = _start(inputs, run, tx, put)
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
    evaluate = evaluation.make_evaluate(
        config,
        data,
        policy.frozen,
        loss_fn,
        ref_logps=numbers.ref.evaluation,
        token_weights=numbers.weights.evaluation,
        put=put,
        mesh=inputs.mesh,
        preemption=preemption,
    )
    return Session(
        config=config,
        run=run,
        state=state,
        step=start,
        data_state=data_state,
        model=policy.checkpoint.model,
        frozen=policy.frozen,
        source=source,
        put=put,
        step_fn=step_fn,
        evaluate=evaluate,
        store=store,
        schedule=schedule,
    )


def _start(
    inputs: RunInputs, run: Path | None, tx: optax.GradientTransformation, put: Any
) -> tuple[StepCompilation | None, StartingPolicy]:
    """Load what is trained; compile its step meanwhile, if that is known."""
    config, own_model = inputs.config, inputs.objects.own_model
    if own_model is not None:
        parts = partitioned(own_model, config, inputs.mesh)
        return None, StartingPolicy(own_model, *parts)
    start = None if run is None else run / runs.ADAPTER_START
    checkpoint = inputs.objects.checkpoint
    if checkpoint is not None:
        layout = start_lib.given_layout(start_lib.lay_out(config, start), checkpoint)
        return None, _load(inputs, layout, start)
    scopes = kept_parts.scopes_to_load(inputs.kept)
    layout = start_lib.lay_out(config, start, scopes)
    ahead = _compile_ahead(inputs, layout, tx, put)
    return ahead, _load(inputs, layout, start)


def _load(inputs: RunInputs, layout: StartLayout, start: Path | None) -> StartingPolicy:
    """Load the starting policy, and keep the adapter's part of it."""
    config = inputs.config
    began = time.monotonic()
    policy = start_lib.load_start(
        config,
        inputs.mesh,
        layout,
        given=inputs.objects.checkpoint,
        **_kernel(inputs),
    )
    has_adapter = not isinstance(config.adapter, NoAdapter)
    if has_adapter and start is not None and not start.is_file():
        whole = trees.combine(policy.trainable, policy.frozen)
        own = {name: whole[name] for name in adapter.COLLECTIONS if name in whole}
        own = multihost.gather(own)
        if multihost.is_first():
            adapter_files.write_start(own, start)
    shapes = decoder.param_shapes(layout.model)
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
    inputs: RunInputs, run: Path | None, policy: StartingPolicy
) -> _FrozenNumbers:
    config, data = inputs.config, inputs.data
    place = config.reference_cache or (run and run / "reference")
    scorer = reference.Scorer(
        config,
        None if place is None else Path(place),
        data.train,
        data.evaluation,
        data.shape,
        inputs.mesh,
        inputs.fingerprints,
        kept_parts.scopes_to_load(inputs.kept),
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
    loss_fn = functools.partial(objective_lib.loss_fn, model=model, **options)
    if not objective_lib.needs(config.objective).coupled:
        return loss_fn, loss_fn
    return loss_fn, step_lib.Coupled(
        functools.partial(objective_lib.score, model=model, config=config.objective),
        functools.partial(objective_lib.loss_of_tokens, **options),
    )


def _initial_state(
    config: TrainConfig,
    policy: StartingPolicy,
    tx: optax.GradientTransformation,
    mesh: Mesh,
) -> TrainState:
    """Make the state, every leaf on the mesh where its weight is."""
    # A copy: the state is donated, and the starting values may still be the reference.
    trainable = jax.tree.map(lambda leaf: leaf.copy(), policy.trainable)
    key = jax.random.fold_in(jax.random.key(config.seed), 2)
    return step_lib.init(trainable, tx, key=key, mesh=mesh)


def _restore(
    store: StateStore | None, state: TrainState, num_steps: int
) -> tuple[TrainState, int, dict[str, Any] | None]:
    """Return the newest saved state, its step, and where the data stood then."""
    saved = store and store.restore(*step_lib.to_saved(state))
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
    if config.reference != "adapter_off" or objective_lib.weight_models(
        config.objective
    ):
        return None
    trainable, frozen = start_lib.expected_start(config, inputs.mesh, layout)
    frozen = {**frozen, **reference.starting_reference(config, trainable)}
    model = start_lib.expected_model(config, inputs.mesh, layout, **_kernel(inputs))
    train_step = _train_step(inputs, _losses(inputs, model)[1], tx)
    state = compilation.abstract_state(trainable, tx, inputs.mesh)
    return compilation.compile_ahead(train_step, state, frozen, put(inputs.source[0]))


def _kernel(inputs: RunInputs) -> dict[str, Any]:
    assert inputs.kernel is not None  # of a model of the library's
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
    multihost.barrier("compiled")
    return step_fn
