"""A policy from a base model and an adapter: a PEFT directory or a run."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxalign import progress, trees
from jaxalign.checkpoints import adapter_start, contents
from jaxalign.checkpoints import load as load_lib
from jaxalign.checkpoints.adapter_files import AdapterFiles
from jaxalign.checkpoints.load import Checkpoint
from jaxalign.checkpoints.state import StateStore
from jaxalign.errors import UserError
from jaxalign.models.quantised import Quantize
from jaxalign.parallel import sharding
from jaxalign.parallel.mesh import MeshConfig, make_mesh
from jaxalign.training import optimizer as optimizer_lib
from jaxalign.training import run as run_lib
from jaxalign.training import run_directory
from jaxalign.training import step as step_lib
from jaxalign.training.config import TrainConfig
from jaxalign.types import Variables


__all__ = ["Restored", "load_adapted", "load_run"]


class Restored(NamedTuple):
    """A model with adapters or trained weights on top of its base."""

    checkpoint: Checkpoint
    variables: Variables
    """``params`` and the adapter, ``lora`` or ``prefix`` or both, if there is one."""
    base: Variables
    """``params`` as they were before training: the reference."""
    config: TrainConfig | None
    """Of the run it came from, if any."""
    step: int | None


def load_adapted(
    model: str,
    adapter: str | None,
    *,
    dtype: Any = jnp.float32,
    quantize: Quantize | None = None,
    mesh: Mesh | None = None,
) -> Restored:
    """Load a checkpoint with an adapter on it.

    Args:
      model: Hugging Face directory or id.
      adapter: PEFT directory, exported hybrid, run directory, or None.
      dtype: of the weights and of the computation.
      quantize: how base weights are held; default as in the run, elsewhere ``none``.
      mesh: devices; default the first.
    Raises:
      UserError: the adapter is neither, or belongs to another base model.
    """
    mesh = make_mesh(MeshConfig()) if mesh is None else mesh
    options: dict[str, Any] = {"dtype": dtype, "mesh": mesh}
    if adapter is not None and run_directory.is_run(path := Path(adapter)):
        return load_run(path, model=model, quantize=quantize, **options)
    options["quantize"] = quantize or "none"
    if adapter is None:
        with progress.reading(f"loading {model}") as show:
            checkpoint = load_lib.load(model, progress=show, **options)
        return Restored(
            checkpoint, checkpoint.variables, checkpoint.variables, None, None
        )
    files = AdapterFiles(Path(adapter), model)
    collections = files.collections()
    with progress.reading(f"loading {model}") as show:
        checkpoint = load_lib.load(
            model, groups=files.groups(), progress=show, **options
        )
    variables = {
        **checkpoint.variables,
        **adapter_start.place(collections, mesh, checkpoint.family),
    }
    return Restored(checkpoint, variables, checkpoint.variables, None, None)


def load_run(
    run: Path,
    *,
    model: str | None = None,
    step: int | None = None,
    dtype: Any = None,
    quantize: Quantize | None = None,
    mesh: Mesh | None = None,
) -> Restored:
    """Load what a run has trained.

    Args:
      run: run directory.
      model: base checkpoint, if not where it was when the run began.
      step: of the checkpoint; default the newest.
      dtype: default the run's.
      quantize: default the run's.
      mesh: devices; default the first.
    Raises:
      UserError: no run, no checkpoint, or the base model is not the one trained on.
    """
    config = run_directory.read_config(run)
    sources = run_directory.read_sources(run)
    base = model or config.model
    if contents.fingerprint(base) != sources.get("model"):
        raise UserError(
            f"{base} is not the model that {run} was trained on (its fingerprint "
            f"differs): give the checkpoint that was {config.model} then"
        )
    mesh = make_mesh(MeshConfig()) if mesh is None else mesh
    changed: dict[str, Any] = {"model": base}
    if dtype is not None:
        changed["dtype"] = dtype if dtype == "auto" else jnp.dtype(dtype).name
    if quantize is not None:
        changed["quantize"] = quantize
    loaded = run_lib.load_policy(
        dataclasses.replace(config, **changed),
        mesh,
        start=run / run_directory.ADAPTER_START,
    )
    tx = optimizer_lib.make_optimizer(config.optimizer, 10**9)
    key = jax.random.key(0)
    target = jax.eval_shape(
        lambda trainable: step_lib.init(trainable, tx, key=key), loaded.trainable
    )
    everywhere = sharding.replicated(mesh)
    target = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere),
        target,
    )
    if not (run / "checkpoints").is_dir():
        raise UserError(f"{run} has no checkpoint yet")
    store = StateStore(run / "checkpoints")
    try:
        restored = store.restore(target, step)
    finally:
        store.close()
    if restored is None:
        raise UserError(f"{run} has no complete checkpoint yet")
    variables = trees.combine(restored.state.trainable, loaded.frozen)
    return Restored(
        loaded.checkpoint, variables, loaded.checkpoint.variables, config, restored.step
    )
