"""Chinese SimpleQA: 3,000 short questions on facts, the text sibling.

Source: https://arxiv.org/abs/2411.07140,
https://github.com/OpenStellarTeam/ChineseSimpleQA (data: CC-BY-NC-SA-4.0). Graded as
:mod:`.chinese_simplevqa` is. Five rows of the published file have blanks around their
question or answer, which are taken off.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxalign.errors import UserError
from jaxalign.evaluation import grading, published
from jaxalign.evaluation.choosing import choice_of, chosen, over_samples
from jaxalign.evaluation.prompts import prompt
from jaxalign.evaluation.questions import question
from jaxalign.evaluation.shares import groups_of
from jaxalign.evaluation.task import (
    Answer,
    Graded,
    Grading,
    Items,
    Question,
    Task,
    TaskOptions,
    drawn,
)
from jaxalign.judging.graders import grade_request
from jaxalign.judging.judge import Subject


__all__ = ["TASK", "Fact"]

_SOURCE = "https://huggingface.co/datasets/OpenStellarTeam/Chinese-SimpleQA"
_NAME = "answer"


class Fact(NamedTuple):
    """A question with its answer.

    >>> Fact("Q?", "A", "T", "S").topic
    'T'
    """

    question: str
    answer: str
    topic: str
    subtopic: str

    @property
    def references(self) -> tuple[str]:
        """The answer, for the page."""
        return (self.answer,)


def load(folder: Path) -> Items:
    """Read the rows.

    Raises:
      UserError: the file is missing, or a row lacks a field.
    """
    path = published.find_file(
        folder, "chinese_simpleqa.jsonl", ("chinese_simpleqa",), source=_SOURCE
    )
    found, blanks = [], 0
    for number, row in enumerate(published.read_jsonl(path)):
        names = ("question", "answer", "primary_category", "secondary_category")
        texts = [row.get(name) for name in names]
        lacking = [
            n for n, t in zip(names, texts, strict=True) if not isinstance(t, str)
        ]
        if lacking:
            raise UserError(f"{path}: row {number}: expected a text in {lacking[0]}")
        stripped = [str(text).strip() for text in texts]
        blanks += stripped != texts
        found.append(Fact(*stripped))
    return Items(found, {"blanks around a field": blanks} if blanks else {})


def requests(row: Fact, *, options: TaskOptions) -> list[Question]:
    """Return the question: all of a row that can reach the model."""
    text = prompt("chinese_simpleqa", {"question": row.question}, options.own)
    return [question(_NAME, text)]


def grade(
    row: Fact, answers: Mapping[tuple[str, int], Answer], *, options: TaskOptions
) -> list[Grading]:
    """Return what is to be graded: every answer, three ways."""
    made = []
    for (name, sample), answer in answers.items():
        subject = Subject(row.question, answer.text, references=(row.answer,))
        request = grade_request(subject, options.judge_own)
        made.append(Grading(name, name, sample, request))
    several = {sample: answer for (_, sample), answer in answers.items()}
    return [*made, *choice_of(row.question, _NAME, several, options)]


def metrics(graded: Sequence[Graded], *, options: TaskOptions) -> dict[str, Any]:
    """Return the figures, over all and by topic."""
    rows = [chosen(one, _NAME, options) for one in graded]
    found: dict[str, Any] = {"overall": grading.three_way(rows)}
    for key, name in (("topics", "topic"), ("subtopics", "subtopic")):
        labels = [getattr(one.item, name) for one in graded]
        found[key] = {
            label: grading.three_way([rows[n] for n in places])
            for label, places in groups_of(labels).items()
        }
    found["upstream"] = grading.upstream(rows)
    if (options.num_samples or 1) > 1:
        found["samples"] = over_samples(graded, _NAME)
    return found


def variants(task: Task, options: TaskOptions) -> list[Task]:
    """Return the task as the options want it."""
    return [
        dataclasses.replace(
            drawn(task, options),
            requests=functools.partial(requests, options=options),
            grade=functools.partial(grade, options=options),
            metrics=functools.partial(metrics, options=options),
        )
    ]


_NOW = TaskOptions()

TASK = Task(
    name="chinese_simpleqa",
    load=load,
    requests=functools.partial(requests, options=_NOW),
    grade=functools.partial(grade, options=_NOW),
    metrics=functools.partial(metrics, options=_NOW),
    sampling={"temperature": 0.0, "max_new_tokens": 256},
    variants=variants,
)
