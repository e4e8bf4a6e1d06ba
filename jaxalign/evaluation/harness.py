"""``jaxalign eval``: questions, answers, grades, figures; goes on where it was stopped.

Answers and verdicts are in the store (``OUT/store.db``) before they count, each under
a key of all that it depends on. So what was answered is never asked again, by whatever
the run was stopped, and a new judge grades old answers.
"""

import functools
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxalign import event_loops, progress
from jaxalign.configs import to_dict
from jaxalign.data.images import NamedPictures
from jaxalign.errors import UserError
from jaxalign.evaluation import run_files, shown_items
from jaxalign.evaluation.answering import Asked, answer_of, request_of, with_pictures
from jaxalign.evaluation.config import EvalConfig
from jaxalign.evaluation.contamination import overlap_with_training
from jaxalign.evaluation.planning import Planned, plan
from jaxalign.evaluation.run_files import TaskReport
from jaxalign.evaluation.task import (
    Answer,
    Grade,
    Graded,
    Grading,
    Question,
    Task,
)
from jaxalign.judging.asking import Usage, ask_all
from jaxalign.judging.endpoint_model import answering_model
from jaxalign.judging.judge import Expecting, Judge, JudgeRequest, Verdict
from jaxalign.judging.make import Function, make_judge
from jaxalign.judging.store import Store


__all__ = ["Runner", "evaluate", "grade_of", "model_of", "sampling_of"]

Asking = Callable[[Any, Sequence[JudgeRequest], str, Usage], Awaitable[list[Verdict]]]
"""Has a model or a judge answer requests: (whom, requests, what for, usage)."""

_SHARED = ("tasks", "limit", "conditions", "num_samples", "best_of", "agreement")
"""Options beside the settings that decide what is asked: of all parts the same."""


def evaluate(
    config: EvalConfig,
    *,
    model: Judge | None = None,
    judge: Judge | Function | None = None,
) -> list[TaskReport]:
    """Run every task, and write what each came to.

    Args:
      config: of the command.
      model: answers in the place of ``config.model``: anything that takes requests for
        prose, see :class:`jaxalign.judging.judge.Judge`.
      judge: grades in the place of ``config.judge``; a Judge, or a function.
    Returns:
      One report a task and condition, in their order.
    Raises:
      UserError: something the user gave is wrong, before anything is asked; or model,
        judge or store stop the run, which the same command then goes on with.
    Example::

      files = {"tasks": ("xstest",), "data_dir": "data", "out": "eval"}
      (report,) = evaluate(EvalConfig(model="smollm2", **files))
      report.metrics["over_refusal"]["value"]
    """
    out = Path(config.out)
    given = {"model": model, "judge": judge}
    planned = plan(config, objects=[n for n in given if given[n] is not None])
    pictures = NamedPictures()
    if config.grades is not None:
        (one,) = planned
        return [_of_grades(one, Path(config.grades), config, out)]
    answers = None
    if not all(one.task.measures_judge for one in planned):
        answers = model or model_of(config, pictures)
    grader = make_judge(config.judge, judge, load_image=pictures.load)
    run_files.begin(out, _identity(config, answers, grader))
    with Store(out / "store.db") as store:
        ask = functools.partial(_asked, store)
        runner = Runner(config, answers, grader, pictures, ask, run_files.write)
        return [event_loops.run(runner.run(one, out)) for one in planned]


def model_of(config: EvalConfig, pictures: NamedPictures) -> Any:
    """Return who answers; nothing is loaded and nothing sent yet.

    Args:
      config: of the command.
      pictures: those of the questions.
    Raises:
      UserError: there is no such checkpoint, or the endpoint cannot be.
    Example::

      model_of(EvalConfig(tasks=("xstest",), out="o", model="smollm2"), pictures)
    """
    kept = (run_files.settings_of(Path(config.out)).get("model") or {}).get("dtype")
    return answering_model(config, config.checkpoint, pictures, kept_dtype=kept)


def sampling_of(task: Task, question: Question, config: EvalConfig) -> dict[str, Any]:
    """Return how an answer is drawn: the task's way, the question's, the command's.

    Example::

      sampling_of(task, question, config)["max_new_tokens"]
    """
    found = {**task.sampling, **question.sampling, **config.generation.given}
    return found | ({"seed": config.seed} if config.seed else {})


def _identity(config: EvalConfig, model: Judge | None, judge: Judge) -> dict[str, Any]:
    """Return what may not differ between what one directory holds."""
    own = config.options
    return {
        "model": None if model is None else dict(model.settings),
        "judge": dict(judge.settings),
        "generation": config.generation.given,
        "seed": config.seed,
        "wording": config.wording,
        "confidence": config.confidence,
        "prompts": None if own.own is None else run_files.digest_of(own.own),
        "judge_wording": None
        if own.judge_own is None
        else run_files.digest_of(own.judge_own),
        **_of_part(config),
    }


def _of_part(config: EvalConfig) -> dict[str, Any]:
    """Return what a part also says of itself; nothing of the whole."""
    if config.shard is None:
        return {}
    shared = {name: getattr(config, name) for name in _SHARED}
    part = {"part": config.shard, **shared}
    return {"shard": part, run_files.OPTIONS: to_dict(config)}


class Runner:
    """What the tasks of a run share: who answers and grades, who asks, what writes.

    Example::

      runner = Runner(config, model, judge, pictures, ask, run_files.write)
      report = await runner.run(planned, Path("out"))
    """

    def __init__(
        self,
        config: EvalConfig,
        model: Any,
        judge: Any,
        pictures: NamedPictures,
        ask: Asking,
        write: Callable[..., Any],
    ):
        self.config, self.model, self.judge = config, model, judge
        self.pictures, self._ask, self._write = pictures, ask, write

    async def run(self, one: Planned, out: Path) -> Any:
        """Have a task answered and graded, and write its files."""
        name = one.task.directory
        rows = {index: one.items.rows[index] for index in one.indices}
        questions = {index: one.task.requests(row) for index, row in rows.items()}
        self._expect(one)
        answers, used = await self._answers(one.task, questions)
        gradings = {
            index: one.task.grade(row, answers[index]) for index, row in rows.items()
        }
        spent = Usage()
        grades = await self._grades(name, gradings, answers, spent)
        if (further := one.task.further) is not None:
            more = {index: further(row, grades[index]) for index, row in rows.items()}
            found = await self._grades(name, more, answers, spent)
            grades = {index: {**grades[index], **found[index]} for index in rows}
        graded = [
            Graded(index, rows[index], answers[index], grades[index]) for index in rows
        ]
        settings = {
            **self._drawn(one.task),
            "judge": dict(self.judge.settings),
            "limit": self.config.limit,
            "seed": self.config.seed,
            "bootstrap": {"seed": 0, "rounds": 2000},
            "tokens": {"answers": _plain(used), "judgements": _plain(spent)},
        }
        if self.config.shard is not None:
            settings["shard"] = self.config.shard
        adapter, items = self.config.adapter, one.items
        if one.task.measures_judge:
            adapter, questions = (
                None,
                {i: shown_items.as_questions(g) for i, g in gradings.items()},
            )
        more = _seen(adapter, name, questions)
        return self._write(*(out, one.task, items, graded, questions, settings), more)

    def _expect(self, one: Planned) -> None:
        """Tell a model in this process what all parts ask."""
        if isinstance(self.model, Expecting):
            self.model.expect(self._first_requests(one))

    def _first_requests(self, one: Planned) -> Iterator[JudgeRequest]:
        """Yield what all parts ask that goes on from no answer."""
        logprobs = self.config.best_of == "likelihood"
        for index in one.expected:
            for question in one.task.requests(one.items.rows[index]):
                if question.follows is not None:
                    continue
                how = sampling_of(one.task, question, self.config)
                for sample in range(one.task.num_samples):
                    yield request_of(
                        *(question, sample, (), how, self.pictures), logprobs=logprobs
                    )

    def _drawn(self, task: Task) -> dict[str, Any]:
        """Return who answers and how; nothing where the judge is measured."""
        if task.measures_judge:
            return {}
        return {
            "model": dict(self.model.settings),
            "sampling": {**task.sampling, **self.config.generation.given},
            "num_samples": task.num_samples,
        }

    async def _answers(
        self, task: Task, questions: Mapping[int, Sequence[Question]]
    ) -> tuple[dict[int, dict[tuple[str, int], Answer]], Usage]:
        """Have all questions answered, those that follow others after them."""
        answers: dict[int, dict[tuple[str, int], Answer]] = {i: {} for i in questions}
        turns: dict[tuple[int, str, int], tuple[Mapping[str, Any], ...]] = {}
        left = [
            Asked(index, question, sample)
            for index, some in questions.items()
            for question in some
            for sample in range(task.num_samples)
        ]
        used, logprobs = Usage(), self.config.best_of == "likelihood"
        while left:
            ready, later = _parted(left, answers)
            if not ready:
                named = left[0].question
                raise UserError(
                    f"the question {named.name} follows {named.follows}, which is no "
                    "question of its item"
                )
            asked, requests = [], []
            for one in ready:
                place = one.question.name, one.sample
                before: tuple[Mapping[str, Any], ...] = ()
                if one.question.follows is not None:
                    earlier = one.question.follows, one.sample
                    answer = answers[one.index][earlier]
                    if answer.status == "failed":
                        reason = f"{earlier[0]} failed: {answer.reason}"
                        answers[one.index][place] = Answer("", "failed", reason)
                        continue
                    said = {"role": "assistant", "content": answer.text}
                    before = (*turns[one.index, *earlier], said)
                request = request_of(
                    *(one.question, one.sample, before),
                    sampling_of(task, one.question, self.config),
                    self.pictures,
                    logprobs=logprobs,
                )
                turns[one.index, *place] = request.messages
                asked.append(one)
                requests.append(request)
            what = f"{task.directory}: answering"
            found = await self._ask(self.model, requests, what, used)
            for one, verdict in zip(asked, found, strict=True):
                answers[one.index][one.question.name, one.sample] = answer_of(verdict)
            left = later
        return answers, used

    async def _grades(
        self,
        name: str,
        gradings: Mapping[int, Sequence[Grading]],
        answers: Mapping[int, Mapping[tuple[str, int], Answer]],
        used: Usage,
    ) -> dict[int, dict[tuple[str, int], Grade]]:
        """Have all answers graded; what was not answered is not."""
        grades: dict[int, dict[tuple[str, int], Grade]] = {i: {} for i in gradings}
        asked: list[tuple[int, Grading]] = []
        requests: list[JudgeRequest] = []
        for index, some in gradings.items():
            for one in some:
                place = one.name, one.sample
                answer = answers[index].get((one.question, one.sample))
                if answer is not None and answer.status == "failed":
                    grades[index][place] = Grade(None, "answer_failed")
                elif isinstance(one.by, Grade):
                    grades[index][place] = one.by
                else:
                    grades[index][place] = Grade(None, "judge_failed")
                    asked.append((index, one))
                    requests.append(with_pictures(one.by, one.images, self.pictures))
        found = await self._ask(self.judge, requests, f"{name}: grading", used)
        for (index, one), verdict in zip(asked, found, strict=True):
            grades[index][one.name, one.sample] = grade_of(one, verdict)
        return grades


async def _asked(
    store: Store, whom: Judge, requests: Sequence[JudgeRequest], what: str, used: Usage
) -> list[Verdict]:
    """Return what was said to each request, now or before."""
    count = len(requests)
    return await ask_all(
        whom, requests, store, count, what=what, unit="items", usage=used
    )


def _parted(
    left: Sequence[Asked], answers: Mapping[int, Mapping[tuple[str, int], Answer]]
) -> tuple[list[Asked], list[Asked]]:
    """Return what can be asked now, and what goes on from an answer still to come."""
    ready: list[Asked] = []
    later: list[Asked] = []
    for one in left:
        before = one.question.follows
        settled = before is None or (before, one.sample) in answers[one.index]
        (ready if settled else later).append(one)
    return ready, later


def _plain(used: Usage) -> dict[str, Any]:
    """Return what was asked in this run, and what it took."""
    tokens = {n: getattr(used, n) for n in ("prompt_tokens", "completion_tokens")}
    return {"calls": used.asked, **tokens, "cost": used.cost}


def _seen(
    adapter: str | None, name: str, questions: Mapping[int, Sequence[Question]]
) -> dict[str, Any]:
    """Return what of a task the adapter's run was trained on, and say if it was."""
    if adapter is None:
        return {}
    found = overlap_with_training(Path(adapter), questions)
    if found is None:
        return {}
    if found["items"]:
        progress.say(
            f"{name}: {found['items']} of {found['compared']} items were in the "
            f"training set of {adapter}: these figures say little"
        )
    return {"seen": found}


def grade_of(grading: Grading, verdict: Verdict) -> Grade:
    """Return the grade that a verdict is.

    >>> grade_of(Grading("right", "q", 0, Grade("no")), Verdict({"grade": "yes"})).value
    'yes'
    """
    if verdict.failure is not None:
        return Grade(None, "judge_failed", verdict.raw)
    read = grading.read or (lambda value: Grade(value["grade"]))
    return read(verdict.value)._replace(raw=verdict.raw)


def _of_grades(one: Planned, path: Path, config: EvalConfig, out: Path) -> TaskReport:
    """Write what the grades of a file come to."""
    read = one.task.read_grades or run_files.read_grades
    graded = read(path, one.items)
    settings = {
        "grades": str(path),
        "limit": None,
        "seed": config.seed,
        "bootstrap": {"seed": 0, "rounds": 2000},
    }
    return run_files.write(out, one.task, one.items, graded, {}, settings)
