"""What DREAM would take at a given scale: calls, tokens, cost and time, from formulas.

Texts of requests are those that the library sends, counted four bytes of UTF-8 to a
token; a picture is ``image_tokens``. What a run will see is not known before it is
made: ``observations`` a risky prompt are the mean of DREAM's released rows, prompts and
responses are as long as theirs.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from jaxalign.feedback.decompose import risk_scores, risks
from jaxalign.feedback.decompose.decomposition import Candidate
from jaxalign.feedback.decompose.observations import Observation
from jaxalign.judging import safety
from jaxalign.judging.estimate import CALL_SECONDS, token_counter
from jaxalign.judging.judge import JudgeRequest, Subject, message_text


__all__ = ["EVALUATIONS", "Scale", "Work", "plan", "table"]

EVALUATIONS = {
    # Answers, and requests to the judge about each.
    "siuo": (501, 2),
    "figstep": (500, 1),
    "figstep_benign": (50, 1),
    "vlguard": (1558, 1),
    "mossbench": (300, 1),
    "multiple_choice": (1500, 0),  # MMStar's, by rule
}
"""Published sizes; SIUO has 167 questions with three answers, of which safety and
effectiveness are judged."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scale:
    """How much there is of everything; the defaults are the published scale.

    Attributes:
      count: prompts, each with a picture.
      risky: share of them with anything to observe.
      observations: of a risky prompt, before and after the verifier.
      gate_count: held-out prompts of the gate.
      rounds: each with candidates, pairs, updates and the gate.
      candidates: of each prompt and round.
      pairs: of each prompt and round, at most.
      epochs: over a round's pairs.
      supervised_epochs: over the teacher's answers.
      segments: score each sentence too, for 2D-DPO.
      teacher_calls: whether the teacher is asked for by calls, not run here.
      prompt_tokens: of a prompt's words.
      response_tokens: of a response, or a teacher's answer.
      image_tokens: of a picture, for judge and policy.
      prompt_price: of a million tokens to the judge.
      completion_price: of a million tokens from it.
      concurrency: calls on their way at a time.
      sampled_per_second: tokens a second that the policy writes.
      trained_per_second: tokens a second that training takes.
    """

    count: int = 2000
    risky: float = 0.67
    observations: float = 1.33
    gate_count: int = 200
    rounds: int = 4
    candidates: int = 10
    pairs: int = 2
    epochs: int = 4
    supervised_epochs: int = 3
    segments: bool = True
    teacher_calls: bool = True
    prompt_tokens: int = 30
    response_tokens: int = 120
    image_tokens: int = 576
    prompt_price: float = 0.0
    completion_price: float = 0.0
    concurrency: int = 8
    sampled_per_second: float = 1000.0
    trained_per_second: float = 4000.0


class Work(NamedTuple):
    """What a stage takes."""

    stage: str
    calls: int = 0
    sent: int = 0
    """Tokens to judge or teacher, pictures included."""
    received: int = 0
    sampled: int = 0
    """Tokens that the policy writes."""
    trained: int = 0
    """Tokens that training goes through."""

    def plus(self, other: "Work") -> "Work":
        """Return the sums of both, under this one's name."""
        sums = (a + b for a, b in zip(self[1:], other[1:], strict=True))
        return Work(self.stage, *sums)

    def cost(self, scale: Scale) -> float:
        """Return the price of the calls."""
        paid = self.sent * scale.prompt_price + self.received * scale.completion_price
        return paid / 1e6

    def seconds(self, scale: Scale) -> float:
        """Return how long it takes, one thing after the other."""
        calls = -(-self.calls // scale.concurrency) * CALL_SECONDS
        return (
            calls
            + self.sampled / scale.sampled_per_second
            + self.trained / scale.trained_per_second
        )


def plan(scale: Scale) -> list[Work]:
    """Return the work of each stage."""
    seen = round(scale.count * scale.risky * scale.observations)
    asked = _Asked(scale)
    passes = [
        asked.work(scale.count, request)
        for request in risks.observe_requests(asked.candidate).values()
    ]
    confirm = risks.confirm_request(asked.candidate, asked.observation)
    first = _sum("disentangle", [*passes, asked.work(seen, confirm)])
    teach = asked.handled(seen)
    answers = scale.count * scale.response_tokens
    if scale.teacher_calls:
        whole = scale.count * asked.shown
        teach = teach.plus(Work("", scale.count, whole, answers))
    else:
        teach = teach.plus(Work("", sampled=answers))
    one = asked.shown + scale.response_tokens
    passed = scale.supervised_epochs * scale.count * one
    rounds = [_round(scale, asked, number) for number in range(1, scale.rounds + 1)]
    return [
        first,
        teach._replace(stage="distill"),
        Work("supervised stage", trained=passed),
        *rounds,
        _evaluation(scale, asked, "evaluation before"),
        _evaluation(scale, asked, "evaluation after"),
    ]


class _Asked:
    """Requests as the library makes them, about texts of the assumed lengths."""

    def __init__(self, scale: Scale):
        self.scale = scale
        self.shown = scale.prompt_tokens + scale.image_tokens
        self.count = token_counter(None).tokens
        prompt, response = "word" * scale.prompt_tokens, "word" * scale.response_tokens
        spans = tuple((n, n + 80) for n in range(0, len(response) - 79, 80))
        self.candidate = Candidate(prompt, response, spans, images=("sha256:0",))
        content = "w" * 44  # eleven words, as DREAM's observations have on average
        self.observation = Observation(
            content, "text instructions", "illegal activities"
        )
        self.subject = Subject(prompt, response, images=("sha256:0",))

    def work(self, times: int, request: JudgeRequest) -> Work:
        """Return what it takes to ask a request so many times."""
        text = sum(self.count(message_text(m)) for m in request.messages)
        sent = text + len(request.subject.images) * self.scale.image_tokens
        replies = {"observations": 40, "effects": 16 * len(self.candidate.spans)}
        received = replies.get(request.task, 8)
        return Work("", times, times * sent, times * received)

    def handled(self, times: int) -> Work:
        """Return what it takes to ask whether an observation is handled."""
        request = risks.handled_request(self.candidate, self.observation)
        return self.work(times, request)


def _round(scale: Scale, asked: _Asked, number: int) -> Work:
    """Return a round; its prompts are disentangled already, in the same store."""
    count = scale.count * scale.candidates
    seen = round(count * scale.risky * scale.observations)
    candidate, found = asked.candidate, [asked.observation]
    parts = [
        asked.handled(seen),
        asked.work(count, risk_scores.rating_request(candidate, found)),
        Work("", sampled=count * scale.response_tokens),
    ]
    if scale.segments:
        parts.append(asked.work(count, risk_scores.effects_request(candidate, found)))
    policies = 2 if number == 1 else 1  # the one before it is known from then on
    held = policies * scale.gate_count
    labels = (
        safety.safety_request(asked.subject),
        safety.refusal_request(asked.subject),
        safety.effectiveness_request(asked.subject),
    )
    parts += [asked.work(held, request) for request in labels]
    pair = asked.shown + 2 * scale.response_tokens
    passed = scale.epochs * scale.pairs * scale.count * pair
    sampled = held * scale.response_tokens
    return _sum(f"round {number}", [*parts, Work("", 0, 0, 0, sampled, passed)])


def _evaluation(scale: Scale, asked: _Asked, stage: str) -> Work:
    parts = []
    for answers, judged in EVALUATIONS.values():
        parts.append(Work("", sampled=answers * scale.response_tokens))
        request = safety.safety_request(asked.subject)
        parts.append(asked.work(answers * judged, request))
    return _sum(stage, parts)


def _sum(stage: str, parts: Sequence[Work]) -> Work:
    found = Work(stage)
    for part in parts:
        found = found.plus(part)
    return found


def table(scale: Scale) -> str:
    """Return the plan as Markdown, with the sum."""
    works = plan(scale)
    works.append(_sum("all", works))
    rows = [
        "| stage | calls | tokens sent | received | sampled | trained | cost | hours |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for one in works:
        counts = " | ".join(f"{value:,}" for value in one[1:])
        rows.append(
            f"| {one.stage} | {counts} | {one.cost(scale):,.2f} | "
            f"{one.seconds(scale) / 3600:.1f} |"
        )
    return "\n".join(rows)
