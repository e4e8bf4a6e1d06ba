"""AlpacaEval 2: how often a judge prefers a model's answer to GPT-4 Turbo's.

Dubois et al. 2024, https://arxiv.org/abs/2404.04475; tatsu-lab/alpaca_eval. The judge
names the better answer with one letter, and the letter's probability is the weight of
the win; an endpoint without log-probabilities gives plain wins (``kind`` says which).
The figure that the board ranks by is controlled for length, see
:mod:`..length_control`.

Our judge is asked in both orders, and what the order does is printed. The original asks
in one, drawn by the instruction: ``upstream`` is what our judge said in that one.
Failures are counted and bounded, where the original drops them from the win rate
without a word. The board's ``lc_standard_error`` is the spread of predictions over
instructions: it stands as ``spread_of_predictions``, beside a standard error.

Files: the baseline's answers from ``alpaca_eval_gpt4_baseline.json``, from anybody's
``annotations.json``, or from ``model_outputs.json`` or ``alpaca_eval.json``; for the
length-controlled figure ``lc_features.csv`` or ``instruction_difficulty.csv``.
``official`` there says that it is the board's fit: on the board's 805 instructions and
baseline, within 0.1 points at the C that cross-validation chose. It is the board's
figure only with the board's judge and wording.
"""

import functools
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxalign.errors import UserError
from jaxalign.evaluation import statistics
from jaxalign.evaluation.boards import length_control
from jaxalign.evaluation.boards.alpaca_files import (
    ORDERS,
    TEMPLATE,
    Instruction,
    load,
    read_grades,
    shown_first,
)
from jaxalign.evaluation.boards.authors_wording import check_one_sample, filled, worded
from jaxalign.evaluation.boards.verdicts import preference
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
from jaxalign.judging import wording
from jaxalign.judging.graders import closed
from jaxalign.judging.judge import JudgeRequest, Subject


__all__ = ["TASK"]

_TURN = re.compile(r"<\|im_start\|>(\w+)\n(.*?)\n?<\|im_end\|>", re.DOTALL)
_DRAWN = {"temperature": 0.0, "max_tokens": 4, "top_logprobs": 5}
_OURS, _AUTHORS = ("A", "B"), ("m", "M")

# --- asked and graded --------------------------------------------------------------


def requests(item: Instruction) -> list[Question]:
    """Return the instruction, as it is."""
    return [Question("answer", ({"role": "user", "content": item.instruction},))]


def grade(
    item: Instruction,
    answers: Mapping[tuple[str, int], Answer],
    *,
    own: Path | None = None,
) -> list[Grading]:
    """Return the two questions to the judge: the model's answer first, and second."""
    gradings = []
    for (question, sample), answer in answers.items():
        for order in ORDERS:
            sides = [answer.text, item.baseline]
            names = list(_OURS if item.template is None else _AUTHORS)
            if order == "baseline_first":
                sides.reverse()
            asked = _request(item, answer.text, sides, names, own)
            mine = names[order == "baseline_first"]
            read = functools.partial(_read, mine=mine, names=tuple(names))
            gradings.append(Grading(order, question, sample, asked, read))
    return gradings


def _request(
    item: Instruction,
    answer: str,
    sides: Sequence[str],
    names: Sequence[str],
    own: Path | None,
) -> JudgeRequest:
    if item.template is None:
        shown = {"instruction": item.instruction, "A": sides[0], "B": sides[1]}
        values = {"material": json.dumps(shown, ensure_ascii=False, indent=1)}
        messages = wording.messages("alpaca_eval", values, own)
    else:
        fields = {"instruction": item.instruction}
        fields |= {"output_1": sides[0], "output_2": sides[1]}
        turns = _TURN.findall(item.template)
        messages = tuple(
            {"role": role, "content": filled(text, fields, TEMPLATE)}
            for role, text in turns
            if role in ("system", "user")
        )
        if not messages:
            raise UserError(
                f"{TEMPLATE} has no <|im_start|>system or user part, as published"
            )
    # Judges that compute take the one letter of the schema, endpoints write it.
    schema = closed(grade={"type": "string", "enum": list(names)})
    subject = Subject(item.instruction, answer, other=item.baseline)
    return JudgeRequest("prose", messages, schema, subject, options=_DRAWN)


def _read(value: Mapping[str, Any], mine: str, names: Sequence[str]) -> Grade:
    """Return how sure the judge is of the model's answer; a plain win is a name."""
    (other,) = (name for name in names if name != mine)
    if "text" not in value:
        said = value["grade"]
    elif value.get("top_logprobs"):
        weight = preference(value["top_logprobs"], mine, other)
        return Grade(None, "unparsed") if weight is None else Grade(weight)
    else:
        said = value["text"].strip(" \t\n\"'*`.")[:1]
    if said not in names:
        return Grade(None, "unparsed")
    return Grade("model" if said == mine else "baseline")


# --- figures -----------------------------------------------------------------------

_PLAIN = {"model": 1.0, "baseline": 0.0}


def metrics(graded: Sequence[Graded]) -> dict[str, Any]:
    """Return win rates, wins, losses and draws, and what the order does."""
    weights = [_weight(each) for each in graded]
    known = [weight for weight in weights if weight is not None]
    grades = [grade for each in graded for grade in each.grades.values()]
    rates = length_control.win_rate(known)
    lost, bounds = len(weights) - len(known), None
    if lost:
        low = sum(known) / len(weights)
        bounds = [low, low + lost / len(weights)]
    found: dict[str, Any] = {
        "win_rate": leaf(rates.win_rate, bounds),
        "kind": _kind(grades),
        "length_controlled_win_rate": _controlled(graded, weights),
        "discrete_win_rate": rates.discrete_win_rate,
        "wins": rates.wins,
        "losses": rates.losses,
        "draws": rates.draws,
        "undecided": lost,
        **failures(grades),
    }
    found["by_order"] = _by_order(graded)
    if lengths := [len(text) for each in graded if (text := _text(each)) is not None]:
        found["mean_length"] = sum(lengths) / len(lengths)
    if upstream := _upstream(graded):
        found["upstream"] = {"win_rate": sum(upstream) / len(upstream)}
    return found


def _value(grade: Grade | None) -> float | None:
    if grade is None or grade.status != "ok":
        return None
    value = grade.value
    return _PLAIN[value] if isinstance(value, str) else float(value)


def _weight(each: Graded) -> float | None:
    """Return the mean over the orders, None where one of them failed."""
    values = [_value(grade) for grade in each.grades.values()]
    found = [value for value in values if value is not None]
    return (
        math.fsum(found) / len(found) if len(found) == len(values) and found else None
    )


def _kind(grades: Sequence[Grade]) -> str:
    plain = {grade.value in _PLAIN for grade in grades if grade.status == "ok"}
    if len(plain) > 1:
        return "weighted and plain: the judge gave log-probabilities to some requests"
    return (
        "plain: the judge gives no log-probabilities" if True in plain else "weighted"
    )


def _text(each: Graded) -> str | None:
    answer = each.answers.get(("answer", 0))
    return None if answer is None or answer.status == "failed" else answer.text


def _controlled(
    graded: Sequence[Graded], weights: Sequence[float | None]
) -> dict[str, Any]:
    rows = [
        (each.item, text, weight)
        for each, weight in zip(graded, weights, strict=True)
        if (text := _text(each)) is not None
    ]
    known = sum(weight is not None for *_, weight in rows)
    if known < 5:  # as many as the folds of the cross-validation
        reason = f"it needs 5 answers with a verdict: there are {known}"
        return leaf(Figure(None, None, None, 0), official=False, reason=reason)
    items = [item for item, *_ in rows]
    hard = [item.difficulty for item in items]
    difficulty = None if None in hard else np.array(hard, np.float64)
    terms = length_control.length_term(
        [len(item.baseline) for item in items], [len(text) for _, text, _ in rows]
    )
    found = length_control.control(
        [weight for *_, weight in rows],
        terms,
        difficulty=difficulty,
        gamed=None if difficulty is None else items[0].gamed,
    )
    whole = len(rows) == 805 and all(item.official for item in items)
    official = whole and found.variant == "full"
    note = {} if official else {"note": "not the official length-controlled figure"}
    return leaf(
        found.win_rate,
        official=official,
        **note,
        variant=found.variant,
        C=found.cost,
        C_chosen_by="5-fold cross-validation",
        **{
            f"{name}_coefficient": c for name, c in found.coefficients._asdict().items()
        },
        spread_of_predictions=found.spread,
    )


def _by_order(graded: Sequence[Graded]) -> dict[str, Any]:
    """Return the win rate with the model's answer first, second, and the difference."""
    found = {
        order: [_value(each.grades.get((order, 0))) for each in graded]
        for order in ORDERS
    }
    first, second = (
        statistics.mean([value for value in found[order] if value is not None])
        for order in ORDERS
    )
    pairs = [
        a - b
        for a, b in zip(*found.values(), strict=True)
        if a is not None and b is not None
    ]
    effect = statistics.mean(pairs) if pairs else _apart(first, second)
    return {"model_first": first, "baseline_first": second, "difference": effect}


def _apart(first: Figure, second: Figure) -> Figure:
    """Return the difference of means over different items."""
    n = first.n + second.n
    if first.value is None or second.value is None:
        return Figure(None, None, None, n)
    value = first.value - second.value
    if first.standard_error is None or second.standard_error is None:
        return Figure(value, None, None, n)
    error = math.hypot(first.standard_error, second.standard_error)
    half = statistics.Z * error
    return Figure(value, error, (value - half, value + half), n)


def _upstream(graded: Sequence[Graded]) -> list[float]:
    """Return what was said in the order that the original would have asked in."""
    found = []
    for each in graded:
        order = ORDERS[0 if shown_first(each.item.instruction) else 1]
        value = _value(each.grades.get((order, 0), each.grades.get(("preference", 0))))
        if value is not None:
            found.append(value)
    return found


def variants(task: Task, options: TaskOptions) -> list[Task]:
    """Return the task in the wording that is asked for."""
    check_one_sample("alpaca_eval compares one answer an instruction", options)
    return [worded(task, options, published=_PUBLISHED)]


_PUBLISHED = {
    "claude-2.1": {"win_rate": 0.1573, "length_controlled_win_rate": 0.2525},
    "gemma-7b-it": {"win_rate": 0.0694, "length_controlled_win_rate": 0.1043},
    "vicuna-7b-v1.5": {"win_rate": 0.0480, "length_controlled_win_rate": 0.0762},
    "NullModel, the same text to everything": {
        "win_rate": 0.7692,
        "length_controlled_win_rate": 0.8646,
    },
}
"""Of the board of 2025-08, as shares."""


TASK = Task(
    name="alpaca_eval",
    load=load,
    requests=requests,
    grade=grade,
    metrics=metrics,
    sampling={"temperature": 0.0, "max_new_tokens": 2048},
    variants=variants,
    read_grades=read_grades,
    facts={
        "source": "https://arxiv.org/abs/2404.04475, "
        "https://github.com/tatsu-lab/alpaca_eval",
        "wording": "ours",
        "comparable": "The board's judge is gpt-4-1106-preview in the authors' words; "
        "figures of another judge or wording stand beside no published board.",
        "upstream": "The original asks the judge in one of the two orders.",
    },
)
