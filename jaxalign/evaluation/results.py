"""What an evaluation left behind, read from its files: a task's figures and rows."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxalign.errors import UserError, did_you_mean
from jaxalign.evaluation import published


__all__ = ["Results", "leaves", "read", "read_task"]


class Results(NamedTuple):
    """One task of a run: what lies in ``OUT/<task>[@<condition>]``.

    >>> Results("mine", Path("out/mine"), {"n": 0}, (), (), {}).grades
    ()
    """

    name: str
    """Of the directory: the task, and its condition behind ``@``."""
    path: Path
    metrics: Mapping[str, Any]
    """``metrics.json``."""
    answers: tuple[Mapping[str, Any], ...]
    """Of ``answers.jsonl``: ``index, question, sample, answer, status``."""
    grades: tuple[Mapping[str, Any], ...]
    """Of ``grades.jsonl``: ``index, question, sample, grade, raw, status``."""
    items: Mapping[int, Mapping[str, Any]]
    """By index, of ``items.jsonl``: ``asked`` (each question's text), and where there
    are any ``images``, ``topic`` and ``references``. Empty without that file."""

    @property
    def task(self) -> str:
        """The task without its condition.

        >>> Results("qa@blank", Path("."), {}, (), (), {}).task
        'qa'
        """
        return self.name.partition("@")[0]


def read(out: Path) -> list[Results]:
    """Read all tasks of an ``--out``, or the one task whose directory is given.

    Args:
      out: the directory.
    Returns:
      Tasks in the order of their names.
    Raises:
      UserError: there is none, or a file is not as the harness writes it.
    Example:
      >>> import tempfile
      >>> out = Path(tempfile.mkdtemp())
      >>> (out / "mine").mkdir()
      >>> _ = (out / "mine" / "metrics.json").write_text('{"task": "mine", "n": 0}')
      >>> [task.name for task in read(out)]
      ['mine']
    """
    if (out / "metrics.json").is_file():
        return [read_task(out)]
    found = sorted(path.parent for path in out.glob("*/metrics.json"))
    if not found:
        what = "has no task with metrics.json" if out.is_dir() else "is no directory"
        raise UserError(
            f"{out} {what}: give the --out of a `jaxalign eval` that has ended, or the "
            "directory of one of its tasks"
        )
    return [read_task(path) for path in found]


def read_task(path: Path) -> Results:
    """Read one task's directory, see :func:`read`.

    Raises:
      UserError: a file is not as the harness writes it.
    Example::

      print(read_task(Path("out/xstest")).metrics["n"])
    """
    metrics = published.read_json(path / "metrics.json")
    if not isinstance(metrics, dict):
        raise UserError(
            f"{path / 'metrics.json'} must be a JSON object: got "
            f"{type(metrics).__name__}"
        )
    items = _rows(path / "items.jsonl", ("index",))
    return Results(
        path.resolve().name,
        path,
        metrics,
        tuple(_rows(path / "answers.jsonl", ("index", "question", "sample", "status"))),
        tuple(_rows(path / "grades.jsonl", ("index", "question", "sample", "status"))),
        {row["index"]: row for row in items},
    )


def leaves(
    metrics: Mapping[str, Any], at: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Mapping[str, Any]]]:
    """Yield (path, leaf) of all figures in nested metrics, in their order.

    A leaf is a mapping with ``value`` and ``n``.

    Args:
      metrics: of ``metrics.json``.
      at: the path to them.
    Example:
      >>> figure = {"value": 0.5, "standard_error": None, "interval": None, "n": 8}
      >>> list(leaves({"n": 8, "final": {"CO": figure, "judge_failed": 0}}))[0][0]
      ('final', 'CO')
    """
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            if "value" in value and "n" in value:
                yield (*at, name), value
            else:
                yield from leaves(value, (*at, name))


def _rows(path: Path, fields: tuple[str, ...]) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    rows = published.read_jsonl(path)
    for number, row in enumerate(rows, 1):
        for field in fields:
            if field not in row:
                raise UserError(
                    f"{path}: row {number} lacks {field!r}. {did_you_mean(field, row)} "
                    "Give a directory that `jaxalign eval` wrote"
                )
    return rows
