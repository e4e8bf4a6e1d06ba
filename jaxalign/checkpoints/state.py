"""Training state on disk: Orbax, asynchronous, whole or not at all.

A checkpoint has three items: ``trainable``, what is trained; ``optimizer``, what else a
step changes; ``data``, where the data's iterator stands. Who only wants the model reads
the first and need not know the others. Checkpoints made before there were three have
``state``, the first two in one.
"""

import contextlib
import errno
import functools
import logging
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp

from jaxalign import trees
from jaxalign.errors import UserError


__all__ = ["SavedState", "StateStore"]

_ONE_ITEM = "state"
"""Of older checkpoints: step, trainable, opt_state and key."""


class SavedState(NamedTuple):
    """What a checkpoint holds."""

    step: int
    trainable: Any
    optimizer: dict[str, Any]
    data: dict[str, Any]


class StateStore:
    """The ``checkpoints/<step>/`` of a run.

    A save is written beside its place and renamed when complete, so that a kill at any
    moment leaves the earlier checkpoints whole and the torn one unseen. What goes wrong
    while it is written comes back from whatever is called next.

    Example::

      store = StateStore(Path("run/checkpoints"), keep=2)
      state = {"step": step, "opt_state": opt_state, "key": key}
      store.save(SavedState(10, trainable, state, data={"next_index": 10}))
      saved = store.restore(trainable, state)  # the newest, None where there is none
      store.close()
    """

    def __init__(self, directory: Path, *, keep: int | None = None):
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            enable_async_checkpointing=True,
            cleanup_tmp_directories=True,
        )
        _leave_reporting_to_us()
        self._directory = directory.absolute()
        with self._writing():
            self._manager = ocp.CheckpointManager(self._directory, options=options)

    def steps(self) -> list[int]:
        """Return the steps of the complete checkpoints."""
        return sorted(self._manager.all_steps())

    def save(self, saved: SavedState) -> None:
        """Begin to save; the arrays are copied before this returns.

        Raises:
          UserError: this or the last checkpoint cannot be written.
        """
        if saved.step in self._manager.all_steps():
            return
        with self._writing():
            self._manager.save(
                saved.step,
                args=ocp.args.Composite(
                    trainable=ocp.args.StandardSave(saved.trainable),
                    optimizer=ocp.args.StandardSave(saved.optimizer),
                    data=ocp.args.JsonSave(saved.data),
                ),
            )

    def check(self) -> None:
        """Find out without waiting whether the last save has failed.

        Raises:
          UserError: it has.
        """
        with self._writing():
            self._manager.check_for_errors()

    def restore(self, trainable: Any, optimizer: dict[str, Any]) -> SavedState | None:
        """Restore the newest checkpoint, None where there is none.

        Args:
          trainable: arrays or shapes with shardings, of the structure that was saved.
          optimizer: likewise.
        Raises:
          UserError: an optimiser of another kind was saved.
        """
        steps = self.steps()
        if not steps:
            return None
        step = steps[-1]
        targets = {"trainable": _abstract(trainable), "optimizer": _abstract(optimizer)}
        if self._is_old(step):
            whole = {"trainable": targets["trainable"], **targets["optimizer"]}
            args = {_ONE_ITEM: ocp.args.StandardRestore(whole)}
        else:
            self._check_optimizer(step, optimizer)
            args = {k: ocp.args.StandardRestore(v) for k, v in targets.items()}
        items = self._manager.restore(
            step, args=ocp.args.Composite(**args, data=ocp.args.JsonRestore())
        )
        if not self._is_old(step):
            return SavedState(
                step, items["trainable"], items["optimizer"], items["data"]
            )
        parts = dict(items[_ONE_ITEM])
        return SavedState(step, parts.pop("trainable"), parts, items["data"])

    def restore_trainable(
        self, target: Any, step: int | None = None
    ) -> tuple[int, Any]:
        """Restore what was trained alone, of the newest checkpoint or of a given one.

        Args:
          target: arrays or shapes with shardings, of the structure that was saved, but
            for parts of the model that are not trained: those may be there or not.
          step: None for the newest.
        Returns:
          The step and the weights.
        Raises:
          UserError: there is no checkpoint, or none of that step.
        """
        steps = self.steps()
        if not steps:
            raise UserError(
                f"{self._directory.parent} has no complete checkpoint yet: wait for "
                "its first save, or run it on"
            )
        if step is None:
            step = steps[-1]
        elif step not in steps:
            raise UserError(
                f"there is no checkpoint of step {step}: got "
                f"{', '.join(map(str, steps))}"
            )
        if not self._is_old(step):
            wanted = _of_structure(self._kept(step, "trainable"), _abstract(target))
            args = {"trainable": ocp.args.StandardRestore(wanted)}
            items = self._manager.restore(step, args=ocp.args.Composite(**args))
            return step, _of_structure(target, items["trainable"])
        part = {"trainable": _abstract(target)}
        read = ocp.args.PyTreeRestore(
            item=part,
            restore_args=ocp.checkpoint_utils.construct_restore_args(part),
            partial_restore=True,
        )
        # Not by the manager, which has one way of reading for each item.
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            item = checkpointer.restore(
                self._directory / str(step) / _ONE_ITEM, args=read
            )
        return step, item["trainable"]

    def _check_optimizer(self, step: int, optimizer: dict[str, Any]) -> None:
        """Refuse an optimiser whose numbers are others than those that were saved."""
        kept = self._kept(step, "optimizer")
        saved, asked = (
            {path: tuple(leaf.shape) for path, leaf in trees.by_path(state).items()}
            for state in (kept["opt_state"], optimizer["opt_state"])
        )
        differing = [
            f"{path} ({saved.get(path, 'none')} there, {asked.get(path, 'none')} now)"
            for path in sorted({*saved, *asked})
            if saved.get(path) != asked.get(path)
        ]
        if differing:
            raise UserError(
                f"{self._directory.parent} was trained with another optimiser: its "
                f"state at step {step} differs in {'; '.join(differing[:4])}. Give "
                "the tx that the run began with, or a new out"
            )

    def _kept(self, step: int, item: str) -> Any:
        """Return the tree of an item of a checkpoint, without its numbers."""
        with contextlib.closing(ocp.PyTreeCheckpointHandler()) as handler:
            return handler.metadata(self._manager.directory / str(step) / item).tree

    def _is_old(self, step: int) -> bool:
        return (self._directory / str(step) / _ONE_ITEM).is_dir()

    def wait(self) -> None:
        """Wait until what was begun is on disk.

        Raises:
          UserError: it cannot be written.
        """
        with self._writing():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait and give everything back.

        Raises:
          UserError: what was begun cannot be written.
        """
        with self._writing():
            self._manager.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Turn the errors of a disk into the user's."""
        try:
            yield
        except (OSError, ValueError) as error:
            if not isinstance(error, OSError) and not _OF_THE_DISK.search(str(error)):
                raise
            reason = _SYSTEM_S_WORDS.search(str(error))
            raise UserError(
                f"a checkpoint in {self._directory} cannot be written: "
                f"{reason.group() if reason else error}. The complete ones stay: make "
                "room, and the same command goes on from the newest"
            ) from None


_OF_THE_DISK = re.compile("RESOURCE_EXHAUSTED|Error writing|os_error_code")
"""In TensorStore's errors, which are no OSErrors but tell of one."""

_SYSTEM_S_WORDS = re.compile(
    "|".join(
        os.strerror(code)
        for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
    )
)


def _leave_reporting_to_us() -> None:
    """Keep threads of Orbax and TensorStore from printing errors that come back to us.

    When a write fails, the writes beside it end after the event loop that began them.
    """
    logging.getLogger("absl").addFilter(_without_tracebacks)
    if getattr(sys.unraisablehook, "func", None) is not _report:
        sys.unraisablehook = functools.partial(_report, sys.unraisablehook)


def _without_tracebacks(record: logging.LogRecord) -> bool:
    return not (record.exc_info and "orbax" in record.pathname)


def _report(others: Any, unraisable: Any) -> None:
    error = unraisable.exc_value
    if not isinstance(error, RuntimeError) or str(error) != "Event loop is closed":
        others(unraisable)


def _abstract(tree: Any) -> Any:
    return jax.tree.map(ocp.utils.to_shape_dtype_struct, tree)


def _of_structure(like: Any, tree: Any) -> Any:
    """Return a tree with the nodes of another; what it lacks of them is None."""
    if not isinstance(like, dict):
        return tree
    parts = tree if isinstance(tree, dict) else {}
    return {name: _of_structure(part, parts.get(name)) for name, part in like.items()}
