"""Any base model with any adapter or run on it, ready to call."""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxalign import progress, trees
from jaxalign.adapters import adapter as adapter_lib
from jaxalign.adapters import saved
from jaxalign.checkpoints import adapter_files, adapter_start, contents, runs
from jaxalign.checkpoints import load as load_lib
from jaxalign.checkpoints.adapter_files import AdapterFiles
from jaxalign.checkpoints.load import Checkpoint, DType
from jaxalign.checkpoints.state import StateStore
from jaxalign.errors import UserError
from jaxalign.models import decoder
from jaxalign.models.quantised import Quantize
from jaxalign.parallel import sharding
from jaxalign.parallel.mesh import MeshConfig, make_mesh
from jaxalign.types import Variables


__all__ = ["Policy", "open_policy", "open_run", "quantize_of"]


class Policy(NamedTuple):
    """A model with what was trained of it or beside it."""

    checkpoint: Checkpoint
    variables: Variables
    """``params`` and the adapter, ``lora`` or ``prefix`` or both, if there is one."""
    base: Variables
    """``params`` as they were before training: the reference."""
    quantize: Quantize = "none"
    """How the layers' frozen linear weights are held."""
    step: int | None = None
    """Of the run that it came from, if any."""
    trained: tuple[str, ...] = ()
    """Patterns of the base weights that were trained."""

    def adapter(self) -> Variables:
        """Return what was trained as an adapter's collections alone.

        Base weights stand in ``saved``, embeddings for a head that is tied to them too.
        """
        known = adapter_lib.COLLECTIONS
        found = {name: tree for name, tree in self.variables.items() if name in known}
        if not self.trained:
            return found
        model = self.checkpoint
        shapes = decoder.param_shapes(model.config, model.groups, model.vision_groups)
        mask = trees.by_path(trees.mask_from_patterns(shapes, self.trained))
        whole = trees.by_path(found.get(saved.COLLECTION, {}))
        for path, value in trees.by_path(self.variables["params"]).items():
            if mask.get(path):  # codes have other paths
                whole[path] = value
        if "embed_tokens/embedding" in whole and model.config.text.tie_embeddings:
            whole.setdefault("lm_head/kernel", whole["embed_tokens/embedding"].T)
        made: dict[str, Any] = {}
        for path, value in whole.items():
            *module, leaf = path.split("/")
            trees.node_at(made, module)[leaf] = value
        return {**found, saved.COLLECTION: made}


def open_policy(
    model: str | Path,
    adapter: str | None = None,
    *,
    dtype: Any = jnp.float32,
    quantize: Quantize | None = None,
    mesh: Mesh | None = None,
    scopes: Collection[str] = load_lib.WHOLE,
) -> Policy:
    """Load a checkpoint with an adapter on it, or without one.

    Args:
      model: Hugging Face directory or id.
      adapter: PEFT directory, exported hybrid, run directory, or None.
      dtype: of the weights and of the computation; see ``load.load``.
      quantize: how base weights are held; default as in the run, elsewhere ``none``.
      mesh: devices; default the first.
      scopes: the parts of the base that are read; see ``load.load``.
    Raises:
      UserError: the adapter is neither, or belongs to another base model.
    Example::

      policy = open_policy("smollm2", "run", dtype="bfloat16")
      hidden = policy.checkpoint.model.hidden_fn(policy.variables, inputs)
    """
    model = str(model)
    mesh = make_mesh(MeshConfig()) if mesh is None else mesh
    if adapter is not None and runs.is_run(run := Path(adapter)):
        return open_run(
            run, model=model, dtype=dtype, quantize=quantize, mesh=mesh, scopes=scopes
        )
    collections: Variables = {}
    if adapter is not None:
        collections = AdapterFiles(Path(adapter), model).collections()
    quantize = quantize or "none"
    return _load(
        model, collections, dtype=dtype, quantize=quantize, mesh=mesh, scopes=scopes
    )


def quantize_of(given: Quantize | None, adapter: str | None) -> Quantize:
    """Return how base weights are held: as asked, or as in an adapter's run.

    >>> quantize_of(None, None), quantize_of("nf4", None)
    ('none', 'nf4')
    """
    if given is not None:
        return given
    kept = runs.settings_of(adapter) or {}
    return kept.get("quantize", "none")


def open_run(
    run: str | Path,
    *,
    model: str | None = None,
    step: int | None = None,
    dtype: Any = None,
    quantize: Quantize | None = None,
    mesh: Mesh | None = None,
    scopes: Collection[str] = load_lib.WHOLE,
) -> Policy:
    """Load what a run has trained.

    Args:
      run: run directory.
      model: base checkpoint, if not where it was when the run began.
      step: of the checkpoint; default the newest.
      dtype: default the run's.
      quantize: default the run's.
      mesh: devices; default the first.
      scopes: the parts of the base that are read, at least those that were trained.
    Raises:
      UserError: no run, no checkpoint, or the base model is not the one trained on.
    Example::

      policy = open_run("run", step=500)
    """
    run = Path(run)
    settings = runs.read_settings(run)
    base = model or settings["model"]
    if contents.fingerprint(base) != runs.read_sources(run).get("model"):
        raise UserError(
            f"{base} is not the model that {run} was trained on (its fingerprint "
            f"differs): give the checkpoint that was {settings['model']} then"
        )
    if not (run / runs.CHECKPOINTS).is_dir():
        raise UserError(f"{run} has no checkpoint yet")
    start = run / runs.ADAPTER_START
    if settings.get("adapter", {}).get("name") != "none" and not start.is_file():
        raise UserError(
            f"{run} has lost {start.name}, the values that its adapter started from: "
            "put the file back, checkpoints have only what training changed"
        )
    mesh = make_mesh(MeshConfig()) if mesh is None else mesh
    trained = tuple(settings.get("trainable", ()))
    policy = _load(
        base,
        adapter_files.read_start(start) if start.is_file() else {},
        dtype=settings["dtype"] if dtype is None else dtype,
        quantize=quantize or settings.get("quantize", "none"),
        trained=trained,
        mesh=mesh,
        scopes=scopes,
    )
    checkpoint = policy.checkpoint
    shapes = decoder.param_shapes(
        checkpoint.config, checkpoint.groups, checkpoint.vision_groups
    )
    shapes = load_lib.of_scopes(shapes, scopes)
    mask = adapter_lib.trained_mask(policy.variables, shapes, trained)
    trainable, frozen = trees.partition(policy.variables, mask)
    everywhere = sharding.replicated(mesh)
    target = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere),
        trainable,
    )
    store = StateStore(run / runs.CHECKPOINTS)
    try:
        step, trainable = store.restore_trainable(target, step)
    finally:
        store.close()
    variables = trees.combine(trainable, frozen)
    return policy._replace(variables=variables, step=step, trained=trained)


def _load(
    model: str,
    collections: Variables,
    *,
    dtype: DType | Any,
    quantize: Quantize,
    mesh: Mesh,
    trained: Sequence[str] = (),
    scopes: Collection[str] = load_lib.WHOLE,
) -> Policy:
    """Load a base model, cut for an adapter's stacks, and put the adapter on it."""
    config, family = load_lib.open_config(model)
    groups = adapter_files.groups_of(collections, config.text.num_layers)
    vision_groups = adapter_files.vision_groups_of(collections, config)
    shapes = decoder.param_shapes(config, groups, vision_groups)
    stays_float32 = trees.by_path(trees.mask_from_patterns(shapes, trained))
    with progress.reading(f"loading {model}") as show:
        checkpoint = load_lib.load(
            model,
            groups=groups,
            vision_groups=vision_groups,
            dtype=dtype,
            float32=stays_float32.__getitem__,
            quantize=quantize,
            mesh=mesh,
            scopes=scopes,
            progress=show,
        )
    placed = adapter_start.place(collections, mesh, family)
    return Policy(
        checkpoint,
        {**checkpoint.variables, **placed},
        checkpoint.variables,
        quantize,
    )
