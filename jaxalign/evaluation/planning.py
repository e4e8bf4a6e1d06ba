"""What an evaluation is of: tasks in their conditions, and which of their items."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxalign import progress, shards
from jaxalign.errors import UserError
from jaxalign.evaluation import task_files
from jaxalign.evaluation.config import EvalConfig
from jaxalign.evaluation.task import Items, Task, TaskOptions


__all__ = ["Planned", "plan"]


class Planned(NamedTuple):
    """A task with what it is about, in this run."""

    task: Task
    """One condition of one that was asked for."""
    items: Items
    indices: Sequence[int]
    """Of the items that are asked: all, a sample, or a part of either."""
    folder: Path
    """Where its data is."""
    expected: Sequence[int] = ()
    """Of the items that all parts together ask."""


def plan(config: EvalConfig) -> list[Planned]:
    """Return what is to be done: each task in each condition, with its items.

    What belongs beside a task (``Task.beside``) follows it, if its files are there.

    Raises:
      UserError: there is no such task, or its files are missing or not as published.
    Example::

      [one.task.directory for one in plan(config)]
    """
    asked = [task_files.resolve(name) for name in config.tasks]
    found = [
        planned
        for task, own in asked
        for one in _variants(task, config.options)
        for planned in (_planned(one, _folder(task, own, config), config),)
    ]
    names = [one.task.directory for one in found]
    if len(set(names)) < len(names):
        raise UserError(f"--tasks names a task twice: {', '.join(names)}")
    if config.grades is not None:
        return found
    beside = {name: one for one in found for name in one.task.beside}
    return [*found, *_beside(beside, set(names), config)]


def _beside(
    wanted: dict[str, Planned], there: set[str], config: EvalConfig
) -> list[Planned]:
    """Return the tasks whose figures belong beside some; say which are not there.

    Args:
      wanted: from a name to a task that it belongs beside.
      there: names of those that were asked for.
      config: of the command.
    """
    found = []
    for name, other in wanted.items():
        task, _ = task_files.resolve(name.partition("@")[0])
        variants = _variants(task, config.options)
        one = next((v for v in variants if v.directory == name), None)
        if one is None or name in there:
            continue
        try:
            found.append(_planned(one, other.folder, config))
        except UserError as error:
            progress.say(f"{other.task.directory}: without {name} beside it: {error}")
    return found


def _variants(task: Task, options: TaskOptions) -> Sequence[Task]:
    if task.variants is not None:
        return task.variants(task, options)
    if options.num_samples is None:
        return [task]
    return [dataclasses.replace(task, num_samples=options.num_samples)]


def _folder(task: Task, own: Path | None, config: EvalConfig) -> Path:
    folder = Path(config.data_dir) if config.data_dir is not None else own
    if folder is None:
        raise UserError(
            f"--data_dir is missing: the task {task.name} reads files as they are "
            "published"
        )
    if not folder.is_dir():
        raise UserError(f"--data_dir {folder} is no directory")
    return folder


def _planned(task: Task, folder: Path, config: EvalConfig) -> Planned:
    loaded = task.load(folder)
    items = loaded if isinstance(loaded, Items) else Items(loaded)
    if not len(items.rows):
        raise UserError(f"the task {task.name} has no items in {folder}")
    indices = _sample(len(items.rows), config.limit, config.seed)
    index, count = shards.parse(config.shard) or shards.WHOLE
    return Planned(task, items, indices[index::count], folder, indices)


def _sample(count: int, limit: int | None, seed: int) -> Sequence[int]:
    """Return the indices of a sample without replacement, in order."""
    if limit is None or limit >= count:
        return range(count)
    chosen = np.random.default_rng([seed, count]).permutation(count)[:limit]
    return sorted(int(index) for index in chosen)
