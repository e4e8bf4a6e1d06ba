"""A task without any code: JSON Lines of ``{"prompt", "images", "references"}``.

``--tasks rows.jsonl``. ``prompt`` is a text or messages, ``images`` as in feedback
records, ``references`` a text or several, any of which will do. An answer counts as an
exact match where it equals one after case, width, punctuation and articles; and it is
graded three ways by the judge, by default the rules. With ``choices`` (texts) they are
written below the prompt, ``references`` is the right one's letter or text, and the
letter is read from the answer: no judge is asked. ``topic`` is optional.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxalign.data import records
from jaxalign.errors import UserError
from jaxalign.evaluation import grading, published, shares, statistics
from jaxalign.evaluation.choices import choice_figures, choice_grading
from jaxalign.evaluation.letters import LETTERS, with_options
from jaxalign.evaluation.questions import prompt_question
from jaxalign.evaluation.task import (
    Answer,
    Grade,
    Graded,
    Grading,
    Question,
    Task,
    TaskOptions,
    drawn,
)
from jaxalign.judging.exact_match import normalised
from jaxalign.judging.graders import grade_request
from jaxalign.judging.judge import Subject


__all__ = ["RowItem", "task_of"]

_NAME = "answer"


class RowItem(NamedTuple):
    """A row of the file.

    >>> prompt = records.parse_prompt({"prompt": "2 + 2?"})
    >>> RowItem(prompt, ("4",), {}, "").references
    ('4',)
    """

    prompt: records.Prompt
    references: tuple[str, ...]
    options: Mapping[str, str]
    """From a letter to its text; empty where the answer is free."""
    topic: str


def task_of(path: Path) -> Task:
    """Return the task that a file of rows is.

    Its figures are ``exact_match`` and CO, IN, NA, CGA, F under ``graded``; with
    choices those of :func:`.choices.choice_figures`: what is unparsed is wrong.

    Args:
      path: of the file; what is in it is read when the task is loaded.
    Example:
      >>> task_of(Path("rows.jsonl")).name
      'rows'
    """
    return Task(
        name=path.name.partition(".")[0],
        load=functools.partial(_load, path, None),
        requests=_requests,
        grade=_grade,
        metrics=_metrics,
        variants=functools.partial(_variants, path),
    )


def _variants(path: Path, task: Task, options: TaskOptions) -> list[Task]:
    load = functools.partial(_load, path, options.image_dir)
    return [dataclasses.replace(drawn(task, options), load=load)]


def _load(path: Path, image_dir: Path | None, _: Path) -> list[RowItem]:
    """Read the rows; relative paths of pictures start beside the file."""
    folder = image_dir or path.parent
    found = []
    for number, row in enumerate(published.read_jsonl(path), 1):
        where = f"{path}: line {number}"
        given = row.get("references")
        references = (given,) if isinstance(given, str) else tuple(given or ())
        if not references or not all(isinstance(r, str) and r for r in references):
            raise UserError(
                f"{where}: references must be a text or a list of texts: got {given!r}"
            )
        prompt = records.parse_prompt(row, where, folder)
        options = _options(row.get("choices"), where)
        if options:
            references = (_right(references, options, where),)
        found.append(RowItem(prompt, references, options, str(row.get("topic") or "")))
    return found


def _options(choices: Any, where: str) -> dict[str, str]:
    if choices is None:
        return {}
    named = choices
    if isinstance(named, list):
        named = dict(zip(LETTERS, named, strict=False))
    texts = named.values() if isinstance(named, dict) else ()
    if len(texts) < 2 or not all(isinstance(text, str) for text in texts):
        raise UserError(f"{where}: choices must be two texts or more: got {choices!r}")
    return named


def _right(references: Sequence[str], options: Mapping[str, str], where: str) -> str:
    """Return the letter of the right choice."""
    for reference in references:
        if reference in options:
            return reference
        same = [name for name, text in options.items() if text == reference]
        if same:
            return same[0]
    raise UserError(
        f"{where}: references must be the letter or the text of a choice: got "
        f"{list(references)}"
    )


def _requests(row: RowItem) -> list[Question]:
    asked = prompt_question(_NAME, row.prompt)
    if not row.options:
        return [asked]
    *before, last = asked.messages
    below = {**last, "content": _below(last["content"], row.options)}
    return [asked._replace(messages=(*before, below))]


def _below(content: Any, options: Mapping[str, str]) -> Any:
    if isinstance(content, str):
        return with_options(content, options)
    return [*content, {"type": "text", "text": with_options("", options)}]


def _grade(row: RowItem, answers: Mapping[tuple[str, int], Answer]) -> list[Grading]:
    made = []
    for (name, sample), answer in answers.items():
        if row.options:
            made.append(choice_grading((name, sample), answer, row.options))
            continue
        exact = normalised(answer.text) in map(normalised, row.references)
        made.append(Grading("exact_match", name, sample, Grade(exact)))
        last = row.prompt.text
        asked = last if isinstance(last, str) else last[-1].text
        subject = Subject(asked, answer.text, references=row.references)
        made.append(Grading("graded", name, sample, grade_request(subject)))
    return made


def _metrics(graded: Sequence[Graded]) -> dict[str, Any]:
    return {**_figures(graded), **shares.of_topics(graded, _figures)}


def _figures(graded: Sequence[Graded]) -> dict[str, Any]:
    choices = [g for g in graded if ("choice", 0) in g.grades]
    free = [g for g in graded if ("choice", 0) not in g.grades]
    found: dict[str, Any] = {}
    if choices:
        found |= choice_figures(choices, [g.item.references[0] for g in choices])
    if free:
        exact = [g.grades.get(("exact_match", 0), Grade(None)) for g in free]
        known = [grade.value for grade in exact if grade.status == "ok"]
        found["exact_match"] = statistics.share(sum(known), len(known))
        rows = [grading.weights_of(g.grades.get(("graded", 0))) for g in free]
        found["graded"] = grading.three_way(rows)
    return found
