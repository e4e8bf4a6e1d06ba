"""A model and a judge that say what a function of the request returns."""

from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxalign.evaluation import harness
from jaxalign.evaluation.config import EvalConfig
from jaxalign.evaluation.run_files import TaskReport
from jaxalign.evaluation.task import Answer, Grade, Graded, Task
from jaxalign.judging.judge import JudgeRequest, Verdict


__all__ = ["Scripted", "graded_by_rules", "run"]

Script = Callable[[JudgeRequest], Any]


class Scripted:
    """Answers every request with what a function of it returns; None is a failure."""

    def __init__(self, script: Script, name: str):
        self.script, self.name = script, name
        self.seen: list[JudgeRequest] = []

    @property
    def settings(self) -> Mapping[str, Any]:
        return {"judge": self.name}

    async def grade(
        self, requests: Iterable[JudgeRequest]
    ) -> AsyncIterator[tuple[int, Verdict]]:
        for number, request in enumerate(requests):
            self.seen.append(request)
            value = self.script(request)
            if value is None:
                yield number, Verdict(None, "it failed")
            elif request.task == "prose":
                yield number, Verdict({"text": value, "finish_reason": "stop"})
            else:
                yield number, Verdict({"grade": value}, raw=str(value))


def run(
    task: str, folder: Path, out: Path, model: Script, judge: Script, **options: Any
) -> tuple[list[TaskReport], Scripted, Scripted]:
    """Run a task through the harness."""
    answering, grading = Scripted(model, "model"), Scripted(judge, "judge")
    files = {"tasks": (task,), "data_dir": str(folder), "out": str(out)}
    config = EvalConfig(model="none", **files, **options)
    reports = harness.evaluate(config, model=answering, judge=grading)
    return reports, answering, grading


def graded_by_rules(
    task: Task, rows: Sequence[Any], say: Callable[[Any], str | None]
) -> list[Graded]:
    """Return items with what rules say of an answer; None is an answer that failed."""
    found = []
    for index, row in enumerate(rows):
        text = say(row)
        status = "failed" if text is None else "ok" if text else "empty"
        answers = {
            (question.name, sample): Answer(text or "", status)
            for question in task.requests(row)
            for sample in range(task.num_samples)
        }
        grades = {
            (one.name, one.sample): Grade(None, "answer_failed")
            if status == "failed"
            else one.by
            for one in task.grade(row, answers)
            if isinstance(one.by, Grade)
        }
        found.append(Graded(index, row, answers, grades))
    return found
