"""Aspects: what a judge makes of a model's answers, each on several scales.

``prompts.jsonl`` in the data directory has one ``{"prompt": text or messages}`` a line,
maybe with ``images`` and a ``topic``. The judge scores every answer as a whole, from 0
to 4 on each of ``--judge.aspects``, by the rubrics of the judges (those of ``jaxalign
judge``). Means are over items; several answers to one prompt are a cluster.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxalign.data import records
from jaxalign.evaluation import outcomes, published, shares, statistics
from jaxalign.evaluation.questions import prompt_question
from jaxalign.evaluation.task import (
    Answer,
    Grade,
    Graded,
    Grading,
    Items,
    Question,
    Task,
    TaskOptions,
    drawn,
)
from jaxalign.judging.judge import Subject
from jaxalign.judging.prompts import MAX_SCORE, scores_request


__all__ = ["TASK", "AspectPrompt"]

_FOLDERS = ("aspects",)
_FILE = "prompts.jsonl"


class AspectPrompt(NamedTuple):
    """A prompt.

    >>> AspectPrompt(records.parse_prompt({"prompt": "Hi"}), "").prompt.text
    'Hi'
    """

    prompt: records.Prompt
    topic: str


def load(folder: Path, *, image_dir: Path | None = None) -> Items:
    """Read the prompts.

    Raises:
      UserError: the file is missing, or a line is no prompt.
    """
    path = published.find_file(folder, _FILE, _FOLDERS, source="prompts of your own")
    base = image_dir or path.parent
    rows = published.read_jsonl(path)
    return Items(
        [
            AspectPrompt(
                records.parse_prompt(row, f"{path}: line {number}", base),
                str(row.get("topic") or ""),
            )
            for number, row in enumerate(rows, 1)
        ]
    )


def requests(row: AspectPrompt) -> list[Question]:
    """Return the prompt as it stands."""
    return [prompt_question("answer", row.prompt)]


def grade(
    row: AspectPrompt,
    answers: Mapping[tuple[str, int], Answer],
    *,
    options: TaskOptions,
) -> list[Grading]:
    """Return one request an answer: its scores on every aspect.

    An empty answer is not sent: it has 0 on each.
    """
    given = row.prompt.text
    asked = given if isinstance(given, str) else tuple(turn.turn() for turn in given)
    made = []
    for (name, sample), answer in answers.items():
        if not answer.text:
            by: Any = Grade(dict.fromkeys(options.aspects, 0.0))
            made.append(Grading("scores", name, sample, by))
            continue
        spans = ((0, len(answer.text)),)
        subject = Subject(asked, answer.text, spans, options.aspects)
        request = scores_request(subject, options.judge_own)
        images = row.prompt.images
        made.append(Grading("scores", name, sample, request, _scores, images))
    return made


def _scores(value: Any) -> Grade:
    return Grade(value["segments"][0])


def metrics(graded: Sequence[Graded], *, options: TaskOptions) -> dict[str, Any]:
    """Return the mean of each aspect, 0 to 4, over all and by topic."""
    means = functools.partial(_means, options=options)
    found = {**means(graded), **shares.of_topics(graded, means)}
    grades = [grade for one in graded for grade in one.grades.values()]
    return {**found, "most": MAX_SCORE, **outcomes.failures(grades)}


def _means(graded: Sequence[Graded], options: TaskOptions) -> dict[str, Any]:
    scored = [
        (one.index, grade.value)
        for one in graded
        for grade in one.grades.values()
        if grade.status == "ok"
    ]
    items = [index for index, _ in scored]
    several = len(set(items)) < len(items)
    return {
        aspect: statistics.clustered(values, items)
        if several
        else statistics.mean(values)
        for aspect in options.aspects
        for values in ([float(value[aspect]) for _, value in scored],)
    }


def variants(task: Task, options: TaskOptions) -> list[Task]:
    """Return the task as the options want it."""
    return [
        dataclasses.replace(
            drawn(task, options),
            load=functools.partial(load, image_dir=options.image_dir),
            grade=functools.partial(grade, options=options),
            metrics=functools.partial(metrics, options=options),
        )
    ]


TASK = Task(
    name="aspects",
    load=load,
    requests=requests,
    grade=functools.partial(grade, options=TaskOptions()),
    metrics=functools.partial(metrics, options=TaskOptions()),
    variants=variants,
)
