"""What an evaluation is of: tasks in their conditions, and which of their items."""

import dataclasses
from collections.abc import Collection, Sequence
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


def plan(config: EvalConfig, *, objects: Collection[str] = ()) -> list[Planned]:
    """Return what is to be done: each task in each condition, with its items.

    What belongs beside a task (``Task.beside``) follows it, if its files are there.

    Args:
      config: of the command.
      objects: ``model`` and ``judge`` where they are given as such, not by options.
    Raises:
      UserError: there is no such task, nobody to ask, or the files are missing or not
        as published.
    Example::

      [one.task.directory for one in plan(config)]
    """
    asked = [task_files.resolve(name) for name in config.tasks]
    if config.grades is None:
        _check_model([task for task, _ in asked], config, "model" in objects)
        if "judge" not in objects:
            _check_judge([task for task, _ in asked], config)
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


def _check_model(tasks: Sequence[Task], config: EvalConfig, given: bool) -> None:
    """Refuse tasks whose model is missing, and a model that no task asks."""
    there = given or config.model is not None or config.endpoint.model is not None
    if not all(task.measures_judge for task in tasks):
        if not there:
            raise UserError(
                "there is no model: give --model CHECKPOINT, --endpoint.model NAME, or "
                "--grades FILE"
            )
        return
    named = ("model", "adapter", "max_pixels", "quantize", "chat_template_kwargs")
    named = (*named, "num_samples", "best_of", "prompts")
    found = [name for name in named if getattr(config, name) is not None]
    found += ["endpoint.model"] if config.endpoint.model is not None else []
    found += [f"generation.{name}" for name in config.generation.given]
    if found or given:
        raise UserError(
            f"--{(found or ['model'])[0]} has no effect: "
            f"{', '.join(task.name for task in tasks)} asks no model, it is the judge "
            "that is measured. Leave it out, and give who is to be measured as "
            "--judge.*"
        )


def _check_judge(tasks: Sequence[Task], config: EvalConfig) -> None:
    """Refuse a judge that cannot answer what it is measured by."""
    measured = [task.name for task in tasks if task.measures_judge]
    if measured:
        who = f"{measured[0]} has the judge write what it observes"
        config.judge.check_writes(who)


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
