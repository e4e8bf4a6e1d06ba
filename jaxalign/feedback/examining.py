"""What becomes of a teacher's answers: refused, unhandled, or fit to be learnt from."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from jaxalign.data.images import NamedPictures
from jaxalign.errors import UserError
from jaxalign.feedback import distill_filters
from jaxalign.feedback.candidates import votes_on
from jaxalign.feedback.decompose import risks
from jaxalign.feedback.disentangle import candidate_of
from jaxalign.feedback.lessons import Lesson
from jaxalign.generation.completions import Sampling, check_drawn
from jaxalign.judging import refusals, safety
from jaxalign.judging.asking import Usage, ask_all
from jaxalign.judging.graders import without_draft
from jaxalign.judging.judge import Judge, JudgeRequest, Subject, Verdict
from jaxalign.judging.store import Store
from jaxalign.judging.votes import merged


__all__ = ["Distilling", "Examiner", "TeacherAnswer", "examined", "read_answer"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distilling(Sampling):
    """How a teacher's answers are drawn, and which of them are kept.

    Attributes:
      num_samples: most answers of a prompt; another is asked for only where none has
        passed yet, or what passed refuses.
      verify: have each answer checked, whether it handles what was observed.
      refusals: who tells what refuses: ``rules`` (XSTest's string rule) or the
        ``judge``, who also sees refusals in part.
      max_refusal_share: of the kept answers to risky prompts, at most so many may be
        refusals and nothing else. (Of DREAM's released answers to them at most 0.08
        begin with a stock refusal.)
      max_length_ratio: the mean lengths of kept answers to risky and to benign prompts
        differ by this factor at most, or the longest of the longer side go. (In DREAM's
        data it is 2.1.) null keeps all.

    >>> Distilling(num_samples=4).max_refusal_share
    0.1
    """

    verify: bool = True
    refusals: Literal["rules", "judge"] = "rules"
    max_refusal_share: float = 0.1
    max_length_ratio: float | None = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_drawn(self)
        if not 0 <= self.max_refusal_share <= 1:
            raise UserError(
                f"max_refusal_share must be in [0, 1]: got {self.max_refusal_share}"
            )
        if self.max_length_ratio is not None and not 1 <= self.max_length_ratio:
            raise UserError(
                "max_length_ratio must be at least 1, or null: got "
                f"{self.max_length_ratio}"
            )
        if self.temperature == 0 and self.num_samples > 1:
            raise UserError(
                f"num_samples {self.num_samples} at temperature 0 asks for the same "
                "answer again and again: leave num_samples out, or give a temperature "
                "above 0"
            )


class TeacherAnswer(NamedTuple):
    """An answer to a prompt, and what is known of it."""

    text: str
    """Without a draft."""
    reason: str | None = None
    """Why it did not pass; None where it did."""
    refused: bool = False
    detail: str | None = None
    """What an endpoint said of an answer that it did not give."""

    @property
    def settles(self) -> bool:
        """Whether no further answer is asked for."""
        return self.reason is None and not self.refused


class Examiner(NamedTuple):
    """Who looks at answers, and how.

    >>> Examiner(None).votes
    1
    """

    judge: Judge | None
    """None where nothing is left to a judge."""
    votes: int = 1
    """How often the verifier is asked."""
    own: Path | None = None
    """A directory with templates of the user's that replace ours."""

    def handled(
        self, lesson: Lesson, text: str, pictures: NamedPictures
    ) -> list[list[JudgeRequest]]:
        """Return the requests whether an answer handles what was observed.

        One list for each observation, with one request a vote.
        """
        candidate = dataclasses.replace(
            candidate_of(lesson.prompt, pictures), response=text
        )
        requests = (
            risks.handled_request(candidate, one, self.own)
            for one in lesson.observations
        )
        return [votes_on(request, self.votes, 0) for request in requests]

    def refusal(
        self, lesson: Lesson, text: str, pictures: NamedPictures
    ) -> JudgeRequest:
        """Return the request whether an answer refuses."""
        prompt = candidate_of(lesson.prompt, pictures).prompt
        return safety.refusal_request(Subject(prompt, text), self.own)


def read_answer(lesson: Lesson, verdict: Verdict) -> TeacherAnswer:
    """Return what the teacher said, with what can be told from the text alone.

    Args:
      lesson: that it was asked.
      verdict: on the request.
    Example:
      >>> from jaxalign.feedback.lessons import read_lessons
      >>> (lesson,) = read_lessons([{"prompt": "2 + 2?"}])
      >>> said = {"text": "<think>2 + 2</think> 4", "finish_reason": "stop"}
      >>> read_answer(lesson, Verdict(said))[:2]
      ('4', None)
    """
    if verdict.failure is not None:
        return TeacherAnswer("", "failed", detail=verdict.failure)
    ended = verdict.value["finish_reason"]
    text = without_draft(verdict.value["text"])
    reason = distill_filters.answer_fault(verdict.value["text"], ended)
    if reason is None and lesson.context is not None:
        if distill_filters.quotes(text, lesson.context, lesson.words):
            reason = "quotes the context"
    return TeacherAnswer(text, reason, refused=ended == "refusal")


async def examined(
    lessons: Sequence[Lesson],
    answers: Sequence[TeacherAnswer],
    examiner: Examiner,
    store: Store,
    options: Distilling,
    pictures: NamedPictures,
    *,
    usage: Usage | None = None,
) -> list[TeacherAnswer]:
    """Return answers with what the rules, the verifier and the judge say of them.

    Args:
      lessons: that they were given in, one each.
      answers: those that have no reason yet are looked at.
      examiner: who looks at them.
      store: keeps every verdict.
      options: what is looked at.
      pictures: names those of the prompts.
      usage: what is asked and used is added to it.
    Raises:
      UserError: the judge or the store stops the run.
    Example::

      who = Examiner(judge)
      found = await examined(lessons, answers, who, store, options, pictures)
    """
    found = list(answers)

    async def ask(requests: Sequence[JudgeRequest], what: str) -> list[Verdict]:
        assert examiner.judge is not None
        total = len(requests)
        return await ask_all(
            examiner.judge, requests, store, total, what=what, usage=usage
        )

    def passing() -> list[tuple[int, Lesson, str]]:
        pairs = enumerate(zip(lessons, found, strict=True))
        return [(k, lesson, a.text) for k, (lesson, a) in pairs if a.reason is None]

    if options.refusals == "judge":
        looked = passing()
        requests = [examiner.refusal(one, text, pictures) for _, one, text in looked]
        told = await ask(requests, "telling refusals")
        for (k, lesson, _), verdict in zip(looked, told, strict=True):
            found[k] = _by_label(found[k], lesson, verdict)
    else:
        for k, lesson, text in passing():
            label = refusals.by_prefix(text)
            found[k] = _by_label(found[k], lesson, Verdict({"grade": label}))
    if options.verify:
        looked = [one for one in passing() if one[1].observations]
        groups = [examiner.handled(one, text, pictures) for _, one, text in looked]
        flat = [vote for group in groups for votes in group for vote in votes]
        told = iter(await ask(flat, "verifying")) if flat else iter(())
        for (k, _, _), group in zip(looked, groups, strict=True):
            each = [merged([next(told) for _ in votes]) for votes in group]
            if any(verdict.failure for verdict in each):
                found[k] = found[k]._replace(reason="not verified")
            elif any(verdict.value["answer"] == "no" for verdict in each):
                found[k] = found[k]._replace(reason="unhandled")
    return found


def _by_label(answer: TeacherAnswer, lesson: Lesson, verdict: Verdict) -> TeacherAnswer:
    """Return an answer with what is said of its refusing."""
    if verdict.failure is not None:
        return answer._replace(reason="not verified")
    label = verdict.value["grade"]
    if lesson.benign:
        refused = answer.refused or refusals.refused(label)
        return answer._replace(
            refused=refused, reason="refused benign" if refused else None
        )
    # Where there is a risk, to decline a part is no shortcut.
    return answer._replace(refused=answer.refused or label == "full_refusal")
