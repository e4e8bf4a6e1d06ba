"""Evaluation while training: the objective's metrics over all held-out pairs."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxalign.data import loader
from jaxalign.objectives import objective
from jaxalign.parallel import sharding
from jaxalign.training import metrics as metrics_lib
from jaxalign.training import step as step_lib
from jaxalign.training.config import TrainConfig
from jaxalign.training.inputs import RunData
from jaxalign.training.preemption import Preemption
from jaxalign.training.step import LossFn, TrainState
from jaxalign.types import Metrics, Variables


__all__ = ["make_evaluate"]


def make_evaluate(
    config: TrainConfig,
    data: RunData,
    frozen: Variables,
    loss_fn: LossFn,
    *,
    ref_logps: Sequence[np.ndarray] | None,
    token_weights: Sequence[np.ndarray] | None,
    put: Callable[[Any], Any],
    mesh: Mesh,
    preemption: Preemption | None,
) -> Callable[[TrainState], dict[str, float]] | None:
    """Return what gives a state's ``eval_*`` values, None without held-out data.

    They are exact means over all pairs. When ``preemption`` comes there are none.

    Args:
      config: of the run.
      data: with the held-out pairs.
      frozen: what is not trained, a reference included.
      loss_fn: the objective; its metrics are what is shown.
      ref_logps: of every held-out pair, if they are cached.
      token_weights: likewise.
      put: sends a host batch to the devices.
      mesh: these.
      preemption: says when to stop.
    Example::

      evaluate = make_evaluate(config, data, frozen, loss_fn, ref_logps=None,
                               token_weights=None, put=put, mesh=mesh, preemption=None)
      evaluate(state)["eval_loss"]
    """
    if data.evaluation is None:
        return None
    source = loader.StepSource(
        data.evaluation,
        data.shape,
        loader.BatchPlan(config.batch_rows, 1, 0, shuffle=False),
        num_epochs=1,
        ref_logps=ref_logps,
        token_weights=token_weights,
        share=sharding.share_of_rows(mesh),
    )
    eval_step = jax.jit(step_lib.make_eval_step(loss_fn))

    def evaluate(state: TrainState) -> dict[str, float]:
        total: Metrics | None = None
        for step in range(len(source)):
            batch = put(source[step])
            if preemption is not None and preemption.reached():
                return {}
            part = jax.device_get(eval_step(state.trainable, frozen, batch))
            total = part if total is None else metrics_lib.merge(total, part)
        values = metrics_lib.to_floats(total or {}, "eval_")
        return _with_mixed_loss(values, config.objective)

    return evaluate


def _with_mixed_loss(
    values: dict[str, float], config: objective.ObjectiveConfig
) -> dict[str, float]:
    """Make a mix's loss of its members' exact means over all batches."""
    terms = [term for term in objective.make(config).terms if term.name]
    if terms:
        values["eval_loss"] = sum(
            term.weight * values[f"eval_loss/{term.name}"] for term in terms
        )
    return values
