"""A judge that is a checkpoint in this process and writes its replies.

It is asked what an endpoint is asked, and its tokens are drawn under the schema of the
reply (see ``generation.structure``), so that whatever it knows of JSON every reply that
ends can be read. A reply that gets too long is a failure, never a part of one. If it
sees, it is shown the pictures that a request shows.

A request has a slot, a length and a seed of its own, so a verdict does not depend on
what else is judged.
"""

import itertools
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from jaxalign.checkpoints import contents
from jaxalign.checkpoints.load import DType
from jaxalign.data.picture import Picture
from jaxalign.errors import UserError
from jaxalign.generation import text_model
from jaxalign.generation.engine import (
    Completion,
    Engine,
    Request,
    Sampling,
    completed,
)
from jaxalign.generation.steering import Steering
from jaxalign.generation.structure import json_schema
from jaxalign.judging import prompts
from jaxalign.judging.in_process import graded, pictures_of, prompt_of
from jaxalign.judging.judge import JudgeRequest, Verdict, request_key
from jaxalign.parallel.mesh import MeshConfig


__all__ = ["WritingJudge"]


_LEAST = 512
"""Tokens of the shortest slots; others have a power of two times as many."""

_CACHED = 2**15
"""Tokens that slots hold together, as far as there is more than one."""

_REPLY_TOKENS = 1024
"""Most tokens of a reply where nobody says."""


class _Asked(NamedTuple):
    """A request as the engine takes it, and where it comes from."""

    number: int
    request: Request
    length: int
    """Of the slots that it goes to."""


class WritingJudge:
    """See the module.

    Args:
      model: Hugging Face directory or id; loaded when the first request comes.
      temperature: of the sampling; 0 takes the most probable token that fits.
      max_reply_tokens: the most tokens of one reply; None is 1024.
      dtype: of the weights and of the computation.
      mesh: how the devices are arranged.
      batch_slots: replies that are written at the same time.
      load_image: gives the bytes of the picture that a reference names, for a
        checkpoint that sees.
    Raises:
      UserError: the checkpoint, or its tokenizer, cannot be read.
    Example::

      judge = WritingJudge("smollm2", temperature=0.7, batch_slots=8)
      async for number, verdict in judge.grade(requests):
          print(number, verdict.value or verdict.failure)
    """

    def __init__(
        self,
        model: str,
        *,
        temperature: float | None = 0.0,
        max_reply_tokens: int | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        dtype: DType = "float32",
        mesh: MeshConfig | None = None,
        batch_slots: int = 16,
        load_image: Callable[[str], bytes] | None = None,
    ):
        self._load_image = load_image
        self._model, self._mesh = model, mesh or MeshConfig()
        self._dtype: DType = dtype
        self._temperature = 1.0 if temperature is None else temperature
        self._most = max_reply_tokens or _REPLY_TOKENS
        self._batch_slots = batch_slots
        self._made: text_model.TextModel | None = None
        self._engine: Engine | None = None
        self._settings: dict[str, Any] = {
            "judge": "local",
            "version": 1,
            "model": contents.fingerprint(model),
            "text": text_model.fingerprint(model),
            "method": "json",
            "dtype": dtype,
            "temperature": self._temperature,
            "max_reply_tokens": self._most,
        }

        self._template_kwargs = template_kwargs
        if template_kwargs:
            self._settings["chat_template_kwargs"] = dict(template_kwargs)

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
        if self._made is None:
            self._made = text_model.load(
                self._model,
                template_kwargs=self._template_kwargs,
                dtype=self._dtype,
                mesh=self._mesh,
            )
        shown = pictures_of(requests, self._made.renderer, self._load_image)
        verdicts: dict[int, Verdict] = {}
        asked: list[_Asked] = []
        for number, request in enumerate(requests):
            try:
                asked.append(self._asked(number, request, self._made, shown))
            except UserError as error:
                verdicts[number] = Verdict(None, failure=f"local: {error}")
        asked.sort(key=lambda one: one.length)
        for length, group in itertools.groupby(asked, key=lambda one: one.length):
            engine, fitting = self._engine_of(length, self._made), []
            for one in group:
                try:
                    engine.check(one.request)
                    fitting.append(one)
                except UserError as error:
                    verdicts[one.number] = Verdict(None, failure=f"local: {error}")
            found = completed(engine, [one.request for one in fitting])
            for index, (reply,) in found:
                number = fitting[index].number
                read = len(fitting[index].request.tokens)
                verdicts[number] = self._verdict(requests[number], reply, read)
        return [verdicts[number] for number in range(len(requests))]

    def _asked(
        self,
        number: int,
        request: JudgeRequest,
        made: text_model.TextModel,
        shown: Mapping[str, Picture],
    ) -> _Asked:
        """Return a request as the engine takes it.

        Raises:
          UserError: it shows images to a checkpoint that does not see, or the template
            refuses it.
        """
        prompt = prompt_of(request.messages, shown, made.renderer)
        # Of its own, whatever is judged before and beside it.
        seed = int(request_key(request, self._settings)[:8], 16)
        sampling = Sampling(
            max_new_tokens=self._most, temperature=self._temperature, seed=seed
        )
        structure = json_schema(request.schema, one_line=True)
        steering = Steering(structure=structure)
        asked = text_model.as_request(
            made.renderer, prompt, sampling, made.stop_tokens, steering=steering
        )
        length = _LEAST
        while length < len(asked.tokens) + self._most:
            length *= 2
        return _Asked(number, asked, length)

    def _engine_of(self, length: int, made: text_model.TextModel) -> Engine:
        """Return an engine with slots of a length; one is kept."""
        if self._engine is None or self._engine.length != length:
            rows = self._mesh.rows
            slots = max(min(self._batch_slots, _CACHED // length), 1)
            self._engine = None  # its memory is free before the next one's is taken
            self._engine = Engine(
                made.model,
                made.variables,
                slots=-(-slots // rows) * rows,
                length=length,
                text_of=text_model.text_with(made.tokenizer),
                tokenizer=made.tokenizer,
            )
        return self._engine

    def _verdict(self, request: JudgeRequest, reply: Completion, read: int) -> Verdict:
        """Read a reply as that of an endpoint is read."""
        value, failure = None, None
        if reply.finish_reason == "length":
            failure = (
                f"cut off: the reply has {self._most} tokens and no end (see "
                "judge.max_reply_tokens)"
            )
        elif reply.finish_reason == "error":
            failure = "local: the schema became too much for the library on the way"
        else:
            value, problem = prompts.parse(reply.text, request.schema)
            failure = None if problem is None else f"outside the schema: {problem}"
        return Verdict(
            value,
            failure=failure,
            raw=reply.text,
            prompt_tokens=read,
            completion_tokens=len(reply.tokens),
        )
