"""Numbers that frozen models give to the data: the reference, token weights."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxalign import progress
from jaxalign.checkpoints import load as load_lib
from jaxalign.checkpoints.load import Checkpoint
from jaxalign.data import loader, packing, reference_cache
from jaxalign.data.chat import TokenizedPair
from jaxalign.data.pairs import PairDataset
from jaxalign.objectives import objective, policy
from jaxalign.objectives.record import WeightModels
from jaxalign.parallel import multihost, sharding
from jaxalign.training.config import TrainConfig
from jaxalign.training.objects import OwnModel
from jaxalign.types import Variables


__all__ = [
    "PerToken",
    "Scorer",
    "estimated_weights",
    "reference_logps",
    "reference_of",
    "starting_reference",
]


class PerToken(NamedTuple):
    """Numbers for each completion token of the training and the evaluation data."""

    train: list[np.ndarray] | None = None
    evaluation: list[np.ndarray] | None = None


class Scorer(NamedTuple):
    """What it takes to run a frozen model over all data of a run."""

    config: TrainConfig
    directory: Path | None
    """Where the numbers are kept, if they are."""
    train: PairDataset
    evaluation: PairDataset | None
    shape: packing.BatchShape
    mesh: Mesh
    sources: Mapping[str, str]
    """Fingerprints of the models by their option's name."""
    scopes: tuple[str, ...] = load_lib.WHOLE
    """The parts of other models that are loaded."""

    def score(self, checkpoint: Checkpoint | OwnModel, name: str) -> PerToken:
        """Return a model's log-probabilities of all data, kept on disk."""
        suffix = "" if name == "model" else f"_{name}"

        def part(what: str, data: PairDataset) -> list[np.ndarray]:
            return reference_logps(
                checkpoint,
                checkpoint.variables,
                data,
                self.shape,
                path=self.directory and self.directory / f"{what}{suffix}.npz",
                key=reference_cache.cache_key(
                    data.pairs,
                    self.sources.get(name, ""),
                    _settings(self.config),
                    data.patcher,
                ),
                batch_rows=self.config.batch_rows,
                mesh=self.mesh,
            )

        evaluation = self.evaluation
        return PerToken(
            part("train", self.train),
            None if evaluation is None else part("eval", evaluation),
        )


def _settings(config: TrainConfig) -> str:
    """Name what changes a frozen model's numbers beside its weights."""
    quantised = "" if config.quantize == "none" else f" {config.quantize}"
    return f"{config.dtype}{quantised}"


def reference_of(
    scorer: Scorer, checkpoint: Checkpoint | OwnModel, trainable: Variables
) -> tuple[Variables, PerToken]:
    """Return the reference in the form that the objective looks for.

    Args:
      scorer: data and options of the run.
      checkpoint: the model as loaded.
      trainable: what is trained, at its starting values.
    Returns:
      What ``frozen`` must hold beside the weights (a ``reference`` collection, or
      nothing), and the log-probabilities where they are cached.
    Raises:
      UserError: the reference cannot be loaded, or the cache is of another.
    Example::

      variables, logps = reference_of(scorer, policy.checkpoint, policy.trainable)
      frozen = {**policy.frozen, **variables}
    """
    config = scorer.config
    if not objective.needs(config.objective).reference:
        return {}, PerToken()
    if config.reference == "cached":
        return {}, scorer.score(checkpoint, "model")
    if config.reference != "adapter_off":
        cut: dict[str, Any] = {}
        if isinstance(checkpoint, Checkpoint):
            cut = {
                "groups": checkpoint.groups,
                "vision_groups": checkpoint.vision_groups,
            }
        with progress.reading(f"loading {config.reference}") as show:
            other = load_lib.load(
                config.reference,
                **cut,
                dtype=config.dtype,
                quantize=config.quantize,
                mesh=scorer.mesh,
                scopes=scorer.scopes,
                progress=show,
            )
        return {policy.REFERENCE: {"params": other.variables["params"]}}, PerToken()
    return starting_reference(config, trainable), PerToken()


def starting_reference(config: TrainConfig, trainable: Variables) -> Variables:
    """Return what ``frozen`` must hold where the reference is the model as loaded.

    Base weights that are trained are kept as they were; what an adapter adds to frozen
    ones is left out.

    >>> files = {"model": "smollm2", "data": "pairs.jsonl", "out": "run"}
    >>> config = TrainConfig(max_steps=1, **files)
    >>> adapted = {"params": {"up": None}, "lora": {"a": 1.0}}
    >>> starting_reference(config, adapted)  # the adapter off is the reference
    {}
    >>> starting_reference(config, {"params": {"up": 2.0}})
    {'reference': {'params': {'up': 2.0}}}
    """
    needed = objective.needs(config.objective).reference
    if needed and jax.tree.leaves(trainable.get("params")):
        return {policy.REFERENCE: {"params": trainable["params"]}}
    return {}


def estimated_weights(scorer: Scorer) -> PerToken:
    """Return token weights made from two models, where the objective asks for them.

    Returns:
      A weight a completion token, chosen then rejected; nothing for other objectives.
    Raises:
      UserError: one of the two models cannot be loaded.
    Example::

      weights = estimated_weights(scorer)
      source.token_weights = weights.train
    """
    models = objective.make(scorer.config.objective).weight_models
    if models is None:
        return PerToken()
    good, bad = (
        scorer.score(
            load_lib.load(
                path,
                dtype=scorer.config.dtype,
                quantize=scorer.config.quantize,
                mesh=scorer.mesh,
                scopes=scorer.scopes,
            ),
            name,
        )
        for name, path in models.paths.items()
    )
    evaluation = scorer.evaluation
    return PerToken(
        _weights(models, scorer.train, good.train, bad.train),
        None
        if evaluation is None
        else _weights(models, evaluation, good.evaluation, bad.evaluation),
    )


def _weights(
    models: WeightModels, data: PairDataset, good: Any, bad: Any
) -> list[np.ndarray]:
    return [
        _weights_of_pair(models, *values)
        for values in zip(data.pairs, good, bad, strict=True)
    ]


def _weights_of_pair(
    models: WeightModels, pair: TokenizedPair, good: np.ndarray, bad: np.ndarray
) -> np.ndarray:
    sides = np.split(good - bad, [pair.chosen.num_completion_tokens])
    return np.concatenate(
        [
            np.asarray(models.weights(jnp.asarray(side), chosen=kind))
            for side, kind in zip(sides, (True, False), strict=True)
        ]
    )


def reference_logps(
    checkpoint: Checkpoint | OwnModel,
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

    Args:
      checkpoint: whose model is run.
      variables: of the reference.
      data: the pairs.
      shape: of the batches.
      path: file that keeps the numbers; None keeps none.
      key: see ``reference_cache.cache_key``.
      batch_rows: rows of a batch.
      mesh: devices.
    Returns:
      Of each pair a number a completion token in nats, chosen then rejected, float32.
    Raises:
      UserError: ``path`` holds those of other data or another model.
    Example::

      shape = loader.batch_shape([data], row_length=512)
      logps = reference_logps(base, base.variables, data, shape, path=None, key="",
                              batch_rows=8, mesh=make_mesh(MeshConfig()))
    """
    if path is not None:
        stored = reference_cache.read(path, key)
        if stored is not None:
            progress.say(f"reference: read from {path}")
            return stored
    source = loader.StepSource(
        data,
        shape,
        loader.BatchPlan(batch_rows, 1, 0, shuffle=False),
        num_epochs=1,
        share=sharding.share_of_rows(mesh),
    )
    found: dict[int, np.ndarray] = {}
    steps = range(len(source))
    for step in progress.track(steps, len(source), "reference log-probabilities"):
        batch = jax.tree.map(lambda leaf: leaf[0], source[step])
        on_devices = sharding.put_batch(batch, mesh)
        values, response = multihost.gather(
            (
                _score(variables, on_devices, model=checkpoint.model),
                on_devices.completions.response,
            )
        )
        for r, row in enumerate(source.rows_of_step(step)):
            for slot, index in enumerate(row):
                mine = (response[r] // 2 == slot) & (response[r] >= 0)
                found[index] = values[r][mine]
    logps = [found[index] for index in range(len(data.pairs))]
    if path is not None and multihost.is_first():
        reference_cache.write(path, key, logps)
    return logps


# By the model's value: a second reference in one process compiles nothing.
_score = jax.jit(policy.policy_token_logps, static_argnames="model")
