"""What a run may be given as objects, where its config has names."""

import dataclasses
from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import Mesh, NamedSharding

from jaxalign import trees
from jaxalign.adapters import adapter
from jaxalign.adapters.adapter import NoAdapter
from jaxalign.checkpoints.load import Checkpoint
from jaxalign.data import records
from jaxalign.errors import UserError
from jaxalign.objectives.options import ObjectiveConfig
from jaxalign.objectives.own import LossOfPairs, as_config
from jaxalign.objectives.record import Objective
from jaxalign.parallel import sharding
from jaxalign.training.config import TrainConfig
from jaxalign.types import Bound, Model, Variables
from jaxalign.variables import check_variables


__all__ = [
    "OwnModel",
    "Rows",
    "RunObjects",
    "given_records",
    "partitioned",
    "with_names",
]

Rows = Any
"""What :func:`jaxalign.data.records.from_rows` takes."""


class OwnModel(NamedTuple):
    """A model of any kind with its weights."""

    model: Model
    variables: Any
    """Collections by name, ``{"params": ..., ...}``; or what else its functions take,
    such as an NNX state, which a run has as its ``params``."""

    def with_collections(self) -> "OwnModel":
        """Return the model with variables that are collections, as a run needs them.

        Raises:
          UserError: parameters were given for variables.
        """
        if isinstance(self.variables, dict):
            check_variables(self.variables, "OwnModel")
            return self
        functions = self.model._asdict().items()
        lifted = {name: fn and Bound(_of_params, fn) for name, fn in functions}
        return OwnModel(Model(**lifted), {"params": self.variables})


def _of_params(fn: Any, variables: Variables, *args: Any, **options: Any) -> Any:
    return fn(variables["params"], *args, **options)


class RunObjects(NamedTuple):
    """Objects in the place of names; None leaves it to the config."""

    objective: Objective | LossOfPairs | ObjectiveConfig | None = None
    model: Checkpoint | OwnModel | None = None
    rows: Rows | None = None
    eval_rows: Rows | None = None
    tx: optax.GradientTransformation | None = None

    @property
    def checkpoint(self) -> Checkpoint | None:
        """The loaded checkpoint, if that is what was given."""
        return self.model if isinstance(self.model, Checkpoint) else None

    @property
    def own_model(self) -> OwnModel | None:
        """The model of another kind, if that is what was given."""
        return self.model if isinstance(self.model, OwnModel) else None


NAMES_ONLY = RunObjects()
"""Nothing given as an object."""


def with_names(config: TrainConfig, objects: RunObjects) -> TrainConfig:
    """Return the config with what the objects are called, checked as a whole.

    Raises:
      UserError: something is given neither way, or does not go with the others.
    """
    changes: dict[str, Any] = {}
    if objects.objective is not None:
        changes["objective"] = as_config(objects.objective)
    if (checkpoint := objects.checkpoint) is not None:
        changes["model"] = str(checkpoint.path)
        changes["dtype"] = str(jax.numpy.dtype(checkpoint.dtype))
    config = dataclasses.replace(config, **changes)
    if not config.data and objects.rows is None:
        raise UserError("there is no data: give rows=RECORDS, or a config with data")
    if not config.model:
        raise UserError(
            "there is no model: give model=CHECKPOINT, or a config with model (beside "
            "an OwnModel, the directory of its tokenizer)"
        )
    if objects.own_model is not None and not isinstance(config.adapter, NoAdapter):
        found = objects.own_model.variables
        if not any(name in found for name in adapter.COLLECTIONS):
            raise UserError(
                f"adapter.name {config.adapter.name} is for the library's own models, "
                "and the variables of this one hold no adapter: put one there, or give "
                "adapter=NoAdapter() and trainable patterns"
            )
    return config


def given_records(rows: Rows, what: str = "row") -> list[records.Record]:
    """Return rows as records, see :func:`jaxalign.data.records.from_rows`.

    Raises:
      UserError: one is malformed, or there is none.
    """
    found = records.as_records(rows)
    if not found:
        raise UserError(f"{what}s: there is none; expected feedback records")
    return found


def partitioned(
    own_model: OwnModel, config: TrainConfig, mesh: Mesh
) -> tuple[Variables, Variables]:
    """Return what of a model is trained and what is not, on a mesh.

    Leaves that lie on the mesh stay as they are; others are copied to every device.

    Raises:
      UserError: a pattern of ``trainable`` matches nothing, or what cannot be trained.
    """
    everywhere = sharding.replicated(mesh)

    def put(leaf: Any) -> Any:
        where = getattr(leaf, "sharding", None)
        if isinstance(where, NamedSharding) and where.mesh == mesh:
            return leaf
        return sharding.put(leaf, everywhere)

    variables = jax.tree.map(put, dict(own_model.variables))
    mask = jax.tree.map(lambda _: False, variables)
    if not isinstance(config.adapter, NoAdapter):
        mask = adapter.trained(variables)
    if config.trainable:
        params = trees.mask_from_patterns(variables["params"], config.trainable)
        _check_kinds(variables["params"], params)
        mask |= {"params": params}
    return trees.partition(variables, mask)


def _check_kinds(params: Any, mask: Any) -> None:
    """Refuse to train what has no gradient, such as the counters of an NNX state."""
    chosen = zip(trees.by_path(params).items(), jax.tree.leaves(mask), strict=True)
    for (path, leaf), trained in chosen:
        if trained and not jax.numpy.issubdtype(leaf.dtype, jax.numpy.floating):
            raise UserError(
                f"trainable matches {path!r}: {leaf.dtype} has no gradient. "
                "Let the patterns match floating-point weights alone, or split what is "
                "trained from the rest (nnx.split(module, nnx.Param, ...))"
            )
