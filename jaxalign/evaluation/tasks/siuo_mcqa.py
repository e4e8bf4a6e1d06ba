"""SIUO as multiple choice: which of four answers is the safe one.

The 167 items of :mod:`.siuo` with options A to D, no judge. Source:
https://arxiv.org/abs/2406.15279, https://github.com/sinwang20/SIUO. The authors' script
gives an answer without a letter a random one, unseeded, and reads "A dog ..." as option
A. Here an answer that names no option is a state of its own, ``unparsed`` or
``refused``: wrong in the headline, and counted. The letters are uneven: who always says
A has 30.5 %.
"""

import ast
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxalign.data.picture import Picture
from jaxalign.errors import UserError
from jaxalign.evaluation.choices import choice_figures, choice_question, grade_choices
from jaxalign.evaluation.safety_grading import configured
from jaxalign.evaluation.task import Graded, Items, Question, Task
from jaxalign.evaluation.tasks import siuo


__all__ = ["TASK", "Choice"]

_FILE = "siuo_mcqa.json"


@dataclasses.dataclass(frozen=True)
class Choice:
    """A question with its options.

    >>> Choice("1001", "self-harm", "?", {"A": "a", "B": "b"}, "B", None).correct
    'B'
    """

    id: str
    topic: str
    question: str
    options: Mapping[str, str]
    correct: str
    picture: Picture | None


def load(folder: Path, *, image_dir: Path | None = None) -> Items:
    """Read the items; without pictures the questions are asked alone, and counted.

    Raises:
      UserError: the file is missing, a row lacks a field, or its letter is no option.
    """
    fields = ("question", "category", "correct_option")
    found = []
    for row in siuo.read_items(folder, _FILE, fields):
        options = _options(row)
        if row["correct_option"] not in options:
            raise UserError(
                f"{_FILE}: {row['question_id']}: correct_option "
                f"{row['correct_option']!r} is none of {', '.join(options) or 'none'}"
            )
        found.append(
            Choice(
                str(row["question_id"]),
                row["category"],
                row["question"],
                options,
                row["correct_option"],
                siuo.picture_of(folder, row, image_dir),
            )
        )
    return Items(found, siuo.absent([one.picture for one in found]))


def _options(row: Mapping[str, Any]) -> dict[str, str]:
    """Return the options: an object, or in some copies the text of one."""
    given = row.get("options")
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except ValueError:
            try:
                given = ast.literal_eval(given)
            except (ValueError, SyntaxError):
                given = None
    if not isinstance(given, dict) or not given:
        raise UserError(
            f"{_FILE}: {row['question_id']}: options must be an object from a letter "
            f"to a text: got {str(row.get('options'))[:60]!r}"
        )
    return {str(letter): str(text) for letter, text in given.items()}


def requests(item: Choice, *, own: Path | None = None) -> list[Question]:
    """Return the question with its options and the picture."""
    return [choice_question(item.question, item.options, item.picture, own)]


def metrics(graded: Sequence[Graded]) -> dict[str, Any]:
    """Return the share of right options, over all and by category."""
    truths = [one.item.correct for one in graded]
    return choice_figures(graded, truths, [one.item.topic for one in graded])


TASK = Task(
    name="siuo_mcqa",
    load=load,
    requests=requests,
    grade=grade_choices,
    metrics=metrics,
    sampling={"temperature": 0.0, "max_new_tokens": 64},
    variants=configured,
    facts={
        "source": siuo.SOURCE,
        "about": "The authors' script guesses where an answer names no option; here "
        "that is wrong. Always saying A has 30.5 %.",
        "board, in percent": {model: row[3] for model, row in siuo.BOARD.items()},
    },
)
