"""MT-Bench: 80 conversations of two turns, each answer rated from 1 to 10 by a judge.

Zheng et al. 2023, https://arxiv.org/abs/2306.05685; lm-sys/FastChat, ``llm_judge``. The
second question is asked after the model's own first answer. Maths, reasoning and coding
are rated with GPT-4's reference answers. Where another model's answers lie in the data
directory (``gpt-3.5-turbo.jsonl``, FastChat's own baseline, or ``baseline.jsonl``, in
the form of its ``model_answer``), both are compared as well, in both orders.

``score`` is the mean over the ratings of all turns, not over conversations: they differ
where a judgement failed. Its standard error takes the two turns of a question together.
Ours are judge templates of our own, whose figures stand beside no published board; with
``--wording official`` they are the authors', from ``judge_prompts.jsonl``.

FastChat's own figure stands under ``upstream``: a rating outside 1 to 10 counts there.
It also averages over two judgements of one answer in a file, which is refused here.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxalign.errors import UserError
from jaxalign.evaluation import published, run_files, statistics
from jaxalign.evaluation.boards import fastchat
from jaxalign.evaluation.boards.authors_wording import JudgePrompt, filled, worded
from jaxalign.evaluation.boards.verdicts import rating, winner
from jaxalign.evaluation.outcomes import failures, leaf
from jaxalign.evaluation.task import (
    Answer,
    Grade,
    Graded,
    Grading,
    Items,
    Question,
    Task,
    TaskOptions,
)
from jaxalign.judging.graders import label_request, prose_request
from jaxalign.judging.judge import JudgeRequest, Subject


__all__ = ["TASK", "Dialogue"]

_TURNS = ("turn_1", "turn_2")
_FOLDERS = ("mt_bench", "mt_bench/reference_answer", "mt_bench/model_answer")
_SOURCE = "lm-sys/FastChat, fastchat/llm_judge/data/mt_bench"
_WITH_REFERENCE = frozenset({"math", "reasoning", "coding"})
_TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1}
_DRAWN = {"temperature": 0.0, "max_tokens": 2048}
_RATINGS = tuple(str(n) for n in range(1, 11))


class Dialogue(NamedTuple):
    """An item: a conversation's two questions, and what they are judged with."""

    question_id: int
    category: str
    turns: tuple[str, str]
    references: tuple[str, str] | None = None
    baseline: tuple[str, str] | None = None
    """Another model's answers, to compare with."""
    wording: Mapping[str, JudgePrompt] | None = None
    """The authors' templates by name, the same of all items; None for ours."""


def load(folder: Path, *, official: bool = False) -> Items:
    """Return the conversations.

    Args:
      folder: the data directory.
      official: with the authors' judge templates.
    Raises:
      UserError: a file is missing, or is not as published.
    """
    path = published.find_file(folder, "question.jsonl", _FOLDERS[:1], source=_SOURCE)
    references = _answers(folder, "gpt-4.jsonl")
    baseline = _answers(folder, "gpt-3.5-turbo.jsonl", "baseline.jsonl")
    wording = None
    if official:
        name = "judge_prompts.jsonl"
        prompts = published.find_file(folder, name, _FOLDERS[:1], source=_SOURCE)
        wording = fastchat.read_judge_prompts(prompts)
    rows, lacking = [], 0
    for row in published.read_jsonl(path):
        match row:
            case {
                "question_id": int(number),
                "category": str(category),
                "turns": [str(first), str(second)],
            }:
                needed = category in _WITH_REFERENCE
                reference = references.get(number) if needed else None
                lacking += needed and reference is None
                given = (reference, baseline.get(number), wording)
                rows.append(Dialogue(number, category, (first, second), *given))
            case _:
                raise UserError(
                    f"{path}: question {row.get('question_id')} must have a number as "
                    "question_id, a category and two turns, as FastChat publishes it"
                )
    if lacking and official:
        raise UserError(
            f"--wording official needs the reference answers of {lacking} questions: "
            f"gpt-4.jsonl lacks them. It comes from {_SOURCE}/reference_answer"
        )
    return Items(rows, {"without reference answer": lacking} if lacking else {})


def _answers(folder: Path, *names: str) -> dict[int, tuple[str, str]]:
    """Return the answers of the first file that is there, by question."""
    for name in names:
        if (path := published.find(folder, name, _FOLDERS)) is not None:
            return fastchat.read_answers(path)
    return {}


def requests(item: Dialogue) -> list[Question]:
    """Return the two questions; the second follows the first and its answer."""
    sampling = {
        "temperature": _TEMPERATURES.get(item.category, 0.0),
        "max_new_tokens": 1024,
    }
    messages = [({"role": "user", "content": text},) for text in item.turns]
    return [
        Question("turn_1", messages[0], sampling=sampling),
        Question("turn_2", messages[1], sampling=sampling, follows="turn_1"),
    ]


def grade(
    item: Dialogue,
    answers: Mapping[tuple[str, int], Answer],
    *,
    own: Path | None = None,
) -> list[Grading]:
    """Return what the judge is asked of each answer: a rating, and both comparisons."""
    gradings = []
    for sample in sorted({sample for _, sample in answers}):
        said = tuple(
            answers[turn, sample].text if (turn, sample) in answers else ""
            for turn in _TURNS
        )
        for number, turn in enumerate(_TURNS, 1):
            if (turn, sample) not in answers:
                continue
            asked = _rating_request(item, said[:number], own)
            gradings.append(Grading(turn, turn, sample, asked, _read_rating))
            if item.baseline is None:
                continue
            sides = said[:number], item.baseline[:number]
            for order, (a, b) in (("first", sides), ("second", sides[::-1])):
                asked = _pair_request(item, a, b, own)
                name = f"{turn}_{order}"
                gradings.append(Grading(name, turn, sample, asked, _read_winner))
    return gradings


def _rating_request(
    item: Dialogue, said: tuple[str, ...], own: Path | None
) -> JudgeRequest:
    turns = len(said)
    references = (item.references or ())[:turns]
    asked = item.turns[:turns]
    subject = Subject(_conversation(asked, said), said[-1], references=references[-1:])
    if item.wording is not None:
        name = "single-math-v1" if references else "single-v1"
        values = _numbered("question", asked) | _numbered("answer", said)
        return _official(item, name, turns, values, references, subject)
    material: dict[str, Any] = {
        "turns": [
            {"question": question, "answer": answer}
            for question, answer in zip(asked, said, strict=True)
        ]
    }
    if references:
        material["reference"] = references
    return label_request("mt_bench", material, _RATINGS, subject, own)


def _pair_request(
    item: Dialogue, a: tuple[str, ...], b: tuple[str, ...], own: Path | None
) -> JudgeRequest:
    turns = len(a)
    references = (item.references or ())[:turns]
    asked = item.turns[:turns]
    subject = Subject(
        _conversation(asked, a), a[-1], other=b[-1], references=references[-1:]
    )
    if item.wording is not None:
        name = "pair-math-v1" if references else "pair-v2"
        values = _numbered("question", asked)
        values |= _numbered("answer_a", a) | _numbered("answer_b", b)
        return _official(item, name, turns, values, references, subject)
    material: dict[str, Any] = {"questions": asked, "A": a, "B": b}
    if references:
        material["reference"] = references
    labels = ("A", "B", "tie")
    return label_request("mt_bench_pair", material, labels, subject, own)


def _conversation(
    asked: Sequence[str], said: Sequence[str]
) -> tuple[Mapping[str, str], ...]:
    """Return the turns up to the last question."""
    found = [{"role": "user", "content": asked[0]}]
    for question, answer in zip(asked[1:], said, strict=False):
        found.append({"role": "assistant", "content": answer})
        found.append({"role": "user", "content": question})
    return tuple(found)


def _numbered(name: str, texts: Sequence[str]) -> dict[str, str]:
    """Return the fields as the authors name them: bare for one turn, else counted."""
    return {name: texts[0]} | {f"{name}_{n}": text for n, text in enumerate(texts, 1)}


def _official(
    item: Dialogue,
    name: str,
    turns: int,
    values: Mapping[str, str],
    references: Sequence[str],
    subject: Subject,
) -> JudgeRequest:
    assert item.wording is not None
    name += "-multi-turn" if turns > 1 else ""
    if name not in item.wording:
        raise UserError(
            f"judge_prompts.jsonl has no template {name}: it has "
            f"{', '.join(sorted(item.wording))}"
        )
    template = item.wording[name]
    values = {**values, **_numbered("ref_answer", references)} if references else values
    messages = (
        {"role": "system", "content": template.system},
        {"role": "user", "content": filled(template.user, values, name)},
    )
    return prose_request(messages, subject, options=_DRAWN)


def _read_rating(value: Mapping[str, Any]) -> Grade:
    found = rating(value["text"]) if "text" in value else float(value["grade"])
    return Grade(None, "unparsed") if found is None else Grade(found)


def _read_winner(value: Mapping[str, Any]) -> Grade:
    found = winner(value["text"]) if "text" in value else value["grade"]
    return Grade(None, "unparsed") if found is None else Grade(found)


class _Rated(NamedTuple):
    question_id: int
    category: str
    turn: str
    grade: Grade


def metrics(graded: Sequence[Graded]) -> dict[str, Any]:
    """Return the mean ratings, over all and by turn and category, and comparisons."""
    rated = [
        _Rated(each.item.question_id, each.item.category, name, found)
        for each in graded
        for (name, _), found in each.grades.items()
        if name in _TURNS
    ]
    values = _values(rated)
    lost, bounds = len(rated) - len(values), None
    if lost:
        bounds = [(sum(values) + lost * end) / len(rated) for end in (1.0, 10.0)]
    found: dict[str, Any] = {
        "score": leaf(_mean(rated), bounds),
        **{turn: _mean([r for r in rated if r.turn == turn]) for turn in _TURNS},
        **failures(row.grade for row in rated),
    }
    found["topics"] = {
        category: {"score": _mean([row for row in rated if row.category == category])}
        for category in sorted({row.category for row in rated})
    }
    if compared := _compared(graded):
        found["pairwise"] = compared
    if everything := [*values, *_unbounded(rated)]:
        found["upstream"] = {"score": sum(everything) / len(everything)}
    return found


def _values(rated: Iterable[_Rated]) -> list[float]:
    return [float(row.grade.value) for row in rated if row.grade.status == "ok"]


def _unbounded(rated: Iterable[_Rated]) -> list[float]:
    """Return the ratings outside 1 to 10, which FastChat takes."""
    found = [
        rating(row.grade.raw, bounded=False)
        for row in rated
        if row.grade.status == "unparsed" and row.grade.raw is not None
    ]
    return [value for value in found if value is not None]


def _mean(rated: Sequence[_Rated]) -> statistics.Figure:
    questions = [row.question_id for row in rated if row.grade.status == "ok"]
    return statistics.clustered(_values(rated), questions)


def _compared(graded: Sequence[Graded]) -> dict[str, Any]:
    """Return wins, losses and ties: a win is one in both orders, else it is a tie."""
    outcomes: dict[str, list[tuple[int, str]]] = {turn: [] for turn in _TURNS}
    judged, agreed = [], 0
    for each in graded:
        for turn in _TURNS:
            names = (f"{turn}_first", f"{turn}_second")
            for sample in sorted({n for name, n in each.grades if name == names[0]}):
                first, second = (each.grades[name, sample] for name in names)
                judged += (first, second)
                if first.status == second.status == "ok":
                    both = first.value, fastchat.SWAPPED[second.value]
                    agreed += both[0] == both[1]
                    won = both[0] if both[0] == both[1] else "tie"
                    outcomes[turn].append((each.item.question_id, won))
    if not judged:
        return {}
    every = [row for turn in _TURNS for row in outcomes[turn]]
    found = _rates(every) | {turn: _rates(outcomes[turn]) for turn in _TURNS}
    share = statistics.share(agreed, len(every))
    return found | {"orders_agree": share} | failures(judged)


def _rates(outcomes: Sequence[tuple[int, str]]) -> dict[str, Any]:
    questions = [question for question, _ in outcomes]
    won = [float(outcome == "A") for _, outcome in outcomes]
    half = [_POINTS[outcome] for _, outcome in outcomes]
    return {
        "win_rate": statistics.clustered(won, questions),
        "adjusted_win_rate": statistics.clustered(half, questions),
        **{name: sum(o == sign for _, o in outcomes) for sign, name in _NAMES},
    }


_POINTS = {"A": 1.0, "tie": 0.5, "B": 0.0}
_NAMES = (("A", "wins"), ("B", "losses"), ("tie", "ties"))


def read_grades(path: Path, items: Items) -> list[Graded]:
    """Return grades from FastChat's judgements, or from a ``grades.jsonl``.

    Raises:
      UserError: the file holds several models, two judgements of an answer, or
        questions that are not the items'.
    """
    if any("index" in row for row in published.read_jsonl(path)[:1]):
        return run_files.read_grades(path, items)
    grades = fastchat.read_judgements(path)
    numbers = {item.question_id for item in items.rows}
    if strange := sorted(grades.keys() - numbers):
        raise UserError(
            f"{path} judges {len(strange)} questions that are not in question.jsonl, "
            f"such as {strange[0]}"
        )
    return [
        Graded(index, item, {}, grades[item.question_id])
        for index, item in enumerate(items.rows)
        if item.question_id in grades
    ]


def variants(task: Task, options: TaskOptions) -> list[Task]:
    """Return the task in the wording that is asked for."""
    samples = options.num_samples or task.num_samples
    return [dataclasses.replace(worded(task, options), num_samples=samples)]


TASK = Task(
    name="mt_bench",
    load=load,
    requests=requests,
    grade=grade,
    metrics=metrics,
    variants=variants,
    read_grades=read_grades,
    facts={
        "source": "https://arxiv.org/abs/2306.05685, https://github.com/lm-sys/FastChat",
        "wording": "ours",
        "scale": "mean rating, 1 to 10",
        "comparable": "Published scores are of GPT-4 as the judge and of the authors' "
        "templates (--wording official); ours stand beside none of them.",
        "upstream": "FastChat also takes ratings outside 1 to 10, and drops failures "
        "silently.",
    },
)
