"""A run that goes on past the end that it was begun with."""

import dataclasses
from pathlib import Path

from jaxalign.adapters.adapter import NoAdapter
from jaxalign.checkpoints import runs
from jaxalign.errors import UserError
from jaxalign.objectives import objective
from jaxalign.training import run_directory
from jaxalign.training.config import TrainConfig
from jaxalign.training.inputs import RunInputs, plan_steps


__all__ = ["END", "same_but_for_its_end"]

END = ("max_steps", "num_train_epochs")
"""The options that say where a run ends, and nothing else."""


def same_but_for_its_end(config: TrainConfig, inputs: RunInputs) -> bool:
    """Tell whether a directory's run differs from this one by an earlier end alone.

    Its steps so far are then those of the longer run, to the last bit: the batch of a
    step and a rate without a decay do not depend on the end. A rate that falls towards
    the end does.

    Raises:
      UserError: it differs by an earlier end, and the rate falls.
    """
    out = Path(config.out)
    if not runs.is_run(out):
        return False
    before = run_directory.read_config(out)
    ends = {name: getattr(config, name) for name in END}
    if before == config or _elsewhere(dataclasses.replace(before, **ends), config):
        return False
    old = plan_steps(before, inputs.data, inputs.mesh).num_steps
    new = inputs.source.num_steps
    if new < old:
        return False
    schedule = config.optimizer.schedule
    if new > old and schedule != "constant":
        raise UserError(
            f"{out} holds a run of {old} steps whose learning rate falls to 0 by then "
            f"(optimizer.schedule {schedule}), so that it cannot go on to {new} as if "
            f"they had been meant. {_way_on(config)}; runs with --optimizer.schedule "
            "constant can be made longer"
        )
    return True


def _elsewhere(one: TrainConfig, other: TrainConfig) -> bool:
    """Tell whether two runs differ in something that changes their numbers."""
    free = {name.partition(".")[0] for name in run_directory.FREE}
    own = {name: getattr(other, name) for name in free}
    return dataclasses.replace(one, **own) != other


def _way_on(config: TrainConfig) -> str:
    if not isinstance(config.adapter, NoAdapter):
        return (
            "Train on in a new run that begins with what this one trained: `jaxalign "
            f"export --run {config.out} --format peft --out ADAPTER`, then jaxalign "
            "train with --adapter.name peft --adapter.path ADAPTER and another --out"
        )
    same = ""
    if objective.needs(config.objective).reference:
        loaded = config.reference in ("adapter_off", "cached")
        old = config.model if loaded else config.reference
        same = f" --reference {old}"
    return (
        "Train on in a new run that begins with what this one trained: `jaxalign "
        f"export --run {config.out} --out MODEL`, then jaxalign train with --model "
        f"MODEL{same} and another --out"
    )
