"""Directories as ``jaxalign eval`` leaves them, from strings of grades."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")


def write_task(
    path: Path,
    grades: Mapping[str, Sequence[Any]],
    *,
    metrics: Mapping[str, Any] | None = None,
    topics: Sequence[str] | None = None,
    samples: int = 1,
    items: Sequence[Mapping[str, Any]] | None = None,
) -> Path:
    """Write a task's files; a grade that is None is a judgement that failed."""
    path.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "index": n // samples,
            "question": question,
            "sample": n % samples,
            "grade": grade,
            "raw": None if grade is None else json.dumps({"grade": grade}),
            "status": "judge_failed" if grade is None else "ok",
        }
        for question, given in grades.items()
        for n, grade in enumerate(given)
    ]
    write_lines(path / "grades.jsonl", rows)
    answers = [
        {k: row[k] for k in ("index", "question", "sample")}
        | {"answer": f"answer {row['index']}", "status": "ok"}
        for row in rows
    ]
    write_lines(path / "answers.jsonl", answers)
    count = max(map(len, grades.values())) // samples
    task = {"task": path.name.partition("@")[0], "n": count}
    text = json.dumps({**task, **(metrics or {})}, ensure_ascii=False)
    (path / "metrics.json").write_text(text, encoding="utf-8")
    if items is None and topics is not None:
        items = [
            {"index": i, "asked": {}, "topic": topic} for i, topic in enumerate(topics)
        ]
    if items is not None:
        write_lines(path / "items.jsonl", items)
    return path
