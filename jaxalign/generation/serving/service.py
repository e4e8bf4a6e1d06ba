"""What a server needs beside HTTP: options, the engine, requests made of texts."""

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import functools
import os
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from jaxalign.checkpoints.load import DType
from jaxalign.configs import check_fields
from jaxalign.data.columns import check_template_kwargs
from jaxalign.data.records import Prompt
from jaxalign.data.tokenizer import special_tokens
from jaxalign.errors import UserError
from jaxalign.generation import text_model
from jaxalign.generation.engine import Engine, Request, Sampling
from jaxalign.generation.serving import access, fetching
from jaxalign.generation.serving.driver import Call, Driver, Overloaded
from jaxalign.generation.serving.metrics import Metrics
from jaxalign.generation.serving.pictures import Sources, has_pictures, looked_up
from jaxalign.generation.serving.wire import ApiError, ParsedRequest
from jaxalign.models.quantised import Quantize
from jaxalign.parallel.mesh import MeshConfig


__all__ = ["ServeConfig", "Service", "make_engine"]

_T = TypeVar("_T")

_COMPLETION_TOKENS = 16
"""What a completion may have where the request does not say, as OpenAI has it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Serving a model.

    Attributes:
      model: Hugging Face checkpoint: a directory, or an id on the hub,
        ``owner/name`` or ``owner/name@revision``.
      adapter: PEFT directory, exported hybrid or run directory on top of the model.
      host: address to listen on; the default is reached from this machine only.
      port: 0 takes any that is free.
      model_name: what requests call the model, also spelt ``--served_model_name``;
        default its id or directory's name.
      api_key_file: file that holds the key which requests must have; default the
        environment variable JAXALIGN_API_KEY, and where that is not there no key.
        ``/health`` is open to all.
      allowed_origins: origins whose pages may read answers in a browser (CORS),
        ``'["https://host"]'``; ``'["*"]'`` for all.
      chat_template_kwargs: what the chat template is given beside the conversations,
        such as ``{"enable_thinking": false}``; a request's own come first. Default as
        the run that ``adapter`` is was trained.
      image_dir: folder whose files messages may show; default none, so that pictures
        come as data URLs.
      fetch_images: whether pictures at http and https URLs are fetched: from public
        addresses alone, 20 MB at most, in 10 seconds.
      max_pixels: of a picture; larger ones are made smaller. Default as the run that
        ``adapter`` is was trained, elsewhere what the checkpoint's own files say.
      batch_slots: completions that are made at the same time.
      max_length: most tokens of a prompt with its completion.
      max_waiting: completions that may wait for a slot; what is more gets 429.
      max_new_tokens: most tokens of a chat completion, where the request does not say;
        one that has to keep to a structure has all that are left, as a part is no use.
      dtype: of weights and computation; ``auto`` keeps weights as they are stored,
        ``fastest`` is what this device multiplies faster.
      cache_dtype: of the keys and values of earlier tokens; default that of the
        computation, on a CPU float32.
      quantize: how frozen linear weights are held, see ``jaxalign train``; default as
        the run that ``adapter`` is was trained, elsewhere ``none``.
      mesh: how the devices are arranged.
    """

    model: str
    adapter: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    model_name: str | None = None
    api_key_file: str | None = None
    allowed_origins: tuple[str, ...] = ()
    chat_template_kwargs: dict[str, Any] | None = None
    image_dir: str | None = None
    fetch_images: bool = False
    max_pixels: int | None = None
    batch_slots: int = 16
    max_length: int = 2048
    max_waiting: int = 256
    max_new_tokens: int = 256
    dtype: DType = "float32"
    cache_dtype: DType | None = None
    quantize: Quantize | None = None
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)

    def __post_init__(self) -> None:
        check_fields(self)
        text_model.check_slots(self.batch_slots, self.cache_dtype, self.mesh)
        for name, low in (("max_length", 2), ("max_waiting", 0), ("max_new_tokens", 1)):
            if getattr(self, name) < low:
                raise UserError(
                    f"{name} must be at least {low}: got {getattr(self, name)}"
                )
        if not 0 <= self.port < 2**16:
            raise UserError(f"port must be in [0, 65535]: got {self.port}")
        if self.model_name == "":
            raise UserError("model_name is empty: leave it out")
        access.check_origins(self.allowed_origins)
        check_template_kwargs(self.chat_template_kwargs or {}, "chat_template_kwargs")
        if self.image_dir is not None and not Path(self.image_dir).is_dir():
            raise UserError(
                f"image_dir {self.image_dir} is not a directory: give the one that "
                "pictures lie in"
            )


def make_engine(config: ServeConfig, made: text_model.TextModel) -> Engine:
    """Return an engine that has made a token, so that what cannot run ends here."""
    engine = Engine(
        made.model,
        made.variables,
        slots=config.batch_slots,
        length=config.max_length,
        cache_dtype=config.cache_dtype,
        text_of=text_model.text_with(made.tokenizer),
        tokenizer=made.tokenizer,
    )
    engine.submit(Request([0], Sampling(max_new_tokens=1)))
    while engine.busy:
        engine.step()
    return engine


class Service:
    """What the server's handlers share."""

    def __init__(self, config: ServeConfig, made: text_model.TextModel, engine: Engine):
        self.config, self.made = config, made
        self.sees = made.renderer.patcher is not None
        """Whether messages may have pictures."""
        if not self.sees and (config.image_dir is not None or config.fetch_images):
            raise UserError(
                f"image_dir and fetch_images have no effect: {made.name} does not see. "
                "Leave them out"
            )
        self._sources = Sources(
            None if config.image_dir is None else Path(config.image_dir),
            fetching.fetch if config.fetch_images else None,
        )
        self.name = config.model_name or made.name
        self.driver = Driver(engine, most=config.batch_slots + config.max_waiting)
        self.draining = False
        """Whether new requests are sent away."""
        self.answering = 0
        """Requests that have not been answered to the end."""
        self.metrics = Metrics(
            running=lambda: engine.running,
            waiting=lambda: max(self.driver.texts - engine.running, 0),
        )
        # One thread: tokenizers are not made for several, and it is enough.
        self._tokenising = concurrent.futures.ThreadPoolExecutor(1, "tokenizer")
        self._looking_up = concurrent.futures.ThreadPoolExecutor(8, "pictures")

    @contextlib.asynccontextmanager
    async def running(self, _: Any = None) -> AsyncIterator[None]:
        """Run the engine's thread."""
        self.driver.start()
        try:
            yield
        finally:
            await asyncio.to_thread(self.driver.stop)
            self._tokenising.shutdown()
            self._looking_up.shutdown(wait=False)

    def check_open(self) -> None:
        """Refuse a request that nobody would answer.

        Raises:
          ApiError: 503.
        """
        if self.driver.error is not None:
            raise ApiError(self.driver.error, status=503, code="engine_failed")
        if self.draining:
            raise ApiError("the server is draining", status=503, code="draining")

    def check_model(self, name: str) -> None:
        """Refuse another model's name.

        Raises:
          ApiError: 404.
        """
        if name != self.name:
            shown = name if len(name) <= 80 else f"{name[:77]}..."
            raise ApiError(
                f"the model {shown!r} is not served here: expected {self.name!r}",
                status=404,
                param="model",
                code="model_not_found",
            )

    async def requests_of(self, asked: ParsedRequest) -> list[Request]:
        """Turn texts into tokens, and check all that the engine would refuse.

        Raises:
          ApiError: 400.
        """
        prompts = [await self.looked_up(prompt) for prompt in asked.prompts]
        asked = asked._replace(prompts=tuple(prompts))
        found = await self.with_tokenizer(self._requests_of, asked)
        self.metrics.count_prompt(sum(len(request.tokens) for request in found))
        return found

    async def looked_up(self, prompt: Any) -> Any:
        """Return a prompt with its pictures, which may have to be fetched.

        Raises:
          ApiError: see ``pictures.looked_up``.
        """
        if not isinstance(prompt, Prompt) or not has_pictures(prompt):
            return prompt
        look_up = functools.partial(looked_up, prompt, self._sources, sees=self.sees)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._looking_up, look_up)

    async def with_tokenizer(self, fn: Callable[..., _T], *args: Any) -> _T:
        """Call what uses the tokenizer, in its thread."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._tokenising, fn, *args)

    def _requests_of(self, asked: ParsedRequest) -> list[Request]:
        found = []
        for prompt in asked.prompts:
            try:
                request = self._read(prompt)
                options = {"seed": int.from_bytes(os.urandom(4)), **asked.sampling}
                left = self._tokens_left(len(request.tokens), asked)
                sampling = Sampling(**{**options, "max_new_tokens": left})
                request = request._replace(
                    sampling=sampling,
                    stop_tokens=self._ends(asked, sampling.stop),
                    ranked=asked.logprobs or 0,
                    judged=asked.echo and asked.logprobs is not None,
                    steering=asked.steering,
                )
                self.driver.engine.check(request)
            except UserError as error:
                raise ApiError(str(error), param=_param(error, asked)) from None
            found.append(request)
        return found

    def _read(self, prompt: Prompt | tuple[int, ...]) -> Request:
        """Return a prompt's tokens and pictures, which are opened here.

        Raises:
          UserError: it cannot be rendered, or a picture not be opened.
        """
        if not isinstance(prompt, Prompt):
            return Request(prompt)
        _check_effort(prompt, self.made.tokenizer)
        renderer, ends = self.made.renderer, frozenset[int]()
        return text_model.as_request(renderer, prompt, Sampling(), ends, open_now=True)

    def _ends(self, asked: ParsedRequest, stop: Sequence[str]) -> frozenset[int]:
        """Return the tokens that end a completion."""
        ends = self.made.ends(stop)
        if asked.ignore_eos:
            ends = special_tokens(self.made.tokenizer, stop)
        return ends | frozenset(asked.stop_tokens)

    def _tokens_left(self, length: int, asked: ParsedRequest) -> int:
        """Return how long a completion may get.

        Raises:
          ApiError: the prompt leaves no room, or less than what was asked for.
        """
        most = self.config.max_length
        given = asked.sampling.get("max_new_tokens")
        if length + (given or 1) > most:
            raise ApiError(
                f"the model's maximum context length is {most} tokens: got "
                f"{length} in the prompt and {given or 'at least 1'} for the "
                "completion",
                param="messages" if asked.is_chat else "prompt",
                code="context_length_exceeded",
            )
        default = self.config.max_new_tokens if asked.is_chat else _COMPLETION_TOKENS
        if asked.is_chat and asked.structure_field is not None:
            default = most
        return given or min(default, most - length)

    def submit(self, requests: list[Request]) -> Call:
        """Hand requests to the engine.

        Raises:
          ApiError: 429.
          EngineFailed: nobody would answer them.
        """
        try:
            return self.driver.submit(requests)
        except Overloaded as error:
            raise ApiError(str(error), status=429, code="rate_limit_exceeded") from None

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        """Count a request as being answered."""
        self.answering += 1
        try:
            yield
        finally:
            self.answering -= 1


def _param(error: UserError, asked: ParsedRequest) -> str | None:
    """Return the field that an error of the engine is of."""
    text = str(error)
    if "cannot be followed" in text:
        return asked.structure_field
    first = text.split()[0]
    if first.startswith("messages["):
        return first.rstrip(":")
    if first in ("logit_bias", "min_tokens"):
        return first
    return "messages" if asked.is_chat else "prompt"


def _check_effort(prompt: Prompt, tokenizer: Any) -> None:
    """Refuse an effort that the chat template would not tell the model of.

    Raises:
      ApiError: 400.
    """
    name = "reasoning_effort"
    template = str(getattr(tokenizer, "chat_template", ""))
    if name in prompt.template_kwargs and name not in template:
        raise ApiError(
            f"{name} is not supported: the model's chat template does not look at it. "
            "Leave it out",
            param=name,
            code="unsupported_parameter",
        )
