"""ChineseSimpleVQA: what a model sees in a picture, and what it knows of it.

1,100 pictures with two questions each: what it shows (``recognition``), and something
that one must know of that (``final``). Source: https://arxiv.org/abs/2502.11718,
https://github.com/OpenStellarTeam/ChineseSimpleVQA (data: CC-BY-NC-SA-4.0).

The authors' scripts do not run: they send the picture's address as text (143 addresses
name the answer), count a failed judgement as not attempted and lose a row whose id is
there twice. Here the picture is sent, rows are told apart by their place, and what
their rule would print stands under ``upstream``.

Conditions, each a run of its own:

* ``seen``: picture and question, as published.
* ``gold_object``: the final question with the recognition's answer, no picture: what
  the model knows once it is told what there is to see.
* ``caption``: both questions with ``desc``, no picture; it holds many answers.
* ``text_only``: the questions alone, the floor.
* ``blank``: a white picture; ``shuffled``: another row's.

Nothing else of a row reaches the model, its address and its answers never.
"""

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jaxalign.errors import UserError
from jaxalign.evaluation import calibration, grading, statistics
from jaxalign.evaluation.choosing import choice_of, chosen, over_samples
from jaxalign.evaluation.prompts import prompt
from jaxalign.evaluation.questions import question
from jaxalign.evaluation.shares import groups_of
from jaxalign.evaluation.stated import asking, stated
from jaxalign.evaluation.task import (
    Answer,
    Graded,
    Grading,
    Question,
    Task,
    TaskOptions,
    drawn,
)
from jaxalign.evaluation.vqa_rows import VQARow, load
from jaxalign.judging.graders import grade_request
from jaxalign.judging.judge import Subject


__all__ = ["CONDITIONS", "TASK"]

CONDITIONS = ("seen", "gold_object", "caption", "text_only", "blank", "shuffled")

_LATIN = re.compile("[(\uff08]([A-Za-z][A-Za-z0-9 .,'\u2019-]*)[)\uff09]")
"""A name's original in brackets."""


def requests(row: VQARow, *, options: TaskOptions, condition: str) -> list[Question]:
    """Return the questions on a row: all of it that can reach the model."""
    asked = {"recognition": row.recognition[0], "final": row.final[0]}
    template, values = "chinese_simplevqa", {}
    if condition == "gold_object":
        del asked["recognition"]
        template, values = "chinese_simplevqa_object", {"object": row.recognition[1]}
    elif condition == "caption":
        template, values = "chinese_simplevqa_caption", {"caption": row.caption}
    made = []
    for name, asked_for in asked.items():
        text = prompt(template, {"question": asked_for, **values}, options.own)
        if options.confidence:
            text = asking(text, options.own)
        made.append(question(name, text, row.picture))
    return made


def grade(
    row: VQARow, answers: Mapping[tuple[str, int], Answer], *, options: TaskOptions
) -> list[Grading]:
    """Return what is to be graded: every answer, three ways.

    The judge sees question, true answer and answer, neither picture nor address.
    """
    made = []
    for (name, sample), answer in answers.items():
        question, truth = getattr(row, name)
        text = stated(answer.text).answer if options.confidence else answer.text
        subject = Subject(question, text, references=_accepted(truth))
        request = grade_request(subject, options.judge_own)
        made.append(Grading(name, name, sample, request))
    for name in dict.fromkeys(name for name, _ in answers):
        several = {s: answer for (n, s), answer in answers.items() if n == name}
        made += choice_of(getattr(row, name)[0], name, several, options)
    return made


def _accepted(truth: str) -> tuple[str, ...]:
    """Return an answer, and where it has its original in brackets each name alone."""
    if (found := _LATIN.search(truth)) is None:
        return (truth,)
    alone = (truth[: found.start()] + truth[found.end() :]).strip()
    return tuple(name for name in (truth, alone, found[1].strip()) if name)


def metrics(
    graded: Sequence[Graded], *, options: TaskOptions, condition: str
) -> dict[str, Any]:
    """Return the figures: of each question, by topic, together, and how sure it was."""
    names = ("final",) if condition == "gold_object" else ("recognition", "final")
    weights = {name: [chosen(one, name, options) for one in graded] for name in names}
    found: dict[str, Any] = {
        name: grading.three_way(rows) for name, rows in weights.items()
    }
    found["topics"] = _by([one.item.topic for one in graded], weights)
    found["subtopics"] = _by([one.item.subject for one in graded], weights)
    found["macro"] = {
        name: _macro([one[name] for one in found["topics"].values()]) for name in names
    }
    if len(names) == 2:
        both = grading.joint(weights["recognition"], weights["final"])
        found["joint"], found["given"] = both["table"], both["given"]
    found["upstream"] = {name: grading.upstream(rows) for name, rows in weights.items()}
    if options.confidence:
        found["calibration"] = {name: _calibrated(graded, name) for name in names}
    if (options.num_samples or 1) > 1:
        found["samples"] = {name: over_samples(graded, name) for name in names}
    return found


def _by(
    labels: Sequence[str], weights: Mapping[str, Sequence[grading.Weights]]
) -> dict[str, Any]:
    return {
        label: {
            name: grading.three_way([rows[n] for n in places])
            for name, rows in weights.items()
        }
        for label, places in groups_of(labels).items()
    }


def _macro(topics: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Return means over topics, each with the same weight."""
    found = {}
    for name in ("CO", "IN", "NA", "CGA", "F"):
        known = [t[name].value for t in topics if t[name].value is not None]
        found[name] = sum(known) / len(known) if known else None
    return found


def _calibrated(graded: Sequence[Graded], name: str) -> dict[str, Any]:
    """Return how stated confidence goes with being right; refusals are left out."""
    sure, right = [], []
    unparsed = not_attempted = 0
    for one in graded:
        answer, given = one.answers.get((name, 0)), one.grades.get((name, 0))
        if answer is None or given is None or given.status != "ok":
            continue
        confidence = stated(answer.text).confidence
        if given.value == "not_attempted":
            not_attempted += 1
        elif confidence is None:
            unparsed += 1
        else:
            sure.append(confidence)
            right.append(float(given.value == "correct"))
    left_out = {"unparsed": unparsed, "not_attempted": not_attempted}
    return {**calibration.figures(sure, right), "left_out": left_out}


def variants(task: Task, options: TaskOptions) -> list[Task]:
    """Return one task for each condition.

    Raises:
      UserError: there is no such condition.
    """
    unknown = [name for name in options.conditions if name not in CONDITIONS]
    if unknown:
        raise UserError(
            f"--conditions: there is no {unknown[0]!r}: expected some of "
            f"{', '.join(CONDITIONS)}"
        )
    return [
        dataclasses.replace(
            drawn(task, options),
            load=functools.partial(
                load, condition=name, seed=options.seed, image_dir=options.image_dir
            ),
            requests=functools.partial(requests, options=options, condition=name),
            grade=functools.partial(grade, options=options),
            metrics=functools.partial(metrics, options=options, condition=name),
            condition="" if name == "seen" else name,
            facts=task.facts if name == "seen" else {},
        )
        for name in dict.fromkeys(options.conditions)
    ]


_PUBLISHED = {
    "o1-preview": ((79.1, 13.6, 7.3, 85.3, 82.1), (68.8, 24.6, 6.5, 73.6, 71.1)),
    "Gemini-2.0-flash": ((76.7, 19.6, 3.7, 79.7, 78.2), (64.5, 29.5, 5.9, 68.6, 66.5)),
    "Claude-3.5-sonnet2": (
        (77.6, 17.2, 5.2, 81.9, 79.7),
        (63.8, 30.6, 5.5, 67.6, 65.6),
    ),
    "Claude-3.5-sonnet": ((69.5, 20.2, 10.3, 77.5, 73.3), (59.5, 26.4, 14.2, 69.4, 64)),
    "GPT-4o": ((77.5, 15.5, 7.0, 83.4, 80.4), (59.1, 35.5, 5.4, 62.4, 60.7)),
    "Gemini-1.5-Pro": ((70.3, 25.9, 3.8, 73.1, 71.6), (56.5, 34.6, 8.8, 62.0, 59.2)),
    "Qwen-VL-max": ((72.9, 24.6, 2.5, 74.7, 73.8), (56.5, 39.6, 3.8, 58.8, 57.6)),
}
"""The table of the repository's README (of seven models, in its order): recognition
and final, each CO, IN, NA, CGA and F, in percent of 1,100."""


def _published() -> dict[str, Any]:
    """Return the published table as shares, those of all rows with their intervals.

    Two of its lines fit no whole numbers of 1,100 rows: misprints, or other rows.
    """
    names = ("CO", "IN", "NA", "CGA", "F")
    return {
        model: {
            question: {
                name: statistics.share(round(percent * 11), 1100)._replace(
                    value=percent / 100
                )
                if name in names[:3]
                else percent / 100
                for name, percent in zip(names, row, strict=True)
            }
            for question, row in zip(("recognition", "final"), rows, strict=True)
        }
        for model, rows in _PUBLISHED.items()
    }


_NOW = TaskOptions()

TASK = Task(
    name="chinese_simplevqa",
    load=load,
    requests=functools.partial(requests, options=_NOW, condition="seen"),
    grade=functools.partial(grade, options=_NOW),
    metrics=functools.partial(metrics, options=_NOW, condition="seen"),
    sampling={"temperature": 0.0, "max_new_tokens": 256},
    variants=variants,
    facts={
        "published": _published(),
        "source": "https://github.com/OpenStellarTeam/ChineseSimpleVQA, judge gpt-4o",
        "official": "The authors' scripts count a judgement that failed as not "
        "attempted (see upstream), and send the picture's address in its place.",
    },
)
