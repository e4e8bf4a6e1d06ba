"""``--log_format inspect``: what inspect-ai's viewer reads, written by its library.

``OUT/inspect/<task>.eval``, for ``inspect view --log-dir OUT/inspect``. A sample is a
question of an item, an epoch one of its answers; a score is a grade. What has no grade
is not scored there either: its value is NaN, which inspect leaves out and counts.
"""

import datetime
import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxalign.errors import UserError
from jaxalign.evaluation import results
from jaxalign.evaluation.results import Results
from jaxalign.whole_file import writing


__all__ = ["library", "log_of", "write"]

_APART = ("topics", "subtopics", "joint", "upstream", "facts", "settings")
"""Parts of metrics that are no headline figures."""


def write(out: str | Path) -> list[Path]:
    """Write a log of each task in a directory.

    Args:
      out: the ``--out`` of ``jaxalign eval``.
    Returns:
      Where the logs are.
    Raises:
      UserError: the library is not there, or the place cannot be written.
    Example::

      write("out")
    """
    EvalLog, write_eval_log = library()
    folder, written = Path(out) / "inspect", []
    for task in results.read(Path(out)):
        path = folder / f"{task.name}.eval"
        log = EvalLog.model_validate(log_of(task))
        with writing(path, "answers, grades and figures are in the task's files"):
            folder.mkdir(parents=True, exist_ok=True)
            write_eval_log(log, str(path), "eval")
        written.append(path)
    return written


def library() -> tuple[Any, Any]:
    """Return inspect's ``EvalLog`` and ``write_eval_log``; a run asks before it begins.

    Raises:
      UserError: the library is not there.
    Example::

      EvalLog, write_eval_log = library()
    """
    try:
        from inspect_ai.log import (  # pyright: ignore[reportMissingImports]
            EvalLog,
            write_eval_log,
        )
    except ImportError as error:
        raise UserError(
            f"--log_format inspect needs the library inspect_ai ({error}): "
            "`pip install inspect-ai`"
        ) from None
    return EvalLog, write_eval_log


def log_of(task: Results) -> dict[str, Any]:
    """Return a task as inspect's ``EvalLog``, in plain objects.

    Args:
      task: with its files.
    Returns:
      What ``inspect_ai.log.EvalLog.model_validate`` takes (version 2 of the format).
    Example:
      >>> import tempfile
      >>> folder = Path(tempfile.mkdtemp())
      >>> _ = (folder / "metrics.json").write_text('{"task": "mine", "n": 0}')
      >>> log = log_of(results.read_task(folder))
      >>> log["eval"]["task"], log["status"], log["samples"]
      ('mine', 'success', [])
    """
    settings = task.metrics.get("settings") or {}
    model = _model(settings)
    samples = _samples(task, model)
    limit = settings.get("limit")
    created = (task.path / "metrics.json").stat().st_mtime
    stamp = datetime.datetime.fromtimestamp(created, datetime.UTC)
    return {
        "version": 2,
        "status": "success",
        "eval": {
            "created": stamp.isoformat(timespec="seconds"),
            "task": str(task.metrics.get("task", task.name)),
            "task_id": task.name,
            "run_id": f"{task.name}-{stamp:%Y%m%dT%H%M%S}",
            "task_args": json.loads(json.dumps(settings)),
            "dataset": {
                "name": task.name,
                "samples": len({sample["id"] for sample in samples}),
                "sample_ids": list(dict.fromkeys(s["id"] for s in samples)),
            },
            "model": model,
            "config": {
                "epochs": max((s["epoch"] for s in samples), default=1),
                **({"limit": limit} if limit else {}),
            },
        },
        "results": {
            "total_samples": len(samples),
            "completed_samples": sum("error" not in sample for sample in samples),
            "scores": _scores(task),
        },
        "samples": samples,
    }


def _model(settings: Mapping[str, Any]) -> str:
    model = settings.get("model") or settings.get("judge")
    if isinstance(model, Mapping):
        model = "+".join(str(model[k]) for k in ("model", "adapter") if model.get(k))
    return str(model or "unknown")


def _samples(task: Results, model: str) -> list[dict[str, Any]]:
    """Return one sample for each answer, or where there are none for each grade."""
    said = {(r["index"], r["question"], r["sample"]): r for r in task.answers}
    graded: dict[tuple[int, str, int], list[Mapping[str, Any]]] = defaultdict(list)
    names: dict[int, list[str]] = defaultdict(list)
    for index, question, _ in said:
        names[index].append(question)
    for row in task.grades:
        asked = names[row["index"]]
        # A grading may be called otherwise than the question; it is of the last one.
        name = row["question"]
        question = name if name in asked or not asked else asked[-1]
        graded[row["index"], question, row["sample"]].append(row)
    several = any(len(set(questions)) > 1 for questions in names.values())
    return [
        _sample(key, said.get(key), graded[key], task.items.get(key[0], {}), model)
        | {"id": f"{key[0]}-{key[1]}" if several else key[0]}
        for key in dict.fromkeys([*said, *graded])
    ]


def _sample(
    key: tuple[int, str, int],
    answer: Mapping[str, Any] | None,
    grades: Sequence[Mapping[str, Any]],
    item: Mapping[str, Any],
    model: str,
) -> dict[str, Any]:
    index, question, sample = key
    asked = str((item.get("asked") or {}).get(question, ""))
    pictures = [{"type": "image", "image": url} for url in item.get("images") or ()]
    user = {"role": "user", "content": [*pictures, {"type": "text", "text": asked}]}
    made: dict[str, Any] = {
        "epoch": sample + 1,
        "input": [user],
        "target": item.get("references") or "",
        "messages": [user],
        "scores": {row["question"]: _score(row, answer) for row in grades},
        "metadata": {
            "index": index,
            "question": question,
            **({"topic": item["topic"]} if item.get("topic") else {}),
        },
    }
    if answer is None:
        return made
    reply = {"role": "assistant", "content": answer.get("answer") or ""}
    made["messages"] = [user, reply]
    made["output"] = {
        "model": model,
        "choices": [{"message": reply, "stop_reason": "stop"}],
    }
    if answer["status"] == "failed":
        reason = str(answer.get("reason") or "no reply")
        made["error"] = {"message": reason, "traceback": "", "traceback_ansi": ""}
    return made


def _score(row: Mapping[str, Any], answer: Mapping[str, Any] | None) -> dict[str, Any]:
    ok = row["status"] == "ok"
    return {
        "value": _plain(row.get("grade")) if ok else math.nan,
        "answer": None if answer is None else answer.get("answer"),
        "explanation": row.get("raw"),
        "metadata": {"status": row["status"]},
    }


def _plain(grade: Any) -> Any:
    """Return a grade as the format has it: a list of objects as JSON."""
    nested = isinstance(grade, list) and any(isinstance(x, Mapping) for x in grade)
    return json.dumps(grade, ensure_ascii=False) if nested else grade


def _scores(task: Results) -> list[dict[str, Any]]:
    """Return the headline figures, grouped as the task nests them."""
    kept = {k: v for k, v in task.metrics.items() if k not in _APART}
    groups: dict[str, dict[str, Any]] = defaultdict(dict)
    for path, leaf in results.leaves(kept):
        if leaf["value"] is None:
            continue
        metrics = groups[".".join(path[:-1]) or task.name]
        metrics[path[-1]] = {
            "name": path[-1],
            "value": leaf["value"],
            "metadata": {"n": leaf["n"], "interval": leaf.get("interval")},
        }
        error = leaf.get("standard_error")
        if error is not None:
            name = f"{path[-1]}_stderr"
            metrics[name] = {"name": name, "value": error}
    return [
        {"name": name, "scorer": name, "metrics": metrics}
        for name, metrics in groups.items()
    ]
