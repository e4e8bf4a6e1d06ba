"""What a benchmark is: a record of pure functions, and what goes through them.

A task is one file with ``TASK = Task(...)``. The harness (:mod:`.harness`) loads the
items, has the questions answered and the answers graded, keeps both in a store, and
hands everything to ``metrics``. A person's own file is given as ``--tasks FILE.py``.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from jaxalign.data.picture import Picture
from jaxalign.judging.config import ASPECTS
from jaxalign.judging.judge import JudgeRequest


__all__ = [
    "Answer",
    "AnswerStatus",
    "Grade",
    "GradeStatus",
    "Graded",
    "Grading",
    "Items",
    "Question",
    "Task",
    "TaskOptions",
    "drawn",
    "no_questions",
]

_NOTHING: Mapping[str, Any] = MappingProxyType({})

AnswerStatus = Literal["ok", "empty", "refused", "failed"]
"""``empty``: a reply without text; ``refused``: the endpoint's own filter; ``failed``:
no reply. The first three are answers and are graded; a failed one never is."""

GradeStatus = Literal["ok", "unparsed", "judge_failed", "answer_failed"]
"""Anything but ``ok`` is counted by its name and is in no share."""


class Items(NamedTuple):
    """What a task's files hold.

    >>> Items(["a", "b"], {"duplicate ids": 1}).rows
    ['a', 'b']
    """

    rows: Sequence[Any]
    """One item each, of the task's own type, in the order of the file. The page shows
    an item's ``topic`` and ``references`` (texts), where it has such fields or keys."""
    defects: Mapping[str, int] = _NOTHING
    """Of the published files, that the loader handled: what, and how many."""


class Question(NamedTuple):
    """What the model is asked; nothing else of an item can reach it.

    >>> Question("final", ({"role": "user", "content": "2 + 2?"},)).images
    ()
    """

    name: str
    """Of the question within its item."""
    messages: tuple[Mapping[str, Any], ...]
    """``role`` and ``content``: a text, or parts ``{"type": "text", "text": ...}`` and
    ``{"type": "image"}``."""
    images: tuple[Picture, ...] = ()
    """One for each image part, in their order."""
    sampling: Mapping[str, Any] = _NOTHING
    """Fields of :class:`jaxalign.generation.completions.Sampling` where the task has
    its own, such as ``max_new_tokens`` and ``temperature``."""
    follows: str | None = None
    """Another question of the item: its messages and its answer come before."""


class Answer(NamedTuple):
    """What the model said.

    >>> Answer("4").status
    'ok'
    """

    text: str
    """"" where there is none."""
    status: AnswerStatus = "ok"
    reason: str | None = None
    """Why it failed."""
    mean_logp: float | None = None
    """Of its tokens, where the model tells it."""


class Grade(NamedTuple):
    """What became of an answer.

    >>> Grade(None, "judge_failed").value is None
    True
    """

    value: Any
    """A label or a number; None where the status is not ``ok``."""
    status: GradeStatus = "ok"
    raw: str | None = None
    """The judge's reply, verbatim."""


class Grading(NamedTuple):
    """One thing that is said about an answer: by a rule, or by a judge who is asked.

    >>> Grading("final", "final", 0, Grade("correct")).by.value
    'correct'
    """

    name: str
    """What stands under ``question`` in ``grades.jsonl``; unique with the sample."""
    question: str
    """The question whose answer is graded. If that failed, so is this. Of a task that
    asks no model, the name again."""
    sample: int
    by: Grade | JudgeRequest
    read: Callable[[Any], Grade] | None = None
    """From a verdict's value to the grade; None for a rule's. ``raw`` is filled in."""
    images: tuple[Picture, ...] = ()
    """That the judge is shown; the harness puts them into the request."""


@dataclasses.dataclass(frozen=True)
class Graded:
    """An item with all that was said: what ``metrics`` reads.

    >>> Graded(0, "an item", {}, {("final", 0): Grade("correct")}).index
    0
    """

    index: int
    """Of the item in its file."""
    item: Any
    answers: Mapping[tuple[str, int], Answer]
    """By question and sample; empty where only grades were given."""
    grades: Mapping[tuple[str, int], Grade]
    """By a grading's name and sample."""


def no_questions(item: Any) -> Sequence[Question]:
    """Return no question: what a task asks a model that measures the judge.

    >>> no_questions("an item")
    ()
    """
    return ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """What the command line says about tasks; each task reads what concerns it.

    Attributes:
      num_samples: answers of each question; default the task's own number.
      conditions: of ``chinese_simplevqa``, see there.
      confidence: whether the model is asked how sure it is, in the same request.
      best_of: how one of several answers is chosen: ``likelihood``, ``judge`` or
        ``majority``.
      agreement: whether graders of refusal are checked against XSTest's human labels.
      wording: ``ours``, or ``official`` for the authors' judge templates, which lie in
        the data directory.
      own: directory with replacements of our templates.
      judge_own: the judge's ``wording``, replacements of the judge's templates.
      aspects: that the judge scores.
      image_dir: where a task's pictures are, in the place of its own folders.
      seed: of whatever a task draws itself, such as which picture is shuffled where.

    >>> TaskOptions().conditions
    ('seen',)
    """

    num_samples: int | None = None
    conditions: tuple[str, ...] = ("seen",)
    confidence: bool = False
    best_of: Literal["likelihood", "judge", "majority"] | None = None
    agreement: bool = True
    wording: Literal["ours", "official"] = "ours"
    own: Path | None = None
    judge_own: Path | None = None
    aspects: tuple[str, ...] = ASPECTS
    image_dir: Path | None = None
    seed: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """A benchmark.

    Attributes:
      name: of the task, and of its directory in the output.
      load: from the data directory (of a task's own file: the file's folder, unless one
        is given) to the items. Our tasks look where :mod:`.published` says. Raises
        UserError for a file that is missing or not as published.
      requests: from an item to the questions; default :func:`no_questions`: it is the
        judge that is measured, by what ``grade`` asks it, and no model is asked.
      grade: from an item and its answers, by (question, sample), to what is said of
        them. Called when all questions of the item are settled.
      further: from an item and its grades to what is asked then, such as a check of
        what the judge saw; default nothing. Its gradings have names of their own.
      metrics: from the graded items to the figures: nested dicts whose leaves are
        :class:`.statistics.Figure`, numbers or texts. Pure.
      num_samples: answers of each question.
      sampling: for questions that say nothing else; the default takes the most
        probable token, at most 512.
      condition: what of several conditions this is; stands behind ``@`` in the name of
        the directory; "" for the usual one.
      variants: makes the tasks that the options ask for out of this one; default this
        one with ``num_samples`` of the options.
      beside: names of tasks, maybe with ``@`` and a condition, whose figures belong
        beside this one's: they are run too where their files are there.
      read_grades: from a file of grades or of an official tool's verdicts, and the
        items, to graded items; default reads a ``grades.jsonl``.
      facts: what the page says beside the figures: published tables, sources, what the
        official figure would be.

    >>> def load(folder):
    ...     return ["on", "tip"]
    >>> def requests(word):
    ...     return [Question("q", ({"role": "user", "content": word},))]
    >>> def grade(word, answers):
    ...     return [Grading("q", *place, Grade(answer.text == word[::-1]))
    ...             for place, answer in answers.items()]
    >>> def metrics(graded):
    ...     return {"right": sum(one.grades["q", 0].value for one in graded)}
    >>> Task(name="backwards", load=load, requests=requests, grade=grade,
    ...      metrics=metrics).directory
    'backwards'
    """

    name: str
    load: Callable[[Path], Items | Sequence[Any]]
    requests: Callable[[Any], Sequence[Question]] = no_questions
    grade: Callable[[Any, Mapping[tuple[str, int], Answer]], Sequence[Grading]]
    metrics: Callable[[Sequence[Graded]], Mapping[str, Any]]
    further: (
        Callable[[Any, Mapping[tuple[str, int], Grade]], Sequence[Grading]] | None
    ) = None
    num_samples: int = 1
    sampling: Mapping[str, Any] = dataclasses.field(
        default_factory=lambda: {"temperature": 0.0, "max_new_tokens": 512}
    )
    condition: str = ""
    variants: "Callable[[Task, TaskOptions], Sequence[Task]] | None" = None
    beside: tuple[str, ...] = ()
    read_grades: "Callable[[Path, Items], Sequence[Graded]] | None" = None
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def measures_judge(self) -> bool:
        """Whether no model is asked.

        >>> Task(name="mine", load=list, grade=list, metrics=dict).measures_judge
        True
        """
        return self.requests is no_questions

    @property
    def directory(self) -> str:
        """The name of its directory in the output.

        >>> nothing = lambda *_: []
        >>> Task(name="mine", load=nothing, requests=nothing, grade=nothing,
        ...      metrics=nothing, condition="blank").directory
        'mine@blank'
        """
        return f"{self.name}@{self.condition}" if self.condition else self.name


def drawn(task: Task, options: TaskOptions) -> Task:
    """Return a task with the samples of the options; several differ by temperature 0.7.

    >>> nothing = lambda *_: []
    >>> task = Task(name="mine", load=nothing, requests=nothing, grade=nothing,
    ...             metrics=nothing)
    >>> drawn(task, TaskOptions(num_samples=3)).sampling["temperature"]
    0.7
    """
    samples = options.num_samples or 1
    several = {"temperature": 0.7} if samples > 1 else {}
    sampling = {**task.sampling, **several}
    return dataclasses.replace(task, num_samples=samples, sampling=sampling)
