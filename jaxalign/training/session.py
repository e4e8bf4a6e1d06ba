"""A run between its making and its end: all that stepping it takes."""

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxalign import trees
from jaxalign.checkpoints.state import StateStore
from jaxalign.data import loader
from jaxalign.objectives.policy import REFERENCE
from jaxalign.training.config import TrainConfig
from jaxalign.training.step import TrainState
from jaxalign.types import Metrics, Model, Variables


__all__ = ["Session"]


@dataclasses.dataclass(kw_only=True)
class Session:
    """A run that is ready to step, and after ``fit`` where it stands."""

    config: TrainConfig
    run: Path | None
    """Its directory, if it has one."""
    state: TrainState
    """After the last whole step; donated to the next one, which replaces it."""
    step: int
    """Updates made so far."""
    data_state: dict[str, Any] | None
    """Where the data's iterator stands then; None is the beginning."""
    model: Model
    frozen: Variables
    source: loader.StepSource
    put: Callable[[Any], Any]
    """Sends a host batch to the devices."""
    step_fn: Callable[[TrainState, Any, Any], tuple[TrainState, Metrics]]
    """Compiled."""
    evaluate: Callable[[TrainState], dict[str, float]] | None
    """Returns ``eval_*`` values."""
    store: StateStore | None
    """Its checkpoints, if it keeps any."""
    schedule: Callable[[Any], Any] | None = None
    """From updates to the learning rate; None where the optimiser is one's own."""
    resources: contextlib.ExitStack | None = None
    """What ``close`` gives back."""

    def close(self) -> None:
        """Wait for its files and give the run directory back; needless without one."""
        if self.resources is not None:
            self.resources.close()

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def variables(self) -> Variables:
        """The model's weights as they are now, its adapter among them."""
        frozen = {k: v for k, v in self.frozen.items() if k != REFERENCE}
        return trees.combine(self.state.trainable, frozen)

    def open_batches(self) -> Any:
        """Iterate over host batches from the next step on; to be closed."""
        batches = loader.make_iterator(self.source, workers=self.config.data_workers)
        if self.data_state is not None:
            batches.set_state(self.data_state)
        return batches
