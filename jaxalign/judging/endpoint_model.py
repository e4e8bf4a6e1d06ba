"""A model behind an endpoint that is asked for answers, as a judge is for verdicts."""

import dataclasses
from collections.abc import AsyncIterator, Iterable
from typing import Any

from jaxalign.configs import check_fields
from jaxalign.data.images import NamedPictures
from jaxalign.errors import UserError
from jaxalign.judging.config import JudgeConfig
from jaxalign.judging.judge import JudgeRequest, Verdict
from jaxalign.judging.make import make_judge


__all__ = [
    "Endpoint",
    "EndpointConfig",
    "answering_model",
    "endpoint_settings",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EndpointConfig:
    """A model behind an endpoint that speaks OpenAI's chat completions.

    Attributes:
      base_url: up to and with ``/v1``; default that of OpenAI.
      model: the endpoint's name of the model; None: the model is ``--model``.
      key_variable: the environment variable that holds the key, which comes from
        nowhere else.
      concurrency: requests on their way at the same time.
      timeout: seconds that one attempt may take.
      max_attempts: calls that one request may cost before it has failed.
      max_wait: seconds that are waited at most because the endpoint says so.
      max_requests: calls that a run may make, retries included; null is no limit.
      max_total_tokens: tokens that a run may use.
      max_cost: what a run may cost, by the prices below.
      prompt_price: of a million tokens of prompts.
      completion_price: of a million tokens of answers.
      chat_template_kwargs: what the chat template is given, where the server takes it.

    >>> EndpointConfig(model="gpt-4o-mini").as_judge().concurrency
    8
    """

    base_url: str | None = None
    model: str | None = None
    key_variable: str = "OPENAI_API_KEY"
    concurrency: int = 8
    timeout: float = 300.0
    max_attempts: int = 6
    max_wait: float = 600.0
    max_requests: int | None = None
    max_total_tokens: int | None = None
    max_cost: float | None = None
    prompt_price: float = 0.0
    completion_price: float = 0.0
    chat_template_kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        check_fields(self)
        if self.model is not None:
            self.as_judge()
            return
        nothing = {f.name: f.default for f in dataclasses.fields(self)}
        nothing["chat_template_kwargs"] = {}
        given = [name for name, value in vars(self).items() if value != nothing[name]]
        if given:
            raise UserError(
                f"endpoint.model is missing, and endpoint.{given[0]} is given: give "
                "the endpoint's name of the model (for a server of your own, GET "
                "/v1/models lists them)"
            )

    def as_judge(self) -> JudgeConfig:
        """Return the options of the client that asks it, which is that of judges.

        Raises:
          UserError: an option is out of its range, by the name that it has here.
        """
        try:
            return JudgeConfig(name="openai", **vars(self))
        except UserError as error:
            raise UserError(str(error).replace("judge.", "endpoint.")) from None


def endpoint_settings(config: EndpointConfig) -> dict[str, Any]:
    """Return what answers depend on; where the model is served is no part of it.

    >>> endpoint_settings(EndpointConfig(model="gpt-4o-mini"))
    {'endpoint': 'gpt-4o-mini'}
    """
    found: dict[str, Any] = {"endpoint": config.model}
    if config.chat_template_kwargs:
        found["chat_template_kwargs"] = config.chat_template_kwargs
    return found


def answering_model(
    options: Any,
    checkpoint: str | None,
    pictures: NamedPictures,
    *,
    kept_dtype: str | None = None,
) -> Any:
    """Return who answers, in this process or behind an endpoint; nothing is loaded yet.

    Args:
      options: of a command: ``endpoint``, and for a checkpoint ``adapter``, ``dtype``,
        ``quantize``, ``max_pixels``, ``chat_template_kwargs``, ``batch_slots`` and
        ``mesh``.
      checkpoint: None for the endpoint.
      pictures: of the prompts.
      kept_dtype: that earlier answers were made in, where there are some.
    Raises:
      UserError: there is no such checkpoint, or the endpoint cannot be.
    Example::

      answering_model(config, "smollm2", NamedPictures()).settings
    """
    if checkpoint is None:
        return Endpoint(options.endpoint, pictures)
    # The engine takes a second to import, which an endpoint does not need.
    from jaxalign.judging.engine_model import EngineModel

    return EngineModel(
        checkpoint,
        pictures,
        adapter=options.adapter,
        dtype=options.dtype,
        kept_dtype=kept_dtype,
        quantize=options.quantize,
        max_pixels=options.max_pixels,
        chat_template_kwargs=options.chat_template_kwargs,
        batch_slots=options.batch_slots,
        mesh=options.mesh,
    )


class Endpoint:
    """A model behind an endpoint, which is asked as a judge is.

    Messages about it name the options by which it was given.

    Example::

      pictures = NamedPictures()
      teacher = Endpoint(EndpointConfig(model="gpt-4o-mini"), pictures)
      distill(rows, teacher, context="Answer in one word.", pictures=pictures)
    """

    def __init__(self, config: EndpointConfig, pictures: NamedPictures):
        """Make one; nothing is sent yet.

        Raises:
          UserError: the client is not installed, or URL or key cannot be used.
        """
        self.proven = False
        self.settings = endpoint_settings(config)
        try:
            self._judge: Any = make_judge(config.as_judge(), load_image=pictures.load)
        except UserError as error:
            raise UserError(_named(str(error))) from None

    async def grade(
        self, requests: Iterable[JudgeRequest]
    ) -> AsyncIterator[tuple[int, Verdict]]:
        """Yield (number of the request, answer) as they come.

        Raises:
          UserError: see ``OpenAIJudge.grade``.
        """
        self._judge.proven = self.proven
        try:
            async for number, verdict in self._judge.grade(requests):
                if verdict.failure is not None:
                    failure = _named(verdict.failure)
                    verdict = dataclasses.replace(verdict, failure=failure)
                yield number, verdict
        except UserError as error:
            raise UserError(_named(str(error))) from None


def _named(text: str) -> str:
    """Return a message of the judges' client as one about the endpoint."""
    said = text.replace("judge.", "endpoint.").replace("the judge at", "the model at")
    return said.replace("What was judged", "What was answered")
