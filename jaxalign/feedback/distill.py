"""A teacher's answers as records for a student that does not see what it was told.

The second stage of DREAM as we read it (the paper publishes its data and prompts, not
the program): the teacher answers with the risks in its prompt before it, the student is
trained on (pictures, question) -> answer without them. Any system text is distilled in
the same way. https://arxiv.org/abs/2504.18053

An answer passes if it

* is one: not empty, not cut off at ``max_new_tokens``, not taken away by a filter;
* does not give away what the teacher was told (:func:`.distill_filters.quotes`);
* handles every risk that was observed in its prompt, by the verifier;
* refuses nothing, where the prompt is benign.

Of several answers to a prompt the first that passes and does not refuse is taken, else
the first that passes; further ones are asked for only where that is not found yet. What
passed is then balanced, see :func:`.distill_filters.balance`. The draft of a reasoning
model before ``</think>`` is left out: it speaks of what it was told.
"""

import contextlib
import functools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxalign import event_loops
from jaxalign.data.images import NamedPictures
from jaxalign.data.messages import Message
from jaxalign.errors import UserError
from jaxalign.feedback import distill_filters
from jaxalign.feedback.disentangle import PromptRisks
from jaxalign.feedback.distill_filters import Balanced
from jaxalign.feedback.examining import (
    Distilling,
    Examiner,
    TeacherAnswer,
    examined,
    read_answer,
)
from jaxalign.feedback.lessons import (
    Lesson,
    answer_request,
    check_conversation,
    read_lessons,
    with_risks,
    with_system,
)
from jaxalign.judging.asking import Usage, ask_all
from jaxalign.judging.judge import Expecting, Judge
from jaxalign.judging.make import Function, as_judge
from jaxalign.judging.store import Store, temporary_store


__all__ = ["Distilled", "Learnt", "distill", "distill_async"]


class Learnt(NamedTuple):
    """What a lesson came to."""

    lesson: Lesson
    answers: tuple[TeacherAnswer, ...]
    """In the order in which they were asked for."""
    kept: int | None
    """Which of them is learnt from, if any is."""
    reason: str | None
    """Why none is."""

    @property
    def answer(self) -> TeacherAnswer:
        """Return the answer that is kept."""
        assert self.kept is not None
        return self.answers[self.kept]

    def record(self) -> dict[str, Any]:
        """Return the record of the answer that is kept: its prompt without context."""
        lesson = self.lesson
        said = lesson.own if lesson.taken else self.answer.text
        return {**_columns(lesson), "completion": said, "benign": lesson.benign}

    def row(self) -> dict[str, Any]:
        """Return what is known of a prompt that nobody learns from."""
        told = [answer._asdict() for answer in self.answers]
        benign = self.lesson.benign
        made = {**_columns(self.lesson), "benign": benign, "reason": self.reason}
        return {**made, "answers": told}


def _columns(lesson: Lesson) -> dict[str, Any]:
    prompt = lesson.prompt
    given = dict(prompt.template_kwargs)
    tools = given.pop("tools", None)
    more = {"tools": tools, "chat_template_kwargs": given}
    return {
        "index": lesson.row,
        "prompt": prompt.given,
        **{name: value for name, value in more.items() if value},
        "images": [],
        **prompt.image_columns,
    }


class Distilled(NamedTuple):
    """What a teacher's lessons came to, in memory."""

    records: list[dict[str, Any]]
    """``prompt``, ``images``, ``completion``, and whether it is ``benign``."""
    dropped: list[dict[str, Any]]
    """The other prompts, each with its ``reason`` and its ``answers``."""


def distill(
    rows: Iterable[Mapping[str, Any]],
    teacher: Judge | Function,
    judge: Judge | Function | None = None,
    *,
    context: str | Sequence[PromptRisks],
    options: Distilling | None = None,
    votes: int = 1,
    own: Path | None = None,
    store: Store | None = None,
    image_dir: str | Path | None = None,
    pictures: NamedPictures | None = None,
) -> Distilled:
    """Return a teacher's answers as records, also where an event loop runs.

    Args:
      rows: ``{"prompt": text or messages}``, with ``images``, ``benign`` and
        ``completion`` where they have them, see :mod:`jaxalign.feedback.lessons`.
      teacher: who answers: a Judge that takes requests for prose, such as
        ``judging.endpoint_model.Endpoint``, or a function ``teacher(requests) ->
        [{"text": ..., "finish_reason": "stop"}, ...]``.
      judge: who verifies; needed where something was observed, unless
        ``options.verify`` is false.
      context: what the teacher is told: a system text, or what was observed in each
        prompt, as ``disentangle.disentangle`` returns it.
      options: how answers are drawn and kept; default ``Distilling()``.
      votes: how often the verifier is asked.
      own: a directory with templates of the user's that replace ours.
      store: keeps every answer and verdict, so that none is asked for twice; default
        none.
      image_dir: where relative paths of pictures start; default the working directory.
      pictures: names the prompts' pictures. Functions are given their bytes; a Judge
        that looks at them was made with this object's ``load`` as its ``load_image``.
    Raises:
      UserError: a row or an option is wrong, or teacher, judge or store stop the run.

    >>> rows = [{"prompt": "2 + 2?"}, {"prompt": "3 + 3?"}]
    >>> def teacher(requests):
    ...     return [{"text": "4" if "2" in asked["prompt"] else "", "finish_reason": ""}
    ...             for asked in requests]
    >>> found = distill(rows, teacher, context="Answer with a number alone.")
    >>> [(row["prompt"], row["completion"]) for row in found.records]
    [('2 + 2?', '4')]
    >>> [row["reason"] for row in found.dropped]
    ['empty']
    """
    options = options or Distilling()
    pictures = pictures or NamedPictures()
    lessons = read_lessons(rows, image_dir=image_dir)
    if isinstance(context, str):
        lessons = [with_system(lesson, context) for lesson in lessons]
    else:
        if len(context) != len(lessons):
            raise UserError(
                f"context has what was observed in {len(context)} prompts, and there "
                f"are {len(lessons)}: give what disentangle returned for these rows"
            )
        pairs = zip(lessons, context, strict=True)
        lessons = [with_risks(lesson, found) for lesson, found in pairs]
    asked = as_judge(teacher, load_image=pictures.load)
    if not isinstance(asked, Expecting):
        check_conversation(lessons)
    examiner = Examiner(
        None if judge is None else as_judge(judge, load_image=pictures.load), votes, own
    )
    observed = any(lesson.observations for lesson in lessons)
    if judge is None and (options.refusals == "judge" or options.verify and observed):
        raise UserError(
            "nobody looks at the answers: give a judge, or Distilling(verify=False, "
            "refusals='rules')"
        )
    with contextlib.ExitStack() as stack:
        kept = stack.enter_context(temporary_store()) if store is None else store
        learnt = event_loops.run(
            distill_async(
                *(lessons, asked, examiner, kept, options, pictures),
                used=(Usage(), Usage()),
            )
        )
    return Distilled(
        [one.record() for one in learnt if one.kept is not None],
        [one.row() for one in learnt if one.kept is None],
    )


async def distill_async(
    lessons: Sequence[Lesson],
    teacher: Judge,
    examiner: Examiner,
    store: Store,
    options: Distilling,
    pictures: NamedPictures,
    *,
    used: tuple[Usage, Usage],
) -> list[Learnt]:
    """Return what each lesson came to.

    Args:
      lessons: the prompts, with what the teacher is told.
      teacher: who answers.
      examiner: who looks at the answers.
      store: keeps every answer and verdict.
      options: how answers are drawn and kept.
      pictures: names those of the prompts.
      used: what teacher and judge are asked is added to it.
    Raises:
      UserError: teacher, judge or store stop the run.
    Example::

      examiner, used = Examiner(judge), (Usage(), Usage())
      asked = lessons, teacher, examiner, store, options, pictures
      learnt = await distill_async(*asked, used=used)
    """
    goes_on = isinstance(teacher, Expecting)
    request_of = functools.partial(
        answer_request, sampling=options, pictures=pictures, goes_on=goes_on
    )
    asked = [n for n, one in enumerate(lessons) if one.reason is None and not one.taken]
    if isinstance(teacher, Expecting):
        teacher.expect([request_of(lessons[n], sample=0) for n in asked])
    own = [n for n, one in enumerate(lessons) if one.reason is None and one.taken]
    answers: dict[int, list[TeacherAnswer]] = {n: [] for n in range(len(lessons))}

    async def add(numbers: Sequence[int], said: Sequence[TeacherAnswer]) -> None:
        looked = await examined(
            *([lessons[n] for n in numbers], said, examiner, store, options, pictures),
            usage=used[1],
        )
        for n, answer in zip(numbers, looked, strict=True):
            answers[n].append(answer)

    await add(own, [_own(lessons[n]) for n in own])
    for sample in range(options.num_samples):
        left = [n for n in asked if not any(one.settles for one in answers[n])]
        verdicts = await ask_all(
            teacher,
            (request_of(lessons[n], sample=sample) for n in left),
            store,
            len(left),
            what="answering",
            usage=used[0],
        )
        pairs = zip(left, verdicts, strict=True)
        await add(left, [read_answer(lessons[n], verdict) for n, verdict in pairs])
    found = [_learnt(lesson, answers[n]) for n, lesson in enumerate(lessons)]
    return _balanced(found, options)


def _own(lesson: Lesson) -> TeacherAnswer:
    """Return a row's own completion as an answer."""
    text = own = lesson.own
    if not isinstance(own, str):
        turns = [Message(**turn) for turn in own]
        text = "\n\n".join(turn.text for turn in turns if turn.role == "assistant")
    return TeacherAnswer(text, distill_filters.answer_fault(text, "stop"))


def _learnt(lesson: Lesson, answers: Sequence[TeacherAnswer]) -> Learnt:
    """Choose among the answers of a lesson."""
    passed = [n for n, answer in enumerate(answers) if answer.reason is None]
    if not passed:
        reason = lesson.reason if lesson.reason is not None else answers[-1].reason
        return Learnt(lesson, tuple(answers), None, reason)
    best = [n for n in passed if answers[n].settles]
    return Learnt(lesson, tuple(answers), (best or passed)[0], None)


def _balanced(found: Sequence[Learnt], options: Distilling) -> list[Learnt]:
    """Drop what would unbalance the records."""
    kept = {one.lesson.row: one for one in found if one.kept is not None}
    gone = distill_filters.balance(
        [
            Balanced(n, one.lesson.risky, one.answer.refused, len(one.answer.text))
            for n, one in kept.items()
            if one.lesson.benign is not None
        ],
        max_refusal_share=options.max_refusal_share,
        max_length_ratio=options.max_length_ratio,
        seed=options.seed,
    )
    return [
        one._replace(kept=None, reason=gone[one.lesson.row])
        if one.lesson.row in gone
        else one
        for one in found
    ]
