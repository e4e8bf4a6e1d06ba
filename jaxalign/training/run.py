"""A training run from its config to its last checkpoint."""

import dataclasses
from pathlib import Path

from jaxalign import progress
from jaxalign.checkpoints import fastest, runs
from jaxalign.checkpoints.state import StateStore
from jaxalign.errors import UserError
from jaxalign.training import loop, run_directory
from jaxalign.training.config import TrainConfig
from jaxalign.training.inputs import read_inputs
from jaxalign.training.longer import END, same_but_for_its_end
from jaxalign.training.preemption import Preemption
from jaxalign.training.setup import open_session


__all__ = ["train"]


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
    Example::

      train(TrainConfig(model="smollm2", data="pairs.jsonl", out="run", max_steps=100))
    """
    try:
        return _train(config, preemption)
    except OSError as error:
        raise UserError(
            f"a file of the run {config.out} cannot be read or written: {error}. The "
            "complete checkpoints stay: make room, and the same command goes on from "
            "the newest"
        ) from None


def _train(config: TrainConfig, preemption: Preemption | None) -> Path:
    kept = fastest.kept_in(Path(config.out) / runs.CONFIG)
    dtype = fastest.resolve(config.dtype, config.model, kept=kept)
    config = dataclasses.replace(config, dtype=dtype)
    inputs = read_inputs(config)
    longer = same_but_for_its_end(config, inputs)
    free = (*run_directory.FREE, *END) if longer else run_directory.FREE
    with run_directory.claim(config, inputs.fingerprints, free=free) as run:
        if longer:
            run_directory.keep_config(run, config)
        store = StateStore(run / runs.CHECKPOINTS, keep=config.save_total_limit)
        try:
            if inputs.source.num_steps in store.steps():
                progress.say(f"{run} is finished: {inputs.source.num_steps} steps")
            else:
                session = open_session(inputs, run, store, preemption=preemption)
                loop.fit(session, preemption=preemption)
        finally:
            store.close()
    return run
