"""Which tasks there are: ours by name, a person's by file."""

import importlib
import pkgutil
from pathlib import Path

from jaxalign.errors import UserError, did_you_mean
from jaxalign.evaluation import tasks as ours
from jaxalign.evaluation.task import Task
from jaxalign.judging.function import executed


__all__ = ["known", "resolve"]


def known() -> list[str]:
    """Return the names of our tasks.

    >>> "chinese_simplevqa" in known()
    True
    """
    return sorted(found.name for found in pkgutil.iter_modules(ours.__path__))


def resolve(name: str) -> tuple[Task, Path | None]:
    """Return a task, and the folder of its file where that is a person's own.

    A Python file is executed; it must have a ``TASK``. A JSON Lines file is a task
    without any code, see :mod:`.rows_task`.

    Args:
      name: of one of ours, or a path that ends in ``.py`` or ``.jsonl``.
    Raises:
      UserError: there is no such task, or the file is none.
    Example:
      >>> resolve("chinese_simplevqa")[0].name
      'chinese_simplevqa'
    """
    path = Path(name)
    if path.suffix == ".py":
        return _executed(path), path.parent
    if path.suffix in (".jsonl", ".json"):
        from jaxalign.evaluation import rows_task

        return rows_task.task_of(path), path.parent
    if name not in known():
        raise UserError(
            f"--tasks: there is no task {name!r}. {did_you_mean(name, known())} Tasks "
            f"are {', '.join(known())}, a Python file with a TASK, or a .jsonl file"
        )
    return importlib.import_module(f"{ours.__name__}.{name}").TASK, None


def _executed(path: Path) -> Task:
    try:
        source = path.read_bytes()
    except OSError as error:
        raise UserError(f"--tasks {path} cannot be read: {error}") from None
    module = executed(path, source, f"task_{path.stem}", "--tasks")
    task = getattr(module, "TASK", None)
    if not isinstance(task, Task):
        raise UserError(
            f"--tasks {path} has no TASK: expected `TASK = Task(name=..., load=..., "
            "requests=..., grade=..., metrics=...)` of jaxalign.evaluation.task"
        )
    return task
