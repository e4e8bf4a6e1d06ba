"""A model in this process that answers: the engine, asked as a judge is.

It is loaded when the first answer is wanted that the store does not have. Equal
questions that differ in their sample alone are one request of the engine: the prompt
and its pictures are read once. An answer depends on its question, its sample and the
seed, not on what else is answered.
"""

import asyncio
import dataclasses
import itertools
import math
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxalign.checkpoints import adapter_files, contents, fastest, runs
from jaxalign.checkpoints.renderer import max_pixels_of, template_kwargs_of
from jaxalign.data.images import NamedPictures
from jaxalign.errors import UserError
from jaxalign.evaluation import run_files
from jaxalign.evaluation.config import EvalConfig
from jaxalign.generation import text_model
from jaxalign.generation.completions import Sampling
from jaxalign.generation.engine import Completion, Engine, Request, completed
from jaxalign.judging.in_process import prompt_of
from jaxalign.judging.judge import JudgeRequest, Verdict, request_key


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
      config: of the command: model, adapter, dtype and so on.
      pictures: of the questions.
    Raises:
      UserError: there is no such checkpoint.
    """

    def __init__(self, config: EvalConfig, pictures: NamedPictures):
        assert config.model is not None
        adapter = config.adapter
        kept = run_files.settings_of(Path(config.out)).get("model", {}).get("dtype")
        dtype = fastest.resolve(config.dtype, config.model, kept=kept)
        options = dict(template_kwargs_of(config.chat_template_kwargs, adapter))
        pixels = max_pixels_of(config.max_pixels, adapter)
        self._config = dataclasses.replace(
            config, dtype=dtype, chat_template_kwargs=options, max_pixels=pixels
        )
        self._pictures = pictures
        self._made: text_model.TextModel | None = None
        self._engine: Engine | None = None
        self._settings: dict[str, Any] = {
            "model": contents.fingerprint(config.model),
            "tokenizer": text_model.fingerprint(config.model),
            "dtype": dtype,
        }
        given = {"quantize": config.quantize, "max_pixels": pixels}
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
            config = self._config
            assert config.model is not None
            self._made = text_model.load(
                config.model,
                config.adapter,
                template_kwargs=config.chat_template_kwargs,
                dtype=config.dtype,
                quantize=config.quantize,
                mesh=config.mesh,
                max_pixels=config.max_pixels,
            )
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
        lengths = [len(r.tokens) + r.sampling.max_new_tokens for _, r in fitting]
        if not lengths:
            return
        wanted = sum(len(group.numbers) for group, _ in fitting)
        engine = self._engine_of(max(lengths), wanted, made)
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
        request = group.request
        names = request.subject.images
        shown = {name: self._pictures.picture(name) for name in names}
        prompt = prompt_of(request.messages, shown, made.renderer)
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
        self, longest: int, wanted: int, made: text_model.TextModel
    ) -> Engine:
        if self._engine is None or self._engine.length < longest:
            self._engine = None  # its memory is free before the next one's is taken
            rows = self._config.mesh.rows
            slots = min(self._config.batch_slots, wanted)
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
