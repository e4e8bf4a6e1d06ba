"""A training run from its config to its last checkpoint."""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from jaxalign import progress, trees
from jaxalign.adapters import adapter
from jaxalign.adapters.adapter import NoAdapter, PeftConfig
from jaxalign.checkpoints import adapter_files, adapter_start, contents, hub
from jaxalign.checkpoints import load as load_lib
from jaxalign.checkpoints.adapter_files import AdapterFiles
from jaxalign.checkpoints.load import Checkpoint
from jaxalign.checkpoints.state import StateStore
from jaxalign.configs import to_dict
from jaxalign.data import chat, loader, packing, pairs, records, rows
from jaxalign.data.pairs import PairDataset
from jaxalign.errors import UserError
from jaxalign.models import decoder
from jaxalign.models.attention.choice import Implementation, KernelChoice
from jaxalign.models.config import DecoderConfig
from jaxalign.objectives import objective
from jaxalign.parallel import sharding
from jaxalign.parallel.mesh import make_mesh
from jaxalign.training import attention, loop, reference, run_directory
from jaxalign.training import metrics as metrics_lib
from jaxalign.training import optimizer as optimizer_lib
from jaxalign.training import step as step_lib
from jaxalign.training.checks import check_records, check_tokens
from jaxalign.training.config import TrainConfig, check_branches
from jaxalign.training.loop import Preemption
from jaxalign.training.step import LossFn, TrainState
from jaxalign.types import Metrics, Variables


__all__ = [
    "Policy",
    "load_policy",
    "train",
]


class Policy(NamedTuple):
    """A loaded model, split into what is trained and what is not."""

    checkpoint: Checkpoint
    trainable: Variables
    frozen: Variables


def load_policy(
    config: TrainConfig,
    mesh: Mesh,
    *,
    start: Path | None = None,
    attention: Implementation = "xla",
    sequences: int | None = None,
) -> Policy:
    """Load the model of a run and its adapter, at its starting values.

    Args:
      config: of the run.
      mesh: devices.
      start: file that keeps the starting values; where it is not there (yet) they are
        made.
      attention: the kernel.
      sequences: most of them in a row.
    """
    model_config, family = load_lib.open_config(config.model)
    collections = _given_adapter(config, start)
    if collections is not None:
        groups = adapter_files.groups_of(collections, model_config.num_layers)
    else:
        shapes = decoder.param_shapes(model_config)
        groups = adapter.groups(config.adapter, shapes, model_config.num_layers)
    shapes = decoder.param_shapes(model_config, groups)
    trained = trees.mask_from_patterns(shapes, config.trainable)
    keeps = dict(zip(trees.paths(shapes), jax.tree.leaves(trained), strict=True))
    with progress.reading(f"loading {config.model}") as show:
        checkpoint = load_lib.load(
            config.model,
            groups=groups,
            dtype=config.dtype,
            float32=keeps.__getitem__,
            quantize=config.quantize,
            mesh=mesh,
            progress=show,
            remat=config.remat,
            lora_dropout=adapter.dropout(config.adapter),
            attention_implementation=attention,
            attention_block=config.attention_block,
            attention_sequences=sequences,
        )
    variables = dict(checkpoint.variables)
    if isinstance(config.adapter, NoAdapter):
        mask = {"params": trained}
    else:
        if collections is None:
            key = jax.random.fold_in(jax.random.key(config.seed), 1)
            collections = adapter_start.make(key, config.adapter, checkpoint)
        variables |= adapter_start.place(collections, mesh, family)
        # By the plain shapes, so that a checkpoint does not tell how the base was held.
        mask = adapter.trained({**variables, "params": shapes})
    trainable, frozen = trees.partition(variables, mask)
    return Policy(checkpoint, trainable, frozen)


def _given_adapter(config: TrainConfig, start: Path | None = None) -> Variables | None:
    """Read the adapter that training goes on from, if it does from one."""
    if start is not None and start.is_file():
        return adapter_files.read_start(start)
    if isinstance(config.adapter, PeftConfig):
        return AdapterFiles(Path(config.adapter.path), config.model).collections()
    return None


def train(config: TrainConfig, *, preemption: Preemption | None = None) -> Path:
    """Run a training run, or what is left of it.

    Everything that can be wrong with config and data is checked before the weights are
    loaded. A run that was interrupted at any moment goes on from its newest checkpoint
    and ends with the same numbers, to the last bit.

    Args:
      config: the run.
      preemption: SIGTERM, if it is to be caught.
    Returns:
      The run directory.
    Raises:
      UserError: something the user gave is wrong.
      Preempted: SIGTERM came; all is saved.
      TrainingDiverged: updates were not finite.
    """
    mesh = make_mesh(config.mesh)
    model_config, made = _check_model(config)
    chosen = attention.choose(config, model_config, mesh, prefix="prefix" in made)
    progress.say(f"attention: {chosen.implementation} ({chosen.reason})")
    data = _prepare_data(config, model_config)
    source = _plan_steps(config, data)
    sources = _fingerprints(config)
    with run_directory.claim(config, sources) as run:
        store = StateStore(run / "checkpoints", keep=config.save_total_limit)
        try:
            _train(config, run, store, mesh, data, source, sources, chosen, preemption)
        finally:
            store.close()
    return run


class _Data(NamedTuple):
    train: PairDataset
    evaluation: PairDataset | None
    aspects: tuple[str, ...]
    shape: packing.BatchShape


def _check_model(config: TrainConfig) -> tuple[DecoderConfig, Variables]:
    """Check what is to be trained, and on what, by the headers of the files.

    Returns:
      The model's config, and the shapes of its adapter.
    """
    model_config = load_lib.open_config(config.model)[0]
    shapes = load_lib.check(config.model)
    trees.mask_from_patterns(shapes, config.trainable)
    if config.router_weight and model_config.mixture is None:
        raise UserError(
            f"router_weight {config.router_weight} has no effect: {config.model} is no "
            "mixture of experts. Leave it out"
        )
    made = _given_adapter(config)
    if made is None:
        made = adapter_start.shapes(config.adapter, model_config)[1]
    if adapter.reads_ahead(made):
        check_branches(config.objective, "the adapter's mean_gate")
    optimizer_lib.check_rates(config.optimizer, made)
    if adapter.dropout(config.adapter) and "lora" not in made:
        raise UserError(
            f"adapter.dropout {adapter.dropout(config.adapter)} has no effect: the "
            "adapter has no LoRA. Leave it out"
        )
    others = {
        f"objective.{name}": path
        for name, path in objective.weight_models(config.objective).items()
    }
    if config.reference not in ("adapter_off", "cached"):
        others["the reference"] = config.reference
    for what, other in others.items():
        if load_lib.open_config(other)[0] != model_config:
            raise UserError(
                f"{what} {other} is not of the same architecture as "
                f"{config.model}: their config.json differ"
            )
        load_lib.check(other)
    return model_config, made


def _plan_steps(config: TrainConfig, data: _Data) -> loader.StepSource:
    """Plan the batches of all steps and check that the schedule fits them."""
    plan = loader.BatchPlan(
        config.batch_rows, config.gradient_accumulation_steps, config.seed
    )
    source = loader.StepSource(
        data.train,
        data.shape,
        plan,
        num_steps=config.max_steps,
        num_epochs=config.num_train_epochs,
        process=(jax.process_index(), jax.process_count()),
    )
    optimizer_lib.make_schedule(config.optimizer, source.num_steps)
    return source


def _prepare_data(config: TrainConfig, model_config: DecoderConfig) -> _Data:
    """Read, check and tokenise all data."""
    train_records = records.read(config.data)
    eval_records = records.read(config.eval_data) if config.eval_data else []
    aspects = records.aspects_of([*train_records, *eval_records])
    check_records(config.objective, [*train_records, *eval_records], aspects)
    tokenizer = chat.load_tokenizer(str(hub.directory_of(config.model, weights=False)))
    asked = objective.needs(config.objective)

    def prepare(found: Sequence[records.Record], what: str) -> PairDataset:
        data = pairs.prepare(
            found,
            tokenizer,
            max_length=config.max_length,
            overflow=config.overflow,
            aspects=aspects,
            form=asked.form,
            end_of_turn=asked.end_of_turn,
            learn_prompt=asked.prompt,
            progress=lambda items, n: progress.track(items, n, f"tokenising {what}"),
        )
        progress.say(f"{what}: {_summary(data.report)}")
        return data

    train_data = prepare(train_records, "training data")
    eval_data = prepare(eval_records, "evaluation data") if eval_records else None
    shape = loader.batch_shape(
        [data for data in (train_data, eval_data) if data is not None],
        row_length=config.row_length,
        pack=config.packing,
    )
    for part in (train_data, eval_data):
        if part is not None:
            check_tokens(part, model_config, config.model)
    return _Data(train_data, eval_data, aspects, shape)


def _summary(report: dict[str, int]) -> str:
    shown = [f"{report['pairs']} pairs"]
    for name, count in report.items():
        if count and name not in ("pairs",):
            shown.append(f"{name.replace('_', ' ')} {count}")
    return ", ".join(shown)


def _fingerprints(config: TrainConfig) -> dict[str, str]:
    sources = {
        "model": contents.fingerprint(config.model),
        "data": rows.fingerprint(config.data),
    }
    if config.eval_data:
        sources["eval_data"] = rows.fingerprint(config.eval_data)
    if isinstance(config.adapter, PeftConfig):
        sources["adapter"] = adapter_files.fingerprint(Path(config.adapter.path))
    if config.reference not in ("adapter_off", "cached"):
        sources["reference"] = contents.fingerprint(config.reference)
    for name, path in objective.weight_models(config.objective).items():
        sources[name] = contents.fingerprint(path)
    return sources


def _train(
    config: TrainConfig,
    run: Path,
    store: StateStore,
    mesh: Mesh,
    data: _Data,
    source: loader.StepSource,
    sources: dict[str, str],
    chosen: KernelChoice,
    preemption: Preemption | None,
) -> None:
    if source.num_steps in store.steps():
        progress.say(f"{run} is finished: {source.num_steps} steps")
        return
    rows = source.rows_of_epoch(0)
    full = packing.fill(rows, data.train.lengths, data.shape.row_length)
    progress.say(f"rows: {len(rows)} of {data.shape.row_length}, {full:.1%} full")

    began = time.monotonic()
    start = run / run_directory.ADAPTER_START
    loaded = load_policy(
        config,
        mesh,
        start=start,
        attention=chosen.implementation,
        sequences=data.shape.pairs,
    )
    if not isinstance(config.adapter, NoAdapter) and not start.is_file():
        made = trees.combine(loaded.trainable, loaded.frozen)
        own = {name: made[name] for name in adapter.COLLECTIONS if name in made}
        if jax.process_index() == 0:
            adapter_files.write_start(own, start)
    progress.say(
        f"model: {trees.num_params(decoder.param_shapes(loaded.checkpoint.config)):,} "
        f"weights, {trees.num_params(loaded.trainable):,} trained, loaded in "
        f"{time.monotonic() - began:.1f} s"
    )
    scorer = reference.Scorer(
        config,
        Path(config.reference_cache or run / "reference"),
        data.train,
        data.evaluation,
        data.shape,
        mesh,
        sources,
    )
    weights = reference.estimated_weights(scorer)
    extra_frozen, cached = reference.reference_of(
        scorer, loaded.checkpoint, loaded.trainable
    )
    loaded = loaded._replace(frozen={**loaded.frozen, **extra_frozen})
    source.ref_logps, source.token_weights = cached.train, weights.train
    tx = optimizer_lib.make_optimizer(config.optimizer, source.num_steps)
    state = _initial_state(config, loaded, tx, mesh)
    restored = store.restore(state)
    first, data_state = 0, None
    if restored is not None:
        first, state, data_state = restored
        progress.say(f"going on after step {first} of {source.num_steps}")

    model = loaded.checkpoint.model
    options: dict[str, Any] = {
        "config": config.objective,
        "aspects": data.aspects,
        "router_weight": config.router_weight,
    }
    loss_fn = functools.partial(objective.loss_fn, model=model, **options)
    to_minimise: LossFn | step_lib.Coupled = loss_fn
    if objective.needs(config.objective).coupled:
        to_minimise = step_lib.Coupled(
            functools.partial(objective.score, model=model, config=config.objective),
            functools.partial(objective.loss_of_tokens, **options),
        )
    put = functools.partial(sharding.put_batch, mesh=mesh, leading=1)
    evaluate = _make_evaluate(
        config,
        loaded,
        data,
        (cached.evaluation, weights.evaluation),
        loss_fn,
        put,
        preemption,
    )
    dropout = adapter.dropout(config.adapter) > 0
    began = time.monotonic()
    progress.say("compiling the training step ...")
    step_fn = (
        jax.jit(
            step_lib.make_train_step(to_minimise, tx, dropout=dropout),
            donate_argnums=0,
            out_shardings=(jax.tree.map(lambda leaf: leaf.sharding, state), None),
        )
        .lower(state, loaded.frozen, put(source[first]))
        .compile()
    )
    progress.say(f"compiled in {time.monotonic() - began:.1f} s")

    batches = loader.make_iterator(source, workers=config.data_workers)
    if data_state is not None:
        batches.set_state(data_state)
    schedule = optimizer_lib.make_schedule(config.optimizer, source.num_steps)

    def extra(step: int) -> dict[str, float]:
        return {
            "learning_rate": np.asarray(schedule(step - 1)).item(),
            "epoch": source.epoch_of(step - 1) if step else 0.0,
        }

    with (
        contextlib.closing(
            metrics_lib.open_log(
                run, metrics_lib.parse_report_to(config.report_to), to_dict(config)
            )
        ) as log,
        progress.TrainingDisplay(source.num_steps, first) as display,
    ):
        loop.fit(
            state,
            loaded.frozen,
            batches,
            step_fn=step_fn,
            put=put,
            config=loop.LoopConfig(
                num_steps=source.num_steps,
                logging_steps=config.logging_steps,
                eval_steps=config.eval_steps,
                save_steps=config.save_steps,
            ),
            start=first,
            log=log,
            store=store,
            data_state=batches.get_state,
            evaluate=evaluate,
            extra=extra,
            show=display.show,
            warn=progress.say,
            preemption=preemption,
        )


def _initial_state(
    config: TrainConfig, loaded: Policy, tx: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """Make the state, every leaf on the mesh where its weight is."""
    everywhere = sharding.replicated(mesh)
    # A copy: the state is donated, and the starting values may still be the reference.
    trainable = jax.tree.map(lambda leaf: leaf.copy(), loaded.trainable)
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


def _make_evaluate(
    config: TrainConfig,
    loaded: Policy,
    data: _Data,
    per_token: tuple[list[np.ndarray] | None, list[np.ndarray] | None],
    loss_fn: LossFn,
    put: Callable[[Any], Any],
    preemption: Preemption | None,
) -> Callable[[TrainState], dict[str, float]] | None:
    if data.evaluation is None:
        return None
    source = loader.StepSource(
        data.evaluation,
        data.shape,
        loader.BatchPlan(config.batch_rows, 1, 0, shuffle=False),
        num_epochs=1,
        ref_logps=per_token[0],
        token_weights=per_token[1],
    )
    eval_step = jax.jit(step_lib.make_eval_step(loss_fn))

    def batches() -> Iterator[Any]:
        for step in range(len(source)):
            yield put(source[step])

    def evaluate(state: TrainState) -> dict[str, float]:
        total: Metrics | None = None
        for batch in batches():
            if preemption is not None and preemption.requested:
                return {}
            part = jax.device_get(eval_step(state.trainable, loaded.frozen, batch))
            total = part if total is None else metrics_lib.merge(total, part)
        return _with_mixed_loss(
            metrics_lib.to_floats(total or {}, "eval_"), config.objective
        )

    return evaluate


def _with_mixed_loss(
    values: dict[str, float], mix: objective.Objective
) -> dict[str, float]:
    """Make a mix's loss of its members' exact means over all batches."""
    if isinstance(mix, objective.MixConfig):
        parts = objective.members(mix)
        values["eval_loss"] = sum(
            factor * values[f"eval_loss/{part.name}"] for factor, part in parts
        )
    return values
