"""What a run starts from: all that is read and checked before weights are loaded."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from jax.sharding import Mesh

from jaxalign import progress, trees
from jaxalign.adapters import adapter
from jaxalign.adapters.adapter import PeftConfig
from jaxalign.checkpoints import adapter_files, adapter_start, contents, hub, runs
from jaxalign.checkpoints import load as load_lib
from jaxalign.checkpoints.adapter_files import AdapterFiles
from jaxalign.checkpoints.renderer import open_renderer
from jaxalign.data import kept_pairs, loader, packing, records, rows, seen
from jaxalign.data.kept_features import Kept
from jaxalign.data.pairs import PairDataset
from jaxalign.data.seen import Seen
from jaxalign.errors import UserError
from jaxalign.models import decoder
from jaxalign.models.attention.choice import KernelChoice
from jaxalign.models.config import DecoderConfig
from jaxalign.objectives import objective
from jaxalign.parallel import sharding
from jaxalign.parallel.mesh import make_mesh
from jaxalign.training import attention, kept_parts
from jaxalign.training import optimizer as optimizer_lib
from jaxalign.training.checks import check_records, check_tokens, check_trained
from jaxalign.training.config import TrainConfig, check_branches
from jaxalign.training.objects import NAMES_ONLY, RunObjects, given_records
from jaxalign.types import Variables


__all__ = [
    "RunData",
    "RunInputs",
    "fingerprints",
    "given_adapter",
    "plan_steps",
    "read_inputs",
]


class RunData(NamedTuple):
    """Tokenised records, and the shape of the batches that hold them."""

    train: PairDataset
    evaluation: PairDataset | None
    aspects: tuple[str, ...]
    shape: packing.BatchShape


class RunInputs(NamedTuple):
    """A run whose model, options and data fit each other."""

    config: TrainConfig
    mesh: Mesh
    kernel: KernelChoice | None
    """Of attention; None for a model that brings its own."""
    data: RunData
    source: loader.StepSource
    """The batch of every step."""
    fingerprints: dict[str, str]
    """Of model and data, by their option's name; how pictures are made into patches."""
    objects: RunObjects = NAMES_ONLY
    """What was given in the place of names."""
    kept: Kept | None = None
    """What is kept of the pictures' way through the model; None: nothing."""
    seen: Seen | None = None
    """Hashes of what is trained on; None where the run's directory has them."""


def read_inputs(config: TrainConfig, objects: RunObjects = NAMES_ONLY) -> RunInputs:
    """Read and check all that a run starts from, but for the weights.

    Args:
      config: of the run, with the names of the objects (``objects.with_names``).
      objects: what stands in the place of names.
    Raises:
      UserError: something the user gave is wrong.
    """
    mesh = make_mesh(config.mesh)
    model, kernel, kept = None, None, None
    if objects.own_model is None:
        model, collections = _check_model(config, own_tx=objects.tx is not None)
        kept = _kept(config, collections, objects)
        kernel = attention.choose(config, model, mesh, prefix="prefix" in collections)
        progress.say(f"attention: {kernel.implementation} ({kernel.reason})")
    elif config.image_features == "cached":
        raise UserError(
            "image_features cached needs a model of the library's, whose tower it "
            "knows: got an OwnModel. Leave it out"
        )
    found, held_out = _records(config, objects)
    data = _prepared(config, model, found, held_out)
    prints = fingerprints(config, objects, [*found, *held_out])
    if data.shape.patches and data.train.patcher is not None:
        prints[runs.PICTURES] = data.train.patcher.settings
    source = plan_steps(config, data, mesh)
    hashes = None
    if config.out and not (Path(config.out) / seen.SEEN).is_file():
        hashes = seen.seen_of(progress.track(found, len(found), "hashing"))
    return RunInputs(config, mesh, kernel, data, source, prints, objects, kept, hashes)


def given_adapter(config: TrainConfig, start: Path | None = None) -> Variables | None:
    """Read the adapter that training goes on from, if it does from one.

    Args:
      config: of the run.
      start: file that keeps a begun run's starting values.
    """
    if start is not None and start.is_file():
        return adapter_files.read_start(start)
    if isinstance(config.adapter, PeftConfig):
        return AdapterFiles(Path(config.adapter.path), config.model).collections()
    return None


def _check_model(
    config: TrainConfig, *, own_tx: bool = False
) -> tuple[DecoderConfig, Variables]:
    """Check what is to be trained, and on what, by the headers of the files.

    Returns:
      The model's config, and the shapes of its adapter.
    """
    model = load_lib.open_config(config.model)[0]
    load_lib.check(config.model)
    if config.router_weight and model.text.mixture is None:
        raise UserError(
            f"router_weight {config.router_weight} has no effect: {config.model} is no "
            "mixture of experts. Leave it out"
        )
    collections = given_adapter(config)
    if collections is None:
        shapes, collections = adapter_start.shapes(config.adapter, model)
    else:
        groups = adapter_files.groups_of(collections, model.text.num_layers)
        cut = adapter_files.vision_groups_of(collections, model)
        shapes = decoder.param_shapes(model, groups, cut)
    check_trained(shapes, collections, config.trainable, config.quantize)
    if adapter.reads_ahead(collections):
        check_branches(config.objective, "the adapter's mean_gate")
    if not own_tx:
        mask = trees.mask_from_patterns(shapes, config.trainable)
        trained = {**collections, "params": trees.partition(shapes, mask)[0]}
        optimizer_lib.check_rates(config.optimizer, trained)
    if adapter.dropout(config.adapter) and "lora" not in collections:
        raise UserError(
            f"adapter.dropout {adapter.dropout(config.adapter)} has no effect: the "
            "adapter has no LoRA. Leave it out"
        )
    for what, other in _other_models(config).items():
        if load_lib.open_config(other)[0] != model:
            raise UserError(
                f"{what} {other} is not of the same architecture as "
                f"{config.model}: their config.json differ"
            )
        load_lib.check(other)
    return model.text, collections


def _other_models(config: TrainConfig) -> dict[str, str]:
    """Return the paths of what is run on the data beside the model that is trained."""
    others = {
        f"objective.{name}": path
        for name, path in objective.weight_models(config.objective).items()
    }
    if config.reference not in ("adapter_off", "cached"):
        others["the reference"] = config.reference
    return others


def _kept(
    config: TrainConfig, collections: Variables, objects: RunObjects
) -> Kept | None:
    """Return what is kept of the pictures' way through the model."""
    if config.image_features == "recompute":
        return None
    model = load_lib.open_config(config.model)[0]
    mask = trees.mask_from_patterns(decoder.param_shapes(model), config.trainable)
    changed = kept_parts.changed_scopes(collections, mask)
    if objects.checkpoint is not None:
        changed |= kept_parts.changed_scopes(objects.checkpoint.variables)
    kept = kept_parts.kept_of(config.model, changed, sees=model.sees)
    kept_parts.check_same_eyes(config.model, _other_models(config), kept)
    return kept


def plan_steps(config: TrainConfig, data: RunData, mesh: Mesh) -> loader.StepSource:
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
        share=sharding.share_of_rows(mesh),
    )
    optimizer_lib.make_schedule(config.optimizer, source.num_steps)
    return source


def _records(
    config: TrainConfig, objects: RunObjects
) -> tuple[list[records.Record], list[records.Record]]:
    """Return the records to train on and those to evaluate on.

    Raises:
      UserError: some are malformed, or evaluations are asked for without any.
    """
    if objects.rows is not None:
        train_records = given_records(objects.rows)
    else:
        train_records = records.read(
            config.data, config.layout, image_dir=config.image_dir
        )
    eval_records: list[records.Record] = []
    if objects.eval_rows is not None:
        eval_records = given_records(objects.eval_rows, "evaluation row")
    elif config.eval_data:
        eval_records = records.read(
            config.eval_data, config.layout, image_dir=config.image_dir
        )
    elif config.eval_steps != TrainConfig.eval_steps:
        # Said, not refused: files of options for several runs have it too.
        progress.say(
            f"eval_steps {config.eval_steps} has no effect without data to evaluate "
            "on: give eval_data (in Python eval_rows)"
        )
    return train_records, eval_records


def _prepared(
    config: TrainConfig,
    model: DecoderConfig | None,
    train_records: list[records.Record],
    eval_records: list[records.Record],
) -> RunData:
    """Check and tokenise all data."""
    aspects = records.aspects_of([*train_records, *eval_records])
    check_records(config.objective, [*train_records, *eval_records], aspects)
    renderer = open_renderer(
        config.model, config.chat_template_kwargs, max_pixels=config.max_pixels
    )
    files = kept_pairs.tokenizer_files(hub.directory_of(config.model, weights=False))
    needs = objective.needs(config.objective)

    def prepare(part: Sequence[records.Record], what: str) -> PairDataset:
        data = kept_pairs.prepare(
            part,
            renderer,
            files=files,
            max_length=config.max_length,
            overflow=config.overflow,
            aspects=aspects,
            form=needs.form,
            end_of_turn=needs.end_of_turn,
            learn_prompt=needs.prompt,
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
        row_patches=config.row_patches,
    )
    for part in (train_data, eval_data):
        if part is not None and model is not None:
            check_tokens(part, model, config.model)
    return RunData(train_data, eval_data, aspects, shape)


def _summary(report: dict[str, int]) -> str:
    shown = [f"{report['pairs']} pairs"]
    for name, count in report.items():
        if count and name not in ("pairs",):
            shown.append(f"{name.replace('_', ' ')} {count}")
    return ", ".join(shown)


def fingerprints(
    config: TrainConfig,
    objects: RunObjects = NAMES_ONLY,
    given: Sequence[records.Record] = (),
) -> dict[str, str]:
    """Return hashes of all that a run is made from, by their option's name.

    A loaded checkpoint is known by its files, rows by what they hold. Of a model of
    another kind, and of an optimiser, only who gives them knows that they are the same.
    """
    sources = {}
    if objects.own_model is None:
        sources["model"] = contents.fingerprint(config.model)
    if objects.rows is not None or objects.eval_rows is not None:
        text = "\n".join(repr(record) for record in given)
        sources["data"] = hashlib.sha256(text.encode()).hexdigest()
    else:
        sources["data"] = rows.fingerprint(config.data)
        if config.eval_data:
            sources["eval_data"] = rows.fingerprint(config.eval_data)
    if isinstance(config.adapter, PeftConfig):
        sources["adapter"] = adapter_files.fingerprint(Path(config.adapter.path))
    if config.reference not in ("adapter_off", "cached"):
        sources["reference"] = contents.fingerprint(config.reference)
    for name, path in objective.weight_models(config.objective).items():
        sources[name] = contents.fingerprint(path)
    return sources
