"""What an evaluation would take, before it takes anything; nothing is sent.

Answers that the store has are read there, so that what is already graded is known too.
Every other answer is taken to be a sentence long.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxalign.data.images import NamedPictures
from jaxalign.evaluation.answering import answer_of, request_of, with_pictures
from jaxalign.evaluation.config import EvalConfig
from jaxalign.evaluation.harness import grade_of, model_of, sampling_of
from jaxalign.evaluation.planning import Planned, plan
from jaxalign.evaluation.task import Answer, Grade, Grading
from jaxalign.judging.budget import cost_of
from jaxalign.judging.config import JudgeConfig
from jaxalign.judging.endpoint_model import endpoint_settings
from jaxalign.judging.estimate import (
    CALL_SECONDS,
    Estimate,
    assumed_reply,
    token_counter,
)
from jaxalign.judging.judge import (
    JudgeRequest,
    Verdict,
    request_key,
)
from jaxalign.judging.make import settings_of
from jaxalign.judging.store import Store


__all__ = ["lines_of_run"]

_ANSWER = "An answer of a sentence, as models give them to such questions."


class _Known(NamedTuple):
    """What the store has, by key; None without a store."""

    store: Store | None
    counted: set[str]
    """Keys of what is asked already: what is equal is asked once."""

    def verdict(self, key: str):
        """Return a value of the store, None for none and for a failure."""
        found = None if self.store is None else self.store.verdict(key)
        return found if found is not None and found.failure is None else None

    def estimate(self, request: JudgeRequest, key: str, reply: str) -> Estimate:
        """Return what a request takes, 0 tokens if it is known or equal to another."""
        if self.verdict(key) is not None:
            return Estimate(1, 1, 0, 0, 0)
        if key in self.counted:
            return Estimate(1, 0, 1, 0, 0)
        self.counted.add(key)
        counter, shown = token_counter(None), len(request.subject.images)
        sent = counter.sent(request.messages)
        return Estimate(1, 0, 0, sent, counter.tokens(reply), shown)


def lines_of_run(config: EvalConfig) -> list[str]:
    """Return calls, tokens, cost and time for a person, a line each.

    Raises:
      UserError: see ``harness.plan``.
    Example::

      config = EvalConfig(tasks=("xstest",), data_dir="data", out="o", model="smollm2")
      print(*lines_of_run(config), sep="\\n")
    """
    pictures = NamedPictures()
    path = Path(config.out) / "store.db"
    store = Store(path, create=False) if path.is_file() else None
    try:
        lines = []
        asked = judged = Estimate(0, 0, 0, 0, 0)
        planned, known = plan(config), _Known(store, set())
        settings = _settings(config, planned, pictures), settings_of(config.judge)
        for one in planned:
            answers, grades = _of_task(one, config, pictures, known, *settings)
            lines.append(
                f"{one.task.directory}: {len(one.indices)} of {len(one.items.rows)} "
                f"items, {answers.requests} answers ({answers.known} in the store), "
                f"{grades.requests} judgements ({grades.known} in the store)"
            )
            asked, judged = asked.plus(answers), judged.plus(grades)
        endpoint = config.endpoint
        model = endpoint.as_judge() if endpoint.model is not None else None
        lines += _lines("answers", model, asked)
        lines += _lines("judgements", config.judge, judged)
        return lines
    finally:
        if store is not None:
            store.close()


def _settings(
    config: EvalConfig, planned: Sequence[Planned], pictures: NamedPictures
) -> Mapping[str, Any]:
    """Return what answers depend on; that needs no key."""
    if all(one.task.measures_judge for one in planned):
        return {}
    if config.checkpoint is None:  # without a key
        return endpoint_settings(config.endpoint)
    return model_of(config, pictures).settings


def _of_task(
    one: Planned,
    config: EvalConfig,
    pictures: NamedPictures,
    known: _Known,
    model: Mapping[str, Any],
    judge: Mapping[str, Any],
) -> tuple[Estimate, Estimate]:
    answers = grades = Estimate(0, 0, 0, 0, 0)
    for index in one.indices:
        row = one.items.rows[index]
        said: dict[tuple[str, int], Answer] = {}
        for question in one.task.requests(row):
            for sample in range(one.task.num_samples):
                before: Sequence[dict[str, str]] = ()
                if question.follows is not None:
                    before = [{"role": "assistant", "content": _ANSWER}]
                request = request_of(
                    *(question, sample, before),
                    sampling_of(one.task, question, config),
                    pictures,
                    logprobs=config.best_of == "likelihood",
                )
                key = request_key(request, model)
                found = known.verdict(key)
                answers = answers.plus(known.estimate(request, key, _ANSWER))
                said[question.name, sample] = (
                    Answer(_ANSWER) if found is None else answer_of(found)
                )
        first = one.task.grade(row, said)
        found, judged = _judged(first, pictures, known, judge)
        grades = grades.plus(judged)
        if one.task.further is not None:
            made = {(g.name, g.sample): grade_of(g, v) for g, v in found}
            more = one.task.further(row, made)
            grades = grades.plus(_judged(more, pictures, known, judge)[1])
    return answers, grades


def _judged(
    gradings: Sequence[Grading],
    pictures: NamedPictures,
    known: _Known,
    judge: Mapping[str, Any],
) -> tuple[list[tuple[Grading, Verdict]], Estimate]:
    """Return the judge's verdicts, known or assumed, and what it is asked."""
    found: list[tuple[Grading, Verdict]] = []
    total = Estimate(0, 0, 0, 0, 0)
    for one in gradings:
        if isinstance(one.by, Grade):
            continue
        request = with_pictures(one.by, one.images, pictures)
        key = request_key(request, judge)
        # What a judge writes a list of is one thing, as in `jaxalign disentangle`.
        assumed = assumed_reply(request.schema, items=1)
        reply = _ANSWER if request.task == "prose" else str(assumed)
        total = total.plus(known.estimate(request, key, reply))
        found.append((one, known.verdict(key) or Verdict(assumed)))
    return found, total


def _lines(what: str, config: JudgeConfig | None, found: Estimate) -> list[str]:
    """Return what is left to ask for a person."""
    if config is None or config.name != "openai":
        return [f"{what}: {found.calls} to make, in this process"]
    lines = [
        f"{what}: {found.calls} calls, which show {found.pictures} pictures; about "
        f"{found.prompt_tokens} tokens of prompts and {found.completion_tokens} of "
        "replies (4 bytes of UTF-8 each; pictures are not counted)"
    ]
    if config.prompt_price or config.completion_price:
        cost = cost_of(config, found.prompt_tokens, found.completion_tokens)
        lines.append(f"{what}: cost {cost:.4f} by the prices given")
    seconds = -(-found.calls // config.concurrency) * CALL_SECONDS
    lines.append(
        f"{what}: {seconds:.0f} s, if a call takes {CALL_SECONDS:g} s and "
        f"{config.concurrency} are on their way at a time"
    )
    return lines
