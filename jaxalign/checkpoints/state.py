"""Training state on disk: Orbax, asynchronous, whole or not at all."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp

from jaxalign.errors import UserError


__all__ = ["Restored", "StateStore"]


class Restored(NamedTuple):
    """What a checkpoint holds."""

    step: int
    state: Any
    data: dict[str, Any]


class StateStore:
    """The ``checkpoints/<step>/`` of a run.

    A save is written beside its place and renamed when complete, so that a kill at any
    moment leaves the earlier checkpoints whole and the torn one unseen.
    """

    def __init__(self, directory: Path, *, keep: int | None = None):
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            enable_async_checkpointing=True,
            cleanup_tmp_directories=True,
        )
        self._manager = ocp.CheckpointManager(directory.absolute(), options=options)

    def steps(self) -> list[int]:
        """Return the steps of the complete checkpoints."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: Any, data: dict[str, Any]) -> None:
        """Begin to save; the state is copied before this returns."""
        if step in self._manager.all_steps():
            return
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(data)
            ),
        )

    def restore(self, target: Any, step: int | None = None) -> Restored | None:
        """Restore the newest checkpoint (or a given one) like ``target``.

        Args:
          target: arrays or shapes with shardings, of the state's structure.
          step: None for the newest.
        Returns:
          None where there is no checkpoint at all.
        Raises:
          UserError: there is none of that step.
        """
        steps = self.steps()
        if step is None:
            if not steps:
                return None
            step = steps[-1]
        elif step not in steps:
            raise UserError(
                f"there is no checkpoint of step {step}: got "
                f"{', '.join(map(str, steps)) or 'none at all'}"
            )
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, target)
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(abstract), data=ocp.args.JsonRestore()
            ),
        )
        return Restored(step, restored["state"], restored["data"])

    def wait(self) -> None:
        """Wait until what was begun is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait and give everything back."""
        self._manager.close()
