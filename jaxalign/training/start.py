"""What a run trains, at its starting values: loaded, or described before it is."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxalign import progress, trees
from jaxalign.adapters import adapter
from jaxalign.adapters.adapter import NoAdapter
from jaxalign.checkpoints import adapter_files, adapter_start
from jaxalign.checkpoints import load as load_lib
from jaxalign.checkpoints.load import Checkpoint
from jaxalign.errors import UserError
from jaxalign.models import decoder
from jaxalign.models.attention import Implementation
from jaxalign.models.config import ModelConfig
from jaxalign.models.families import Family
from jaxalign.parallel import sharding
from jaxalign.stacks import Group
from jaxalign.training.config import TrainConfig
from jaxalign.training.inputs import given_adapter
from jaxalign.training.objects import OwnModel
from jaxalign.types import Model, Variables


__all__ = [
    "StartLayout",
    "StartingPolicy",
    "expected_model",
    "expected_start",
    "given_layout",
    "lay_out",
    "load_start",
]


class StartingPolicy(NamedTuple):
    """A loaded model, split into what is trained and what is not."""

    checkpoint: Checkpoint | OwnModel
    trainable: Variables
    frozen: Variables


class StartLayout(NamedTuple):
    """How the weights of a run are cut, by config.json and the adapter's options."""

    model: ModelConfig
    family: Family
    groups: tuple[Group, ...]
    vision_groups: tuple[Group, ...] | None
    shapes: Any
    """Of the base weights."""
    trained: Any
    """Which of them are trained."""
    collections: Variables | None
    """An adapter that is there already."""
    scopes: tuple[str, ...] = load_lib.WHOLE
    """The parts of the base that are loaded."""


def lay_out(
    config: TrainConfig,
    start: Path | None = None,
    scopes: tuple[str, ...] = load_lib.WHOLE,
) -> StartLayout:
    """Find out how the weights of a run are cut, by headers alone.

    Args:
      config: of the run.
      start: file that keeps the starting values, if it is there (yet).
      scopes: the parts of the base that are loaded.
    Raises:
      UserError: config.json cannot be read, or the adapter chooses what is not there.
    Example::

      adapter = LoRAConfig(layers="top:8")
      files = {"model": "smollm2", "data": "pairs.jsonl", "out": "run"}
      lay_out(TrainConfig(adapter=adapter, **files)).groups  # ((0, 22), (22, 30))
    """
    model, family = load_lib.open_config(config.model)
    collections = given_adapter(config, start)
    if collections is not None:
        groups = adapter_files.groups_of(collections, model.text.num_layers)
        vision_groups = adapter_files.vision_groups_of(collections, model)
    else:
        shapes = decoder.param_shapes(model)
        groups = adapter.groups(config.adapter, shapes, model.text.num_layers)
        vision_groups = adapter.vision_groups(config.adapter, shapes)
    shapes = decoder.param_shapes(model, groups, vision_groups)
    trained = trees.mask_from_patterns(shapes, config.trainable)
    shapes, trained = (load_lib.of_scopes(tree, scopes) for tree in (shapes, trained))
    return StartLayout(
        model, family, groups, vision_groups, shapes, trained, collections, scopes
    )


def load_start(
    config: TrainConfig,
    mesh: Mesh,
    layout: StartLayout,
    *,
    given: Checkpoint | None = None,
    attention: Implementation = "xla",
    sequences: int | None = None,
) -> StartingPolicy:
    """Load the model of a run and its adapter, at its starting values.

    Args:
      config: of the run.
      mesh: devices.
      layout: of :func:`lay_out`; an adapter that it does not hold is made.
      given: the model, loaded already.
      attention: the kernel.
      sequences: most of them in a row.
    Raises:
      UserError: see ``checkpoints.load.load``.
    Example::

      layout, mesh = lay_out(config), make_mesh(config.mesh)
      policy = load_start(config, mesh, layout)
      variables = trees.combine(policy.trainable, policy.frozen)
    """
    trained = trees.by_path(layout.trained)
    options = _model_options(config, attention, sequences)
    if given is not None:
        checkpoint = _moved(given, mesh, trained, options)
        return _split(config, mesh, layout, checkpoint)
    with progress.reading(f"loading {config.model}") as show:
        checkpoint = load_lib.load(
            config.model,
            groups=layout.groups,
            vision_groups=layout.vision_groups,
            dtype=config.dtype,
            float32=trained.__getitem__,
            quantize=config.quantize,
            mesh=mesh,
            scopes=layout.scopes,
            progress=show,
            **options,
        )
    return _split(config, mesh, layout, checkpoint)


def given_layout(layout: StartLayout, checkpoint: Checkpoint) -> StartLayout:
    """Return the layout of a run whose model is loaded already.

    Raises:
      UserError: its layers are stacked in other groups than the adapter needs.
    Example::

      base = load_hf("smollm2", adapter=config.adapter)
      layout = given_layout(lay_out(config), base)
    """
    if tuple(checkpoint.groups) != layout.groups or (
        checkpoint.vision_groups != layout.vision_groups
    ):
        raise UserError(
            f"the model was loaded with its layers in groups {checkpoint.groups}, and "
            f"this run's adapter needs {layout.groups}: load it with "
            f"load_hf(PATH, groups={list(layout.groups)})"
        )
    own = {k: v for k, v in checkpoint.variables.items() if k in adapter.COLLECTIONS}
    return layout._replace(collections=own) if own else layout


def _moved(
    given: Checkpoint, mesh: Mesh, trained: Mapping[str, bool], options: dict[str, Any]
) -> Checkpoint:
    """Return a loaded model on the mesh, with the options of the run."""
    params = trees.map_with_paths(
        lambda path, leaf: leaf.astype(jnp.float32) if trained[path] else leaf,
        given.variables["params"],
    )
    model = decoder.make_model(
        given.config,
        groups=given.groups,
        vision_groups=given.vision_groups,
        dtype=given.dtype,
        mesh=mesh,
        **options,
    )
    variables = adapter_start.place({"params": params}, mesh, given.family)
    return given._replace(model=model, variables=variables)


def _split(
    config: TrainConfig, mesh: Mesh, layout: StartLayout, checkpoint: Checkpoint
) -> StartingPolicy:
    """Add the adapter and tell apart what is trained."""
    variables = dict(checkpoint.variables)
    if not isinstance(config.adapter, NoAdapter):
        collections = layout.collections
        if collections is None:
            key = jax.random.fold_in(jax.random.key(config.seed), 1)
            collections = adapter_start.make(key, config.adapter, checkpoint)
        variables |= adapter_start.place(collections, mesh, layout.family)
    mask = adapter.trained_mask(variables, layout.shapes, config.trainable)
    return StartingPolicy(checkpoint, *trees.partition(variables, mask))


def expected_start(
    config: TrainConfig, mesh: Mesh, layout: StartLayout
) -> tuple[Variables, Variables]:
    """Return shape, dtype and place of what :func:`load_start` will give.

    Args:
      config: of the run; its ``dtype`` is one, and weights are not held as codes.
      mesh: devices.
      layout: of :func:`lay_out`.
    Returns:
      What is trained, and what is not.
    Example::

      trainable, frozen = expected_start(config, mesh, lay_out(config))
      trees.num_bytes(trainable)  # before anything is loaded
    """

    def expect(tree: Any, kinds: Any) -> Any:
        places = sharding.param_shardings(tree, mesh, layout.family.sharding)
        return jax.tree.map(
            lambda leaf, kind, place: jax.ShapeDtypeStruct(
                leaf.shape, kind, sharding=place
            ),
            *(tree, kinds, places),
        )

    kinds = jax.tree.map(
        lambda is_trained: jnp.float32 if is_trained else config.dtype, layout.trained
    )
    variables = {"params": expect(layout.shapes, kinds)}
    if not isinstance(config.adapter, NoAdapter):
        collections = layout.collections
        if collections is None:
            collections = adapter_start.shapes(config.adapter, layout.model)[1]
        for name, tree in collections.items():
            kinds = jax.tree.map(lambda leaf: leaf.dtype, tree)
            variables[name] = expect(tree, kinds)
    mask = adapter.trained_mask(variables, layout.shapes, config.trainable)
    return trees.partition(variables, mask)


def expected_model(
    config: TrainConfig,
    mesh: Mesh,
    layout: StartLayout,
    *,
    attention: Implementation = "xla",
    sequences: int | None = None,
) -> Model:
    """Return the model that :func:`load_start` will give, equal to it by value.

    Args:
      config: of the run.
      mesh: devices.
      layout: of :func:`lay_out`.
      attention: the kernel.
      sequences: most of them in a row.
    Example::

      layout = lay_out(config)
      model = expected_model(config, mesh, layout)
      model == load_start(config, mesh, layout).checkpoint.model  # True
    """
    return decoder.make_model(
        layout.model,
        groups=layout.groups,
        vision_groups=layout.vision_groups,
        dtype=jnp.dtype(config.dtype),
        mesh=mesh,
        **_model_options(config, attention, sequences),
    )


def _model_options(
    config: TrainConfig, attention: Implementation, sequences: int | None
) -> dict[str, Any]:
    return {
        "remat": config.remat,
        "lora_dropout": adapter.dropout(config.adapter),
        "attention_implementation": attention,
        "attention_block": config.attention_block,
        "attention_sequences": sequences,
    }
