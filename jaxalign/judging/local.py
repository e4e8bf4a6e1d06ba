"""A judge that is a checkpoint in this process: the probabilities of its answers.

It samples nothing. A question with a few answers (``verify``, ``compare``, ``grade``
and other labels) gets the most probable one. Segments are scored in one of two ways:
``choice`` asks for 0 to 4 on each aspect and takes the mean of these under the
probabilities that the checkpoint gives them; ``likelihood`` asks nothing and takes
4 exp(mean log p) over the segment's tokens, given the prompt and the response so far,
the largest score for a text that the checkpoint would have written itself.

A checkpoint that sees is shown the pictures of what it judges; one that does not
refuses them, request by request.

Every text has a row of its own, so a verdict does not depend on what else is judged.
"""

import itertools
import json
import math
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from jaxalign.checkpoints import contents
from jaxalign.checkpoints.load import DType
from jaxalign.checkpoints.policy import open_policy
from jaxalign.checkpoints.renderer import open_renderer
from jaxalign.data import chat
from jaxalign.data.images import with_images
from jaxalign.data.picture import Picture
from jaxalign.data.records import Message, Record, Segment
from jaxalign.data.rendering import Renderer
from jaxalign.errors import UserError
from jaxalign.generation import answer_logps, question_pictures
from jaxalign.generation.answer_logps import PromptWithAnswers
from jaxalign.judging import wording
from jaxalign.judging.config import LIKELIHOOD
from jaxalign.judging.in_process import graded, pictures_of, prompt_of, seen
from jaxalign.judging.judge import JudgeRequest, Subject, Verdict
from jaxalign.judging.prompts import MAX_SCORE
from jaxalign.parallel.mesh import MeshConfig, make_mesh
from jaxalign.types import Model, Variables


__all__ = ["LocalJudge", "Method"]

Method = Literal["likelihood", "choice"]

_TEMPLATE = "score_segment"


_Found = Sequence[Sequence[np.ndarray]]


class _LocalQuestions(NamedTuple):
    """A request as questions, and what makes a value of what comes back."""

    questions: list[PromptWithAnswers]
    value: Callable[[_Found], Any]


class LocalJudge:
    """See the module.

    Args:
      model: Hugging Face directory or id; loaded when the first request comes.
      method: how segments are scored.
      own: directory of wording of one's own.
      template_kwargs: what the chat template is given.
      dtype: of the weights and of the computation.
      mesh: how the devices are arranged.
      batch_rows: texts that are computed at the same time.
      load_image: gives the bytes of the picture that a reference names, for a
        checkpoint that sees.
    """

    def __init__(
        self,
        model: str,
        *,
        method: Method = LIKELIHOOD,
        own: Path | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        dtype: DType = "float32",
        mesh: MeshConfig | None = None,
        batch_rows: int = 4,
        load_image: Callable[[str], bytes] | None = None,
    ):
        self._model, self._method, self._own = model, method, own
        self._load_image = load_image
        self._dtype, self._mesh = dtype, mesh or MeshConfig()
        self._batch_rows = -(-batch_rows // self._mesh.rows) * self._mesh.rows
        self._settings = {
            "judge": "local",
            "version": 1,
            "model": contents.fingerprint(model),
            "method": method,
            "dtype": dtype,
        }
        self._template_kwargs = template_kwargs
        if template_kwargs:
            self._settings["chat_template_kwargs"] = dict(template_kwargs)
        if own is not None:
            # Templates are in the messages of requests, but for this one.
            self._settings["wording"] = wording.read("templates", _TEMPLATE, own)
        self._loaded: tuple[Model, Variables, Renderer] | None = None

    @property
    def settings(self) -> Mapping[str, Any]:
        """What verdicts depend on."""
        return self._settings

    def grade(
        self, requests: Iterable[JudgeRequest]
    ) -> AsyncIterator[tuple[int, Verdict]]:
        """Yield (number of the request, verdict), in order."""
        return graded(requests, self._verdicts)

    def _verdicts(self, requests: Sequence[JudgeRequest]) -> list[Verdict]:
        if self._loaded is None:
            mesh = make_mesh(self._mesh)
            renderer = open_renderer(self._model, self._template_kwargs)
            made = open_policy(self._model, None, dtype=self._dtype, mesh=mesh)
            self._loaded = made.checkpoint.model, made.variables, renderer
        model, variables, renderer = self._loaded
        pictures = pictures_of(requests, renderer, self._load_image)
        questions: list[_LocalQuestions | str] = []
        for request in requests:
            try:
                questions.append(self._questions(request, renderer, pictures))
            except UserError as error:
                questions.append(str(error))
        answers = iter(
            answer_logps.answer_logps(
                model,
                variables,
                [
                    q
                    for one in questions
                    if isinstance(one, _LocalQuestions)
                    for q in one.questions
                ],
                row_length=None,
                batch_rows=self._batch_rows,
            )
        )
        verdicts = []
        for one in questions:
            if isinstance(one, str):
                verdicts.append(Verdict(None, failure=f"local: {one}"))
                continue
            mine = list(itertools.islice(answers, len(one.questions)))
            read = sum(len(q.prompt) + sum(map(len, q.answers)) for q in one.questions)
            verdicts.append(Verdict(one.value(mine), prompt_tokens=read))
        return verdicts

    def _questions(
        self,
        request: JudgeRequest,
        renderer: Renderer,
        pictures: Mapping[str, Picture],
    ) -> _LocalQuestions:
        """Return a request as questions.

        Raises:
          UserError: it asks for a text, cannot be told in tokens, or shows images to a
            checkpoint that does not see.
        """
        if request.task == "scores" and self._method == LIKELIHOOD:
            return _likelihood(request.subject, renderer, pictures)
        if request.task == "scores":
            return self._choices(request.subject, renderer, pictures)
        if (choice := _choice(request.schema)) is None:
            raise UserError(
                f"it writes no text, as {request.task} asks for; judge.method json does"
            )
        field, answers = choice
        prompt = prompt_of(request.messages, pictures, renderer)
        question = answer_logps.question(prompt, answers, renderer)

        def value(found: _Found) -> Any:
            # By the mean of its tokens: the answers are not of one length.
            best = int(np.argmax(answer_logps.weighed(found[0]).mean_logps))
            return {field: answers[best]}

        return _LocalQuestions([question], value)

    def _choices(
        self, subject: Subject, renderer: Renderer, pictures: Mapping[str, Picture]
    ) -> _LocalQuestions:
        """Ask for each segment and aspect by itself."""
        digits = [str(score) for score in range(MAX_SCORE + 1)]
        places = [
            (segment, aspect)
            for segment in range(len(subject.spans))
            for aspect in subject.aspects
        ]
        questions = []
        for segment, aspect in places:
            start, end = subject.spans[segment]
            values = {
                "rubric": wording.rubric(aspect, self._own),
                "aspect": aspect,
                "material": _material(subject, start, end),
            }
            system, user = wording.messages(_TEMPLATE, values, self._own)
            shown = with_images(user, subject.images)
            prompt = prompt_of((system, shown), pictures, renderer)
            questions.append(answer_logps.question(prompt, digits, renderer))

        def value(found: _Found) -> Any:
            scores: list[dict[str, float]] = [{} for _ in subject.spans]
            for (segment, aspect), mine in zip(places, found, strict=True):
                mean = float(
                    answer_logps.weighed(mine).probs @ np.arange(MAX_SCORE + 1)
                )
                scores[segment][aspect] = round(mean, 4)
            return {"segments": scores}

        return _LocalQuestions(questions, value)


def _choice(schema: Mapping[str, Any]) -> tuple[str, tuple[str, ...]] | None:
    """Return the field and the answers that a reply may be, None if it is a text."""
    fields = schema.get("properties", {})
    if len(fields) != 1:
        return None
    ((name, kind),) = fields.items()
    return (name, tuple(kind["enum"])) if "enum" in kind else None


def _likelihood(
    subject: Subject, renderer: Renderer, pictures: Mapping[str, Picture]
) -> _LocalQuestions:
    """Score segments by what the checkpoint would have written."""
    given = subject.prompt
    turns = given if isinstance(given, str) else tuple(Message(**t) for t in given)
    none = {LIKELIHOOD: 0.0}
    segments = tuple(Segment(start=a, end=b, scores=none) for a, b in subject.spans)
    record = Record(
        *(turns, subject.response, None, segments, None, "response"),
        template_kwargs=subject.template_kwargs or {},
        images=seen(subject.images, pictures, renderer),
    )
    (pair,) = chat.tokenize([record], renderer, end_of_turn=False)
    branch = pair.chosen
    prompt = [*pair.prompt.tolist(), *branch.tokens[: branch.lead].tolist()]
    shown = question_pictures.pictures_of(
        *(pair.images, pair.layouts, pair.feature_places, pair.positions),
        renderer.patcher,
    )
    question = PromptWithAnswers(prompt, [branch.tokens[branch.lead :].tolist()], shown)

    def value(found: _Found) -> Any:
        logps = found[0][0].astype(np.float64)
        scores = []
        for segment in range(len(segments)):
            mine = logps[branch.segments == segment]
            # A segment whose characters all stand in its neighbours' tokens has none.
            mean = float((mine if len(mine) else logps).mean())
            scores.append({LIKELIHOOD: round(MAX_SCORE * math.exp(mean), 4)})
        return {"segments": scores}

    return _LocalQuestions([question], value)


def _material(subject: Subject, start: int, end: int) -> str:
    shown = {
        "prompt": subject.prompt,
        "response": subject.response,
        "segment": subject.response[start:end],
    }
    return json.dumps(shown, ensure_ascii=False, indent=1, default=dict)
