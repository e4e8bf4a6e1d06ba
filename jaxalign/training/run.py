"""A training run from its config to its last checkpoint."""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from jaxalign import trees
from jaxalign.adapters import lora, selection
from jaxalign.adapters.lora import LoRAConfig
from jaxalign.checkpoints import load as load_lib
from jaxalign.checkpoints import tensors
from jaxalign.checkpoints.load import Checkpoint
from jaxalign.checkpoints.state import StateStore
from jaxalign.data import chat, loader, packing, pairs, records, reference_cache
from jaxalign.data.pairs import PairDataset
from jaxalign.errors import UserError
from jaxalign.models import decoder
from jaxalign.models.layers import DecoderConfig
from jaxalign.objectives import dpo2d, policy
from jaxalign.objectives.dpo2d import DPO2DConfig
from jaxalign.parallel import sharding
from jaxalign.parallel.mesh import make_mesh
from jaxalign.training import loop, progress, run_directory
from jaxalign.training import metrics as metrics_lib
from jaxalign.training import optimizer as optimizer_lib
from jaxalign.training import step as step_lib
from jaxalign.training.config import OBJECTIVES, NoAdapter, TrainConfig, to_dict
from jaxalign.training.loop import Preemption
from jaxalign.training.step import LossFn, TrainState
from jaxalign.types import Metrics, Variables


__all__ = [
    "Policy",
    "check_scores",
    "check_tokens",
    "layer_groups",
    "load_policy",
    "train",
]


class Policy(NamedTuple):
    """A loaded model, split into what is trained and what is not."""

    checkpoint: Checkpoint
    trainable: Variables
    frozen: Variables


def layer_groups(
    adapter: LoRAConfig | NoAdapter, config: DecoderConfig
) -> tuple[selection.Group, ...]:
    """Return how the adapter's choice cuts the layers into stacks."""
    if isinstance(adapter, NoAdapter):
        return ((0, config.num_layers),)
    chosen = selection.parse_layers(adapter.layers, config.num_layers)
    return selection.cut_groups(config.num_layers, [chosen])


def load_policy(config: TrainConfig, mesh: Mesh) -> Policy:
    """Load the model of a run and make its adapters, at their starting values."""
    model_config, family = load_lib.open_config(config.model)
    adapter = config.adapter
    dropout = 0.0 if isinstance(adapter, NoAdapter) else adapter.dropout
    groups = layer_groups(adapter, model_config)
    shapes = decoder.param_shapes(model_config, groups)
    trained = trees.mask_from_patterns(shapes, config.trainable)
    keeps = dict(zip(trees.paths(shapes), jax.tree.leaves(trained), strict=True))
    checkpoint = load_lib.load(
        config.model,
        groups=groups,
        dtype=jnp.dtype(config.dtype),
        float32=keeps.__getitem__,
        mesh=mesh,
        remat=config.remat,
        lora_dropout=dropout,
        attention_block=config.attention_block,
    )
    variables = dict(checkpoint.variables)
    if isinstance(adapter, LoRAConfig):
        key = jax.random.fold_in(jax.random.key(config.seed), 1)
        adapters = lora.init(key, variables["params"], adapter)
        where = sharding.param_shardings(adapters, mesh, family.SHARDING)
        variables["lora"] = jax.tree.map(jax.device_put, adapters, where)
        mask = trees.mask_from_patterns(variables, lora.TRAINABLE)
    else:
        mask = {"params": trained}
    trainable, frozen = trees.partition(variables, mask)
    return Policy(checkpoint, trainable, frozen)


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
    data = _prepare_data(config, _check_model(config))
    source = _plan_steps(config, data)
    sources = _fingerprints(config)
    with run_directory.claim(config, sources) as run:
        store = StateStore(run / "checkpoints", keep=config.save_total_limit)
        try:
            _train(config, run, store, mesh, data, source, sources, preemption)
        finally:
            store.close()
    return run


class _Data(NamedTuple):
    train: PairDataset
    evaluation: PairDataset | None
    aspects: tuple[str, ...]
    shape: packing.BatchShape


def _check_model(config: TrainConfig) -> DecoderConfig:
    """Check what is to be trained, and on what, by the headers of the files."""
    model_config = load_lib.open_config(config.model)[0]
    groups = layer_groups(config.adapter, model_config)
    shapes = load_lib.check(config.model, groups=groups)
    trees.mask_from_patterns(shapes, config.trainable)
    if isinstance(config.adapter, LoRAConfig):
        layers = lora.linear_layers(shapes)
        selection.check_targets(config.adapter.targets, (path for path, _ in layers))
    if config.reference not in ("adapter_off", "cached"):
        if load_lib.open_config(config.reference)[0] != model_config:
            raise UserError(
                f"the reference {config.reference} is not of the same architecture as "
                f"{config.model}: their config.json differ"
            )
        load_lib.check(config.reference)
    return model_config


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
    check_scores(config.objective, [*train_records, *eval_records], aspects)
    tokenizer = chat.load_tokenizer(config.model)

    def prepare(found: Sequence[records.Record], what: str) -> PairDataset:
        data = pairs.prepare(
            found,
            tokenizer,
            max_length=config.max_length,
            overflow=config.overflow,
            aspects=aspects,
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


def check_tokens(data: PairDataset, model_config: DecoderConfig, model: str) -> None:
    """Refuse tokens that a model has no embedding for.

    Raises:
      UserError: the tokenizer gives such a token.
    """
    largest = max(
        int(tokens.max())
        for pair in data.pairs
        for tokens in (pair.prompt, pair.chosen.tokens, pair.rejected.tokens)
    )
    if largest >= model_config.vocab_size:
        raise UserError(
            f"the tokenizer gives the token {largest}, but the model {model} has "
            f"{model_config.vocab_size}: their files are of different checkpoints"
        )


def _summary(report: dict[str, int]) -> str:
    shown = [f"{report['pairs']} pairs"]
    for name, count in report.items():
        if count and name not in ("pairs",):
            shown.append(f"{name.replace('_', ' ')} {count}")
    return ", ".join(shown)


def check_scores(
    objective: Any, found: Sequence[records.Record], aspects: tuple[str, ...]
) -> None:
    """Refuse data whose scores the objective cannot use.

    Raises:
      UserError: 2D-DPO without segments in a record, an unknown aspect, a score outside
        of 0 to ``max_score`` where the scale matters.
    """
    if not isinstance(objective, DPO2DConfig):
        return
    dpo2d.resolve_aspect_weights(objective.aspect_weights, aspects)
    scaled = objective.normalize == "max" or objective.rejected_weight == "inverted"
    for record in found:
        for field in ("chosen_segments", "rejected_segments"):
            segments = getattr(record, field)
            if segments is None:
                raise UserError(
                    f"{record.where}: field {field} is missing, which dpo2d needs: add "
                    "the scored segments, or use objective.name=dpo"
                )
            for i, segment in enumerate(segments):
                for aspect, score in segment.scores.items():
                    if scaled and not 0 <= score <= objective.max_score:
                        raise UserError(
                            f"{record.where}: field {field}[{i}].scores.{aspect}: "
                            f"got {score}, expected 0 to objective.max_score="
                            f"{objective.max_score}. Set objective.max_score to the "
                            "top of your scale, or objective.normalize=none"
                        )


def _fingerprints(config: TrainConfig) -> dict[str, str]:
    sources = {
        "model": tensors.fingerprint(Path(config.model)),
        "data": run_directory.hash_file(config.data),
    }
    if config.eval_data:
        sources["eval_data"] = run_directory.hash_file(config.eval_data)
    if config.reference not in ("adapter_off", "cached"):
        sources["reference"] = tensors.fingerprint(Path(config.reference))
    return sources


def _train(
    config: TrainConfig,
    run: Path,
    store: StateStore,
    mesh: Mesh,
    data: _Data,
    source: loader.StepSource,
    sources: dict[str, str],
    preemption: Preemption | None,
) -> None:
    if source.num_steps in store.steps():
        progress.say(f"{run} is finished: {source.num_steps} steps")
        return
    rows = source.rows_of_epoch(0)
    full = packing.fill(rows, data.train.lengths, data.shape.row_length)
    progress.say(f"rows: {len(rows)} of {data.shape.row_length}, {full:.1%} full")

    began = time.monotonic()
    loaded = load_policy(config, mesh)
    progress.say(
        f"model: {trees.num_params(loaded.checkpoint.variables['params']):,} weights, "
        f"{trees.num_params(loaded.trainable):,} trained, loaded in "
        f"{time.monotonic() - began:.1f} s"
    )
    loaded, eval_refs = _with_reference(
        config, run, loaded, source, data, mesh, sources
    )
    tx = optimizer_lib.make_optimizer(config.optimizer, source.num_steps)
    state = _initial_state(config, loaded, tx, mesh)
    restored = store.restore(state)
    start, data_state = 0, None
    if restored is not None:
        start, state, data_state = restored
        progress.say(f"going on after step {start} of {source.num_steps}")

    loss_fn = functools.partial(
        OBJECTIVES[config.objective.name].loss_fn,
        model=loaded.checkpoint.model,
        config=config.objective,
        aspects=data.aspects,
    )
    put = functools.partial(sharding.put_batch, mesh=mesh, leading=1)
    evaluate = _make_evaluate(config, loaded, data, eval_refs, loss_fn, put, preemption)
    dropout = isinstance(config.adapter, LoRAConfig) and config.adapter.dropout > 0
    began = time.monotonic()
    progress.say("compiling the training step ...")
    step_fn = (
        jax.jit(
            step_lib.make_train_step(loss_fn, tx, dropout=dropout),
            donate_argnums=0,
            out_shardings=(jax.tree.map(lambda leaf: leaf.sharding, state), None),
        )
        .lower(state, loaded.frozen, put(source[start]))
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
        progress.TrainingDisplay(source.num_steps, start) as display,
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
            start=start,
            log=log,
            store=store,
            data_state=batches.get_state,
            evaluate=evaluate,
            extra=extra,
            show=display.show,
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


def _with_reference(
    config: TrainConfig,
    run: Path,
    loaded: Policy,
    source: loader.StepSource,
    data: _Data,
    mesh: Mesh,
    sources: dict[str, str],
) -> tuple[Policy, list[np.ndarray] | None]:
    """Put the reference where the objective looks for it.

    Returns:
      The policy with a ``reference`` collection where one is needed, and the cached
      log-probabilities of the evaluation data where they are cached (those of the
      training data go to ``source``).
    """
    frozen = dict(loaded.frozen)
    if config.reference not in ("adapter_off", "cached"):
        other = load_lib.load(
            config.reference,
            groups=loaded.checkpoint.groups,
            dtype=jnp.dtype(config.dtype),
            mesh=mesh,
        )
        frozen[policy.REFERENCE] = {"params": other.variables["params"]}
    elif config.reference == "cached":
        cached = {}
        directory = Path(config.reference_cache or run / "reference")
        variables = loaded.checkpoint.variables
        for name, part in (("train", data.train), ("eval", data.evaluation)):
            if part is not None:
                cached[name] = reference_logps(
                    loaded.checkpoint,
                    variables,
                    part,
                    data.shape,
                    path=directory / f"{name}.npz",
                    key=reference_cache.cache_key(
                        part.pairs, sources["model"], config.dtype
                    ),
                    batch_rows=config.batch_rows,
                    mesh=mesh,
                )
        source.ref_logps = cached["train"]
        return loaded._replace(frozen=frozen), cached.get("eval")
    elif loaded.trainable.get("params") is not None and jax.tree.leaves(
        loaded.trainable["params"]
    ):
        frozen[policy.REFERENCE] = {"params": loaded.trainable["params"]}
    return loaded._replace(frozen=frozen), None


def reference_logps(
    checkpoint: Checkpoint,
    variables: Variables,
    data: PairDataset,
    shape: packing.BatchShape,
    *,
    path: Path | None,
    key: str,
    batch_rows: int,
    mesh: Mesh,
) -> list[np.ndarray]:
    """Return log-probabilities of every pair's completion tokens, kept on disk.

    Raises:
      UserError: ``path`` holds those of other data or another model.
    """
    if path is not None:
        stored = reference_cache.read(path, key)
        if stored is not None:
            progress.say(f"reference: read from {path}")
            return stored
    source = loader.StepSource(
        data, shape, loader.BatchPlan(batch_rows, 1, 0, shuffle=False), num_epochs=1
    )
    score = jax.jit(
        functools.partial(policy.policy_token_logps, model=checkpoint.model)
    )
    found: dict[int, np.ndarray] = {}
    steps = range(len(source))
    for step in progress.track(steps, len(source), "reference log-probabilities"):
        batch = jax.tree.map(lambda leaf: leaf[0], source[step])
        values = np.asarray(score(variables, sharding.put_batch(batch, mesh)))
        for r, row in enumerate(source.rows_of_step(step)):
            for slot, index in enumerate(row):
                mine = batch.completions.response[r] // 2 == slot
                found[index] = values[r][mine & (batch.completions.response[r] >= 0)]
    logps = [found[index] for index in range(len(data.pairs))]
    if path is not None:
        reference_cache.write(path, key, logps)
    return logps


def _make_evaluate(
    config: TrainConfig,
    loaded: Policy,
    data: _Data,
    ref_logps: list[np.ndarray] | None,
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
        ref_logps=ref_logps,
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
        return metrics_lib.to_floats(total or {}, "eval_")

    return evaluate
