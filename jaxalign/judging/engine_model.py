"""A model in this process that answers: the engine, asked as a judge is.

It is loaded when the first answer is wanted that the store does not have. Equal
questions that differ in their sample alone are one request of the engine: the prompt
and its pictures are read once. An answer depends on its question, its sample and the
seed, not on what else is answered.

A request without messages is of a plain text, its subject's prompt, which is gone on
with as it is.
"""

import asyncio
import contextlib
import dataclasses
import itertools
import math
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxalign.checkpoints import adapter_files, contents, fastest, runs
from jaxalign.checkpoints.load import DType
from jaxalign.checkpoints.renderer import max_pixels_of, template_kwargs_of
from jaxalign.data.images import NamedPictures
from jaxalign.data.records import Prompt
from jaxalign.errors import UserError
from jaxalign.generation import text_model
from jaxalign.generation.completions import Sampling
from jaxalign.generation.engine import Completion, Engine, Request, completed
from jaxalign.judging.in_process import prompt_of, seen
from jaxalign.judging.judge import JudgeRequest, Verdict, request_key
from jaxalign.models.quantised import Quantize
from jaxalign.parallel.mesh import MeshConfig


__all__ = ["EngineModel"]

_NAMES = {"max_tokens": "max_new_tokens"}
_OF_ENDPOINTS = ("logprobs", "top_logprobs")


class _Group(NamedTuple):
    """A question with the samples of it that are wanted."""

    request: JudgeRequest
    """Of the first sample."""
    numbers: dict[int, int]
    """From a sample to the number of its request."""


class EngineModel:
    """See the module.

    Args:
      model: Hugging Face directory or id.
      pictures: of the questions.
      adapter: PEFT directory, exported hybrid or run directory on top of the model.
      dtype: of weights and computation.
      kept_dtype: what ``fastest`` was when answers were made before.
      quantize: how frozen linear weights are held.
      max_pixels: of a picture; larger ones are made smaller.
      chat_template_kwargs: what the chat template is given.
      batch_slots: answers that are made at the same time.
      mesh: how the devices are arranged.
    Raises:
      UserError: there is no such checkpoint.
    Example::

      model = EngineModel("smollm2", NamedPictures())
      async for number, answer in model.grade(requests):
          print(number, answer.value["text"])
    """

    def __init__(
        self,
        model: str,
        pictures: NamedPictures,
        *,
        adapter: str | None = None,
        dtype: DType = "float32",
        kept_dtype: str | None = None,
        quantize: Quantize | None = None,
        max_pixels: int | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        batch_slots: int = 64,
        mesh: MeshConfig | None = None,
    ):
        dtype = fastest.resolve(dtype, model, kept=kept_dtype)
        options = dict(template_kwargs_of(chat_template_kwargs, adapter))
        pixels = max_pixels_of(max_pixels, adapter)
        self._model, self._adapter = model, adapter
        self._mesh, self._batch_slots = mesh or MeshConfig(), batch_slots
        self._loading: dict[str, Any] = {
            "template_kwargs": options,
            "dtype": dtype,
            "quantize": quantize,
            "mesh": self._mesh,
            "max_pixels": pixels,
        }
        self._pictures = pictures
        self._made: text_model.TextModel | None = None
        self._engine: Engine | None = None
        self._expected: Iterable[JudgeRequest] = ()
        self._settings: dict[str, Any] = {
            "model": contents.fingerprint(model),
            "tokenizer": text_model.fingerprint(model),
            "dtype": dtype,
        }
        given = {"quantize": quantize, "max_pixels": pixels}
        given["chat_template_kwargs"] = options or None
        self._settings |= {k: v for k, v in given.items() if v is not None}
        if adapter is not None:
            self._settings["adapter"] = adapter_files.fingerprint(Path(adapter))
            if (step := runs.latest_step(adapter)) is not None:
                self._settings["adapter_step"] = step

    @property
    def settings(self) -> Mapping[str, Any]:
        """What answers depend on beside the question."""
        return self._settings

    def expect(self, requests: Iterable[JudgeRequest]) -> None:
        """Say what will be asked in all, here and elsewhere, now and before.

        The engine is then made for all of it, so that a part of a run, or one that goes
        on, computes with the same programs as the whole, and gives the same bits.
        """
        self._expected = requests  # looked at when there is something to ask

    async def grade(
        self, requests: Iterable[JudgeRequest]
    ) -> AsyncIterator[tuple[int, Verdict]]:
        """Yield (number of the request, answer) as they are ready.

        Raises:
          UserError: the model cannot be loaded, or its logits are not finite.
        """
        groups = _grouped(requests)
        if not groups:
            return
        made = await asyncio.to_thread(self._loaded)
        answers = self._answers(groups, made)
        while (one := await asyncio.to_thread(next, answers, None)) is not None:
            yield one

    def _loaded(self) -> text_model.TextModel:
        if self._made is None:
            self._made = text_model.load(self._model, self._adapter, **self._loading)
        return self._made

    def _answers(
        self, groups: Sequence[_Group], made: text_model.TextModel
    ) -> Iterator[tuple[int, Verdict]]:
        """Yield (number, answer); what cannot be asked has failed."""
        fitting: list[tuple[_Group, Request]] = []
        for group in groups:
            try:
                fitting.append((group, self._request(group, made)))
            except UserError as error:
                yield from _failed(group, str(error))
        if not fitting:
            return
        engine = self._engine_of(fitting, made)
        asked: list[tuple[_Group, Request]] = []
        for group, request in fitting:
            try:
                engine.check(request)
                asked.append((group, request))
            except UserError as error:
                yield from _failed(group, str(error))
        for index, found in completed(engine, [request for _, request in asked]):
            group, request = asked[index]
            for sample, number in group.numbers.items():
                yield number, _verdict(found[sample], request)

    def _request(self, group: _Group, made: text_model.TextModel) -> Request:
        """Return what the engine is asked.

        Raises:
          UserError: the template refuses it, or it shows pictures to a model that does
            not see.
        """
        request, subject = group.request, group.request.subject
        shown = {name: self._pictures.picture(name) for name in subject.images}
        if request.messages:
            prompt = prompt_of(request.messages, shown, made.renderer)
            prompt = prompt._replace(template_kwargs=subject.template_kwargs or {})
        else:
            images = seen(subject.images, shown, made.renderer)
            assert isinstance(subject.prompt, str)
            prompt = Prompt(subject.prompt, None, "the request", images=images)
        seed = int(request_key(request, self._settings)[:8], 16)
        options = dict(request.options or {})
        sampling = Sampling(
            **{
                _NAMES.get(name, name): value
                for name, value in options.items()
                if name not in (*_OF_ENDPOINTS, "seed")
            },
            num_samples=max(group.numbers) + 1,
            seed=seed,
        )
        ends = made.ends(sampling.stop)
        return text_model.as_request(made.renderer, prompt, sampling, ends)

    def _engine_of(
        self, fitting: Sequence[tuple[_Group, Request]], made: text_model.TextModel
    ) -> Engine:
        """Return an engine with room for requests, and for all that were expected."""
        requests = [request for _, request in fitting]
        wanted = sum(len(group.numbers) for group, _ in fitting)
        expected, self._expected = _grouped(self._expected), ()
        if len(expected) > len(fitting):
            wanted = max(wanted, sum(len(group.numbers) for group in expected))
            for group in expected:
                with contextlib.suppress(UserError):  # it is none that is ever asked
                    requests.append(self._request(group, made))
        longest = max(len(r.tokens) + r.sampling.max_new_tokens for r in requests)
        if self._engine is None or self._engine.length < longest:
            self._engine = None  # its memory is free before the next one's is taken
            rows = self._mesh.rows
            slots = min(self._batch_slots, wanted)
            self._engine = Engine(
                made.model,
                made.variables,
                slots=-(-slots // rows) * rows,
                length=longest,
                text_of=text_model.text_with(made.tokenizer),
            )
        return self._engine


def _grouped(requests: Iterable[JudgeRequest]) -> list[_Group]:
    """Return requests by their question."""
    groups: dict[str, _Group] = {}
    for number, request in enumerate(requests):
        first = dataclasses.replace(request, vote=0)
        key = request_key(first, {})
        group = groups.setdefault(key, _Group(first, {}))
        group.numbers[request.vote] = number
    return list(groups.values())


def _failed(group: _Group, reason: str) -> Iterator[tuple[int, Verdict]]:
    return zip(
        group.numbers.values(), itertools.repeat(Verdict(None, reason)), strict=False
    )


def _verdict(made: Completion, request: Request) -> Verdict:
    """Return an answer in the form of an endpoint's."""
    logps = [float(logp) for logp in made.logps]
    value = {
        "text": made.text,
        "finish_reason": made.finish_reason,
        "top_logprobs": None,
        "mean_logp": math.fsum(logps) / len(logps) if logps else None,
    }
    return Verdict(
        value,
        raw=made.text,
        prompt_tokens=len(request.tokens),
        completion_tokens=len(made.tokens),
    )
