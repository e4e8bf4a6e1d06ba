"""The files of a run, and what they say it was made with.

``OUT/<task>[@<condition>]/``:

* ``answers.jsonl``: ``index, question, sample, answer, status`` and, of one that
  failed, ``reason``.
* ``grades.jsonl``: ``index, question, sample, grade, raw, status``; ``raw`` is the
  judge's reply, verbatim.
* ``items.jsonl``: what the page shows of an item beside that.
* ``metrics.json``: the figures; written last.

``OUT/settings.json`` is of the whole directory: who answers, who grades, in what words.
Of a part (``--shard i/n``) it also says which it is, of what, and all its options; its
``metrics.json`` have no figures.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

from jaxalign.errors import UserError
from jaxalign.evaluation import shown_items
from jaxalign.evaluation.published import read_jsonl
from jaxalign.evaluation.statistics import Figure
from jaxalign.evaluation.task import Grade, Graded, GradeStatus, Items, Question, Task
from jaxalign.whole_file import whole, write_text, writing


__all__ = [
    "OPTIONS",
    "SETTINGS",
    "TaskReport",
    "begin",
    "digest_of",
    "plain",
    "read_grades",
    "settings_of",
    "write",
]

SETTINGS = "settings.json"
OPTIONS = "options"
"""Of the command that makes a part; others may go on with it."""
_KEPT = "answers and verdicts are in the store, and the same command writes them"


class TaskReport(NamedTuple):
    """What a task came to."""

    name: str
    """Of its directory."""
    metrics: Mapping[str, Any]
    """As written to ``metrics.json``."""
    answers: int
    failed_answers: int
    gradings: int
    failed_gradings: int

    @property
    def failed_share(self) -> float:
        """The larger share of what failed, of answers and of gradings."""
        shares = (
            self.failed_answers / max(self.answers, 1),
            self.failed_gradings / max(self.gradings, 1),
        )
        return max(shares)


def begin(out: Path, identity: Mapping[str, Any]) -> None:
    """Make the directory of a run, or see that it is this run's.

    Args:
      out: the directory.
      identity: what may not differ between what it holds.
    Raises:
      UserError: it is of another run; says what differs.
    """
    kept = json.loads(json.dumps(identity, default=dict))
    path = out / SETTINGS
    if path.exists():
        before = settings_of(out)
        names = sorted((before.keys() | kept.keys()) - {OPTIONS})
        changed = [n for n in names if before.get(n) != kept.get(n)]
        if changed:
            raise UserError(
                f"--out {out} is of another run: {', '.join(changed)} differ"
                f"{'s' if len(changed) == 1 else ''} "
                f"({_difference(before, kept, changed[0])}). Give another --out"
            )
        return
    with writing(f"--out {out}", "nothing was asked"):
        out.mkdir(parents=True, exist_ok=True)
        if any(found.name != "store.db" for found in out.iterdir()):
            raise UserError(
                f"--out {out} has files and is not of jaxalign eval: give another"
            )
        write_text(path, json.dumps(kept, indent=2))


def settings_of(out: Path) -> dict[str, Any]:
    """Return what a directory was begun with; nothing where it is not begun.

    Raises:
      UserError: its file cannot be read.
    Example:
      >>> settings_of(Path("nowhere"))
      {}
    """
    path = out / SETTINGS
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    return found if isinstance(found, dict) else {}


def _difference(before: Mapping[str, Any], now: Mapping[str, Any], name: str) -> str:
    """Say where two values of a name differ, without quoting anything long."""
    old, new = before.get(name), now.get(name)
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(k for k in old.keys() | new.keys() if old.get(k) != new.get(k))
        name, old, new = f"{name}.{keys[0]}", old.get(keys[0]), new.get(keys[0])
    return f"{name}: {str(old)[:60]} there, {str(new)[:60]} now"


def digest_of(folder: Path) -> str:
    """Return a hash of the Markdown files of a directory."""
    found = hashlib.sha256()
    for path in sorted(folder.glob("*.md")):
        found.update(f"{path.name}\0".encode() + path.read_bytes() + b"\0")
    return found.hexdigest()


def write(
    out: Path,
    task: Task,
    items: Items,
    graded: Sequence[Graded],
    questions: Mapping[int, Sequence[Question]],
    settings: Mapping[str, Any],
    more: Mapping[str, Any] | None = None,
) -> TaskReport:
    """Write the files of a task.

    Args:
      out: directory of the run.
      task: in its condition.
      items: all that the task has.
      graded: those that were asked.
      questions: by an item's index; empty where only grades were given.
      settings: what the figures depend on; of a part, which has none, ``shard`` too.
      more: that ``metrics.json`` says beside the task's own figures.
    Raises:
      UserError: the disk is full, or a place cannot be written.
    """
    folder = out / task.directory
    answers = [row for one in graded for row in _answers(one)]
    grades = [row for one in graded for row in _grades(one)]
    shown = shown_items.rows(graded, questions)
    figures = {} if "shard" in settings else plain(task.metrics(graded))
    metrics = {
        "task": task.name,
        **({"condition": task.condition} if task.condition else {}),
        "n": len(graded),
        "settings": dict(settings),
        **figures,
        **({"defects": dict(items.defects)} if items.defects else {}),
        **({"facts": plain(task.facts)} if task.facts else {}),
        **(more or {}),
    }
    for name, rows in (("answers", answers), ("grades", grades), ("items", shown)):
        with whole(folder / f"{name}.jsonl", _KEPT) as file:
            file.writelines(map(_line, rows))
    with whole(folder / "metrics.json", _KEPT) as file:
        file.write(json.dumps(metrics, indent=1, ensure_ascii=False, default=dict))
    return TaskReport(
        task.directory,
        metrics,
        len(answers),
        sum(row["status"] == "failed" for row in answers),
        len(grades),
        sum(row["status"] == "judge_failed" for row in grades),
    )


def _answers(one: Graded) -> Iterator[dict[str, Any]]:
    for (name, sample), answer in one.answers.items():
        yield {
            "index": one.index,
            "question": name,
            "sample": sample,
            "answer": answer.text,
            "status": answer.status,
            **({} if answer.reason is None else {"reason": answer.reason}),
        }


def _grades(one: Graded) -> Iterator[dict[str, Any]]:
    for (name, sample), grade in one.grades.items():
        yield {
            "index": one.index,
            "question": name,
            "sample": sample,
            "grade": grade.value,
            "raw": grade.raw,
            "status": grade.status,
        }


def _line(row: Mapping[str, Any]) -> str:
    """Return a line of JSON, its characters as they are unless one is half a pair."""
    line = json.dumps(row, ensure_ascii=False) + "\n"
    try:
        line.encode()
    except UnicodeEncodeError:
        return json.dumps(row) + "\n"
    return line


def plain(value: Any) -> Any:
    """Return figures as JSON has them; what is no number is None.

    >>> plain({"CO": Figure(0.5, None, (0.2, 0.8), 8)})["CO"]["interval"]
    [0.2, 0.8]
    """
    if isinstance(value, Figure):
        return {
            "value": plain(value.value),
            "standard_error": plain(value.standard_error),
            "interval": None if value.interval is None else plain(value.interval),
            "n": value.n,
        }
    if isinstance(value, Mapping):
        return {str(name): plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    if hasattr(value, "item"):  # a number of NumPy's
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def read_grades(path: Path, items: Items) -> list[Graded]:
    """Read a ``grades.jsonl``: one line a question and sample.

    Args:
      path: of the file.
      items: of the task; a line's ``index`` is that of an item.
    Raises:
      UserError: a line is none, twice there, or of no item.
    """
    found: dict[int, dict[tuple[str, int], Grade]] = {}
    statuses = get_args(GradeStatus)
    for number, row in enumerate(read_jsonl(path), 1):
        where = f"{path}: line {number}"
        index, name, sample = (row.get(k) for k in ("index", "question", "sample"))
        sample = 0 if sample is None else sample
        status = row.get("status", "ok")
        if not isinstance(index, int) or not 0 <= index < len(items.rows):
            raise UserError(
                f"{where}: index must be that of one of {len(items.rows)} items: got "
                f"{index!r}"
            )
        if not isinstance(name, str) or not isinstance(sample, int):
            raise UserError(
                f"{where}: question must be a text and sample a number: got {name!r} "
                f"and {sample!r}"
            )
        if status not in statuses:
            raise UserError(
                f"{where}: status must be one of {', '.join(statuses)}: got {status!r}"
            )
        mine = found.setdefault(index, {})
        if (name, sample) in mine:
            raise UserError(
                f"{where}: index {index}, question {name}, sample {sample} are there "
                "already: leave one of them"
            )
        value = row.get("grade") if status == "ok" else None
        mine[name, sample] = Grade(value, status, row.get("raw"))
    return [
        Graded(index, items.rows[index], {}, grades)
        for index, grades in sorted(found.items())
    ]
