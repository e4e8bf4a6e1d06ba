"""What distilling would take, before it takes anything: calls, tokens, cost, time.

Nothing is sent and nothing is written. What is not known yet is assumed, and said: that
the first answer to each prompt passes, that it is as long as it may be, and what
observing would see (see :mod:`.disentangle_file`).
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from jaxalign.data.images import NamedPictures
from jaxalign.feedback.disentangle_file import expected_risks
from jaxalign.feedback.distill_config import RISKS, DistillConfig
from jaxalign.feedback.distill_file import lessons_of, read_data, teacher_settings
from jaxalign.feedback.examining import Examiner, read_answer
from jaxalign.feedback.lessons import Lesson, answer_request, with_risks
from jaxalign.judging.estimate import (
    Estimate,
    TokenCounter,
    estimate,
    lines_of,
    token_counter,
)
from jaxalign.judging.judge import JudgeRequest, Verdict, request_key
from jaxalign.judging.store import Store


__all__ = ["DistillEstimate", "estimate_distilling", "lines_of_distilling"]

_SENTENCE = "This is one of the sentences that an answer is made of. "


class DistillEstimate(NamedTuple):
    """What teacher and judge would have to be asked."""

    teacher: Estimate
    """One answer a prompt; its ``completion_tokens`` are the most there can be."""
    judge: Estimate
    """Observing included."""


class _FirstAnswer(NamedTuple):
    """The first answer to a lesson, or what is taken for it."""

    lesson: Lesson
    text: str
    """Empty where it has a fault that needs no judge."""
    took: Estimate


def estimate_distilling(config: DistillConfig) -> DistillEstimate:
    """Return what distilling a file would take; nothing is sent and nothing written.

    Raises:
      UserError: the prompts, the context, an option or the store cannot be read.
    Example::

      files = {"data": "prompts.jsonl", "out": "sft.jsonl", "context": "rules.md"}
      endpoint = EndpointConfig(model="m", completion_price=0.6)
      config = DistillConfig(endpoint=endpoint, **files)
      estimate_distilling(config).teacher.calls
    """
    pictures, counter = NamedPictures(), token_counter(None)
    lessons = read_data(config, pictures)
    observing: list[JudgeRequest] = []
    if config.context == RISKS:
        prompts = [lesson.prompt for lesson in lessons]
        expected = [*expected_risks(config.disentangling, prompts, pictures)]
        observing = [request for asked, _ in expected for request in asked]
        pairs = zip(lessons, expected, strict=True)
        lessons = [with_risks(lesson, found) for lesson, (_, found) in pairs]
    else:
        lessons = lessons_of(config, lessons)
    answers = [*_answers(config, lessons, pictures, counter)]
    teacher = Estimate(0, 0, 0, 0, 0)
    for one in answers:
        teacher = teacher.plus(one.took)
    looking = _looking(config, answers, pictures)
    asked = estimate(config.judge, [*observing, *looking], config.store_path)
    return DistillEstimate(teacher, asked)


def lines_of_distilling(config: DistillConfig) -> list[str]:
    """Return the estimate for a person, a line each for calls, tokens, cost, time.

    Raises:
      UserError: see :func:`estimate_distilling`.
    Example::

      print(*lines_of_distilling(config), sep="\\n")
    """
    found = estimate_distilling(config)
    if config.teacher is None:
        endpoint = config.endpoint.as_judge()
        told = lines_of(endpoint, found.teacher, token_counter(None))
        lines = [line.replace("judge.", "endpoint.") for line in told]
    else:
        known = found.teacher.known
        lines = [
            f"{found.teacher.requests} answers: {known} known from the store",
            f"to make: {found.teacher.calls} answers, in this process",
        ]
    lines = [f"teacher: {line}" for line in lines]
    if found.judge.requests:
        lines += [f"judge: {line}" for line in lines_of(config.judge, found.judge)]
    lines.append(
        "the first answer to each prompt is taken to pass, and to be as long as it may "
        f"be (max_new_tokens {config.max_new_tokens})"
    )
    if config.context == RISKS:
        lines.append(
            "a prompt that was not looked at yet is taken to hold one risk in its "
            "words and one in its pictures, if it has some"
        )
    return lines


def _answers(
    config: DistillConfig,
    lessons: Sequence[Lesson],
    pictures: NamedPictures,
    counter: TokenCounter,
) -> Iterator[_FirstAnswer]:
    """Yield the first answer to each lesson that the teacher is asked."""
    sentences = config.max_new_tokens // counter.tokens(_SENTENCE) or 1
    assumed = (_SENTENCE * sentences).strip()
    there = config.store_path.is_file()
    store = Store(config.store_path, create=False) if there else None
    settings = teacher_settings(config, pictures)
    try:
        for lesson in lessons:
            if lesson.reason is not None or lesson.taken:
                continue
            goes_on = config.teacher is not None
            request = answer_request(lesson, config, 0, pictures, goes_on=goes_on)
            known = store and store.verdict(request_key(request, settings))
            if known is not None and known.failure is None:
                answer = read_answer(lesson, Verdict(known.value))
                text = answer.text if answer.reason is None else ""
                yield _FirstAnswer(lesson, text, Estimate(1, 1, 0, 0, 0))
                continue
            sent = counter.sent(request.messages)
            shown = len(request.subject.images)
            took = Estimate(1, 0, 0, sent, config.max_new_tokens, shown)
            yield _FirstAnswer(lesson, assumed, took)
    finally:
        if store is not None:
            store.close()


def _looking(
    config: DistillConfig, answers: Sequence[_FirstAnswer], pictures: NamedPictures
) -> Iterator[JudgeRequest]:
    """Yield what a judge would be asked of these answers."""
    examiner = Examiner(None, config.judge.votes, config.judge.own_wording)
    for lesson, text, _ in answers:
        if not text:
            continue
        if config.refusals == "judge":
            yield examiner.refusal(lesson, text, pictures)
        if config.verify:
            for votes in examiner.handled(lesson, text, pictures):
                yield from votes
