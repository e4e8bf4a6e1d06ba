"""Files of FastChat's ``llm_judge``: answers, judge templates and judgements."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxalign.errors import UserError
from jaxalign.evaluation import published
from jaxalign.evaluation.boards.authors_wording import JudgePrompt
from jaxalign.evaluation.boards.verdicts import rating
from jaxalign.evaluation.task import Grade


__all__ = [
    "SWAPPED",
    "read_answers",
    "read_judge_prompts",
    "read_judgements",
]

SWAPPED = {"A": "B", "B": "A", "tie": "tie"}
"""What a verdict means with the two sides' places changed."""

_Grades = dict[tuple[str, int], Grade]


def read_answers(path: Path) -> dict[int, tuple[str, str]]:
    """Return the two answers to each question, of a file of ``model_answer``.

    Raises:
      UserError: a line is not as FastChat writes it.
    Example::

      read_answers(Path("data/mt_bench/gpt-4.jsonl"))[101]
    """
    found = {}
    for row in published.read_jsonl(path):
        match row:
            case {
                "question_id": int(number),
                "choices": [{"turns": [str(first), str(second)]}, *_],
            }:
                found[number] = (first, second)
            case _:
                raise UserError(
                    f"{path}: an answer must have question_id and "
                    f'"choices": [{{"turns": [first, second]}}]: got {sorted(row)}'
                )
    return found


def read_judge_prompts(path: Path) -> dict[str, JudgePrompt]:
    """Return the templates of ``judge_prompts.jsonl`` by name.

    Raises:
      UserError: a line is not as FastChat publishes it.
    Example::

      read_judge_prompts(Path("data/mt_bench/judge_prompts.jsonl"))["single-v1"].system
    """
    found = {}
    for row in published.read_jsonl(path):
        match row:
            case {
                "name": str(called),
                "system_prompt": str(system),
                "prompt_template": str(user),
            }:
                found[called] = JudgePrompt(system, user)
            case _:
                raise UserError(
                    f"{path}: a template must have name, system_prompt and "
                    f"prompt_template: got {sorted(row)}"
                )
    return found


def read_judgements(path: Path) -> dict[int, _Grades]:
    """Return the grades of a model by question: ratings, comparisons, or both.

    A rating is named ``turn_1`` or ``turn_2``, a comparison ``turn_1_first`` where the
    model is shown as A and ``turn_1_second`` where it is B. Ratings are read from the
    judgement's text where it is there; a failed call (``$ERROR$``) is no rating.

    Raises:
      UserError: a line is not as FastChat writes it, the file holds several models, or
        two judgements of one answer.
    Example::

      read_judgements(Path("gpt-4_single.jsonl"))[101]["turn_1", 0].value
    """
    grades: dict[int, _Grades] = {}
    models = set()
    for row in published.read_jsonl(path):
        read = _comparison if "g1_winner" in row else _rating
        model, found = read(path, row)
        models.add(model)
        if len(models) > 1:
            raise UserError(
                f"{path} holds judgements of several models, keep the lines of one: "
                f"{', '.join(sorted(models))}"
            )
        mine = grades.setdefault(row["question_id"], {})
        if twice := mine.keys() & found:
            raise UserError(
                f"{path} holds two judgements of question {row['question_id']}, "
                f"{min(twice)[0]}: keep the lines of one run"
            )
        mine.update(found)
    return grades


def _rating(path: Path, row: Mapping[str, Any]) -> tuple[str, _Grades]:
    match row:
        case {"question_id": int(), "model": str(model), "turn": 1 | 2 as turn}:
            text = row.get("judgment")
            given = rating(f"[[{row.get('score')}]]" if text is None else text)
            if given is not None:
                grade = Grade(given, raw=text)
            else:
                failed = text == "$ERROR$"  # what is written where the call failed
                grade = Grade(None, "judge_failed" if failed else "unparsed", text)
            return model, {(f"turn_{turn}", 0): grade}
    raise UserError(
        f"{path}: a judgement must have question_id, model and turn, and judgment or "
        f"score: got {sorted(row)}"
    )


def _comparison(path: Path, row: Mapping[str, Any]) -> tuple[str, _Grades]:
    match row:
        case {
            "question_id": int(),
            "model_1": str(model),
            "g1_winner": str(first),
            "g2_winner": str(second),
            "turn": 1 | 2 as turn,
        }:
            # The first game shows model_1 as A, the second as B.
            sides = {"model_1": "A", "model_2": "B", "tie": "tie"}
            found = {
                "first": (sides.get(first), row.get("g1_judgment")),
                "second": (SWAPPED.get(sides.get(second, "")), row.get("g2_judgment")),
            }
            return model, {
                (f"turn_{turn}_{order}", 0): Grade(
                    value, "ok" if value else "unparsed", text
                )
                for order, (value, text) in found.items()
            }
    raise UserError(
        f"{path}: a comparison must have question_id, model_1, g1_winner, g2_winner "
        f"and turn: got {sorted(row)}"
    )
