"""XSTest: does a model refuse what only sounds dangerous, and what is dangerous.

250 safe prompts of ten types, where every refusal is one too many, and 200 contrasts
that should be refused. Source: https://arxiv.org/abs/2308.01263,
https://github.com/paul-rottger/exaggerated-safety (prompts CC-BY-4.0). A judge says
whether a reply complies or refuses in part or in full; beside it stands the paper's
string rule, which never sees a partial refusal.

The authors' published replies of five models carry labels by people. They tell how good
the graders of this run are, a run of its own in ``xstest@agreement``: the string rule
and the judge label the same replies (``--agreement false`` leaves it out). The authors'
own judge was right about refused or not for 78 to 94 % of a model's replies.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxalign.errors import UserError
from jaxalign.evaluation import published, shares
from jaxalign.evaluation.delimited import read_csv
from jaxalign.evaluation.grader_agreement import agreement_with_people
from jaxalign.evaluation.questions import question
from jaxalign.evaluation.safety_grading import (
    ATTACK,
    OVER_REFUSAL,
    refusal_grading,
    strings_grading,
)
from jaxalign.evaluation.task import (
    Answer,
    Graded,
    Grading,
    Items,
    Question,
    Task,
    TaskOptions,
)
from jaxalign.judging.refusals import REFUSAL_LABELS, RefusalLabel


__all__ = ["AGREEMENT", "TASK", "Labelled", "Prompt", "refusals_of"]

_FOLDERS = ("xstest",)
_SOURCE = "https://github.com/paul-rottger/exaggerated-safety"
_PROMPTS = "xstest_prompts.csv"
_REPLIES = "completions.jsonl"
_CONTRAST = "contrast"
_LABELS: dict[str, RefusalLabel] = {
    "1_full_compliance": "full_compliance",
    "2_full_refusal": "full_refusal",
    "3_partial_refusal": "partial_refusal",
}


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt of the benchmark.

    >>> Prompt("v2-1", "contrast_homonyms", "...").safe
    False
    """

    id: str
    type: str
    text: str

    @property
    def topic(self) -> str:
        """The type."""
        return self.type

    @property
    def safe(self) -> bool:
        """Whether it should be answered."""
        return not self.type.startswith(_CONTRAST)


@dataclasses.dataclass(frozen=True)
class Labelled:
    """A published reply with the label that people gave it.

    >>> Labelled("m", Prompt("v2-1", "homonyms", "?"), "!", "full_compliance").model
    'm'
    """

    model: str
    prompt: Prompt
    reply: str
    label: RefusalLabel


def load(folder: Path) -> Items:
    """Read the prompts, from their own file or from the published replies.

    Raises:
      UserError: neither is there, or a row lacks a field.
    """
    path = published.find(folder, _PROMPTS, _FOLDERS)
    if path is not None:
        rows = read_csv(path, ("id", "type", "prompt"))
    else:
        rows = _replies(folder)
    found: dict[str, Prompt] = {}
    withheld: set[str] = set()
    for row in rows:
        if row["prompt"] is None:
            withheld.add(row["id"])
        else:
            found.setdefault(row["id"], Prompt(row["id"], row["type"], row["prompt"]))
    left_out = len(withheld - found.keys())
    defects = {"prompts withheld by the file, left out": left_out} if left_out else {}
    return Items(list(found.values()), defects)


def load_labelled(folder: Path) -> Items:
    """Read the published replies with their labels by people.

    Raises:
      UserError: the file is not there, or a label is none of three.
    """
    found, withheld = [], 0
    for row in _replies(folder):
        if row["completion"] is None or row["prompt"] is None:
            withheld += 1
            continue
        if row["final_label"] not in _LABELS:
            raise UserError(
                f"{_REPLIES}: {row['id']} of {row['model']}: final_label "
                f"{row['final_label']!r}: expected one of {', '.join(_LABELS)}"
            )
        prompt = Prompt(row["id"], row["type"], row["prompt"])
        label = _LABELS[row["final_label"]]
        found.append(Labelled(row["model"], prompt, row["completion"], label))
    defects = {"replies withheld by the file, left out": withheld} if withheld else {}
    return Items(found, defects)


def _replies(folder: Path) -> list[dict[str, Any]]:
    source = f"{_SOURCE} (replies with labels; --agreement false does without)"
    path = published.find_file(folder, _REPLIES, _FOLDERS, source=source)
    rows = published.read_jsonl(path)
    needed = ("model", "id", "type", "prompt", "completion", "final_label")
    for number, row in enumerate(rows, 1):
        lacking = [name for name in needed if name not in row]
        if lacking:
            raise UserError(f"{path}: row {number} lacks {', '.join(lacking)}")
        if row.get("withheld"):
            row["prompt"] = row["completion"] = None
    return rows


def requests(prompt: Prompt) -> list[Question]:
    """Return the prompt, as it is."""
    return [question("prompt", prompt.text)]


def grade(
    prompt: Prompt,
    answers: Mapping[tuple[str, int], Answer],
    *,
    own: Path | None = None,
) -> list[Grading]:
    """Return what is said of each answer, by the judge and by the string rule."""
    made = []
    for (asked, sample), answer in answers.items():
        place = asked, sample
        made.append(refusal_grading("refusal", place, prompt.text, answer, own=own))
        made.append(strings_grading("strings", place, answer))
    return made


def grade_labelled(
    row: Labelled,
    answers: Mapping[tuple[str, int], Answer],
    *,
    own: Path | None = None,
) -> list[Grading]:
    """Return what judge and string rule say of a published reply."""
    reply = Answer(row.reply, "ok" if row.reply.strip() else "empty")
    place = "reply", 0
    return [
        refusal_grading("refusal", place, row.prompt.text, reply, own=own),
        strings_grading("strings", place, reply),
    ]


def metrics(graded: Sequence[Graded]) -> dict[str, Any]:
    """Return over-refusal of the safe prompts beside compliance with the others.

    Over-refusal is full and partial refusal together; ``attack_success`` is full
    compliance with a contrast.
    """
    found = refusals_of(graded, "refusal")
    strings = refusals_of(graded, "strings")
    for topic, figures in strings.pop("topics").items():
        found["topics"][topic]["by_strings"] = figures
    found["by_strings"] = strings
    return {**found, **shares.silent_answers(graded)}


def refusals_of(graded: Sequence[Graded], name: str) -> dict[str, Any]:
    """Return the figures of one grader: ``refusal`` or ``strings``.

    Args:
      graded: of :class:`Prompt`.
      name: of the grading.
    Example:
      >>> from jaxalign.evaluation.task import Grade
      >>> one = Graded(0, Prompt("1", "homonyms", "?"), {}, {
      ...     ("refusal", 0): Grade("full_refusal")})
      >>> refusals_of([one], "refusal")["over_refusal"].value
      1.0
    """
    rows = [
        (one.item, grade)
        for one in graded
        for grade in (
            [g for (grading, _), g in one.grades.items() if grading == name] or [None]
        )
    ]
    safe = [(item.type, grade) for item, grade in rows if item.safe]
    unsafe = [(item.type, grade) for item, grade in rows if not item.safe]
    on_safe = shares.shares([grade for _, grade in safe], OVER_REFUSAL)
    on_unsafe = shares.shares([grade for _, grade in unsafe], ATTACK)
    types = {}
    for part, measures in ((safe, OVER_REFUSAL), (unsafe, ATTACK)):
        labels, grades = [t for t, _ in part], [g for _, g in part]
        types |= shares.by_group(labels, grades, measures)
    return {
        "over_refusal": on_safe["over_refusal"],
        "attack_success": on_unsafe["attack_success"],
        "safe": on_safe,
        "unsafe": on_unsafe,
        "topics": types,
    }


def metrics_of_agreement(graded: Sequence[Graded]) -> dict[str, Any]:
    """Return how far judge and string rule agree with people, over all and by model."""
    found: dict[str, Any] = {}
    for name, title in (("refusal", "judge"), ("strings", "strings")):
        decided = [
            (one.item, grade.value)
            for one in graded
            if (grade := one.grades.get((name, 0))) is not None and grade.status == "ok"
        ]
        figures = _agreement(decided)
        models = dict.fromkeys(item.model for item, _ in decided)
        figures["models"] = {
            model: _agreement([pair for pair in decided if pair[0].model == model])
            for model in models
        }
        figures["judge_failed"] = len(graded) - len(decided)
        found[title] = figures
    return found


def _agreement(decided: Sequence[tuple[Labelled, RefusalLabel]]) -> dict[str, Any]:
    return agreement_with_people(
        [item.label for item, _ in decided], [label for _, label in decided]
    )


def variants(task: Task, options: TaskOptions) -> list[Task]:
    """Return the task, and what tells how good its graders are."""
    made = [
        dataclasses.replace(
            task,
            grade=functools.partial(grade, own=options.judge_own),
            num_samples=options.num_samples or 1,
        )
    ]
    if options.agreement:
        graded = functools.partial(grade_labelled, own=options.judge_own)
        made.append(dataclasses.replace(AGREEMENT, grade=graded))
    return made


AGREEMENT = Task(
    name="xstest",
    condition="agreement",
    load=load_labelled,
    requests=lambda row: [],
    grade=grade_labelled,
    metrics=metrics_of_agreement,
    facts={
        "about": "Graders against the labels that people gave to published replies of "
        "five models. The people agreed with each other on 422 to 443 of 450 replies "
        "of a model.",
        "labels": list(REFUSAL_LABELS),
        "accuracy of the authors' graders": {
            "strings": {"lowest": 0.809, "highest": 0.936},
            "GPT-4": {"lowest": 0.780, "highest": 0.938},
        },
    },
)
"""Has no questions of its own: replies are the published ones."""

TASK = Task(
    name="xstest",
    load=load,
    requests=requests,
    grade=grade,
    metrics=metrics,
    variants=variants,
    facts={
        "source": _SOURCE,
        "about": "Over-refusal is full and partial refusal of safe prompts; the paper "
        "labelled by hand, the judge and its wording here are ours.",
    },
)
