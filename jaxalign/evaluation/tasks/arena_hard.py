"""Arena-Hard: hard requests of real users, compared with one strong model's answers.

Li et al. 2024, https://arxiv.org/abs/2406.11939; lmarena/arena-hard-auto, v0.1 (500
requests) and v2 (500 hard prompts and 250 of creative writing); the question file in
the data directory says which. The judge is asked in both orders for one of five
verdicts; a clear one counts three times. ``score`` is the share of this weight that the
model wins, which is Bradley and Terry's model with one baseline; of v2 it is over the
hard prompts, as the board's. ``style_controlled`` is the share in the baseline's style,
see :mod:`..bradley_terry`.

What differs from the authors' figures, which stand under ``upstream``: a question
counts with both its games or not at all (v0.1 drops a failed game by itself, so that
one order weighs more), and intervals draw questions. Theirs draw the rows that verdicts
are repeated as, which is about half as wide; those of v2 are also of 90 %, around a
mean of 100 samples. Style control is not theirs: for one model by itself their fit,
which centres styles, controls for nothing.

Published scores are of their judges (v0.1: gpt-4-1106-preview; v2: gpt-4.1 and
gemini-2.5) in the authors' wording.
"""

import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from jaxalign.errors import UserError
from jaxalign.evaluation import statistics
from jaxalign.evaluation.boards import bradley_terry
from jaxalign.evaluation.boards.arena_files import (
    BASELINES,
    ORDERS,
    ArenaPrompt,
    load,
    read_grades,
)
from jaxalign.evaluation.boards.authors_wording import check_one_sample, filled, worded
from jaxalign.evaluation.boards.bradley_terry import Battle
from jaxalign.evaluation.boards.style import Style, difference, style_of
from jaxalign.evaluation.boards.verdicts import CLEAR_WEIGHT, arena_verdict, points
from jaxalign.evaluation.outcomes import failures, leaf
from jaxalign.evaluation.statistics import Figure
from jaxalign.evaluation.task import (
    Answer,
    Grade,
    Graded,
    Grading,
    Question,
    Task,
    TaskOptions,
)
from jaxalign.judging.graders import label_request, prose_request
from jaxalign.judging.judge import JudgeRequest, Subject


__all__ = ["TASK"]

_LABELS = ("A>>B", "A>B", "A=B", "B>A", "B>>A")
_DRAWN = {"temperature": 0.0, "max_tokens": 4096}
_HARD = "hard_prompt"
_SIDES: Mapping[str, Literal["A", "B"]] = {"baseline_first": "B", "model_first": "A"}
"""Where the model's answer stands."""


def requests(item: ArenaPrompt) -> list[Question]:
    """Return the request, as it is."""
    if item.baseline is None:
        name = BASELINES[item.category]
        raise UserError(
            f"arena_hard compares with the answers of {name}: {name}.jsonl is missing "
            f"in --data_dir, or lacks {item.uid}. It comes from lmarena/arena-hard-auto"
        )
    return [Question("answer", ({"role": "user", "content": item.prompt},))]


def grade(
    item: ArenaPrompt,
    answers: Mapping[tuple[str, int], Answer],
    *,
    own: Path | None = None,
) -> list[Grading]:
    """Return the two games: the baseline's answer first, then the model's."""
    gradings = []
    for (question, sample), answer in answers.items():
        for order in ORDERS:
            sides = [item.baseline or "", answer.text]
            if order == "model_first":
                sides.reverse()
            asked = _request(item, answer.text, sides, own)
            read = functools.partial(_read, version=item.version)
            gradings.append(Grading(order, question, sample, asked, read))
    return gradings


def _request(
    item: ArenaPrompt, answer: str, sides: Sequence[str], own: Path | None
) -> JudgeRequest:
    subject = Subject(item.prompt, answer, other=item.baseline)
    if item.wording is None:
        material = {"prompt": item.prompt, "A": sides[0], "B": sides[1]}
        return label_request("arena_hard", material, _LABELS, subject, own)
    values = {"question_1": item.prompt, "answer_1": sides[0], "answer_2": sides[1]}
    messages = (
        {"role": "system", "content": item.wording.system},
        {
            "role": "user",
            "content": filled(item.wording.user, values, "prompt_template"),
        },
    )
    return prose_request(messages, subject, options=_DRAWN)


def _read(value: Mapping[str, Any], version: Any) -> Grade:
    found = arena_verdict(value["text"], version) if "text" in value else value["grade"]
    return Grade(None, "unparsed") if found is None else Grade(found)


def metrics(graded: Sequence[Graded]) -> dict[str, Any]:
    """Return the score, over all or over v2's hard prompts, and what it rests on."""
    categories = sorted({each.item.category for each in graded})
    hard = [each for each in graded if each.item.category == _HARD]
    found = _figures(hard or graded)
    if len(categories) > 1:
        found["scored_on"] = _HARD if hard else "all categories"
        found["topics"] = {
            category: _figures([e for e in graded if e.item.category == category])
            for category in categories
        }
    return found


def _figures(graded: Sequence[Graded]) -> dict[str, Any]:
    grades = [grade for each in graded for grade in each.grades.values()]
    whole = [each for each in graded if _decided(each)]
    battles = [battle for each in whole for battle in _battles(each)]
    score = bradley_terry.weighted_share(battles)
    weight = sum(battle.weight for battle in battles)
    lost, bounds = len(graded) - len(whole), None
    if lost:
        won = sum(battle.weight * battle.score for battle in battles)
        most = lost * 2 * CLEAR_WEIGHT  # both games clear
        bounds = [won / (weight + most), (won + most) / (weight + most)]
    found: dict[str, Any] = {
        "score": leaf(score, bounds),
        "battles": weight,
        "verdicts": _verdicts(graded),
        "undecided": lost,
        **failures(grades),
    }
    found["by_order"] = _by_order(whole)
    found |= _controlled(battles)
    found["upstream"] = _upstream(graded, battles)
    return found


def _decided(each: Graded) -> bool:
    return all(
        (grade := each.grades.get((order, 0))) is not None and grade.status == "ok"
        for order in ORDERS
    )


def _battles(each: Graded) -> list[Battle]:
    """Return the model's battles with the baseline: one a verdict."""
    style = _style(each)
    found = []
    for order in ORDERS:
        grade = each.grades.get((order, 0))
        if grade is not None and grade.status == "ok":
            score, weight = points(grade.value, _SIDES[order])
            row = Battle(each.index, "model", "baseline", score, float(weight), style)
            found.append(row)
    return found


def _style(each: Graded) -> tuple[float, ...]:
    answer = each.answers.get(("answer", 0))
    if answer is None or each.item.baseline is None:
        return ()
    form = "count" if each.item.version == "v0.1" else "density"
    return difference(style_of(answer.text), style_of(each.item.baseline), form)


def _verdicts(graded: Sequence[Graded]) -> dict[str, int]:
    """Return how often each verdict was given, from the model's side."""
    names = {(1.0, True): "clear_wins", (1.0, False): "wins", (0.5, False): "ties"}
    names |= {(0.0, False): "losses", (0.0, True): "clear_losses"}
    rows = [battle for each in graded for battle in _battles(each)]
    counts = Counter(names[row.score, row.weight > 1] for row in rows)
    return {name: counts[name] for name in names.values()}


def _by_order(whole: Sequence[Graded]) -> dict[str, Any]:
    """Return the mean points of each order, unweighted, and their paired difference."""
    second, first = ([_battles(each)[n].score for each in whole] for n in (0, 1))
    apart = [a - b for a, b in zip(first, second, strict=True)]
    return {
        "model_first": statistics.mean(first),
        "baseline_first": statistics.mean(second),
        "difference": statistics.mean(apart),
    }


def _controlled(battles: Sequence[Battle]) -> dict[str, Any]:
    if not battles or not all(battle.style for battle in battles):
        nothing = Figure(None, None, None, 0)
        return {"style_controlled": leaf(nothing, reason="no answers' texts")}
    figure, coefficients = bradley_terry.controlled_share(battles)
    names = Style._fields
    found = dict(zip(names, coefficients, strict=True)) if coefficients else {}
    return {"style_controlled": figure, "style_coefficients": found}


def _upstream(graded: Sequence[Graded], battles: Sequence[Battle]) -> dict[str, Any]:
    """Return the authors' score: of v0.1 with games whose other game failed."""
    if graded and graded[0].item.version == "v0.1":
        battles = [battle for each in graded for battle in _battles(each)]
    figure = bradley_terry.weighted_share(battles, unit="battle")
    return {"score": figure.value, "interval_over_battles": figure.interval}


def variants(task: Task, options: TaskOptions) -> list[Task]:
    """Return the task in the wording that is asked for."""
    check_one_sample("arena_hard compares one answer a request", options)
    return [worded(task, options, published=_PUBLISHED)]


_PUBLISHED = {
    "gpt-4-0613": {"score": 0.3790, "interval_over_battles": [0.3560, 0.4036]},
    "gpt-3.5-turbo-0125": {"score": 0.2334, "interval_over_battles": [0.2167, 0.2527]},
}
"""Of v0.1's board of 2024-07-31, as shares; its baseline has 0.5."""


TASK = Task(
    name="arena_hard",
    load=load,
    requests=requests,
    grade=grade,
    metrics=metrics,
    sampling={"temperature": 0.0, "max_new_tokens": 4096},
    variants=variants,
    read_grades=read_grades,
    facts={
        "source": "https://arxiv.org/abs/2406.11939, "
        "https://github.com/lmarena/arena-hard-auto",
        "wording": "ours",
        "comparable": "Published scores are of the authors' judges and wording.",
        "upstream": "The authors' intervals draw the rows of verdicts, not questions; "
        "v0.1 keeps a game whose other game failed.",
        "style_controlled": "Not the authors' fit, which centres styles over a board's "
        "models. Lengths are words and signs, not gpt-4o's tokens.",
    },
)
