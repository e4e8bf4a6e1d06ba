"""Which judge, and its options."""

import dataclasses
import math
import os
import re
from pathlib import Path
from typing import Any, Literal

from jaxalign import progress
from jaxalign.configs import check_fields
from jaxalign.data.columns import check_template_kwargs
from jaxalign.errors import UserError
from jaxalign.judging import wording


__all__ = ["ASPECTS", "LIKELIHOOD", "JudgeConfig"]

ASPECTS = ("helpfulness", "correctness", "safety", "completeness", "clarity")
"""Those of HelpSteer-2D."""

LIKELIHOOD: Literal["likelihood"] = "likelihood"
"""The method of a local judge, and the aspect that it scores."""

_VARIABLE = re.compile("[A-Z_][A-Z0-9_]*")

_READ_BY = {
    **dict.fromkeys(("base_url", "key_variable", "response_format"), ("openai",)),
    **dict.fromkeys(("timeout", "max_wait"), ("openai",)),
    **dict.fromkeys(("max_requests", "max_total_tokens", "max_cost"), ("openai",)),
    **dict.fromkeys(("prompt_price", "completion_price"), ("openai", "python")),
    **dict.fromkeys(("concurrency", "max_attempts"), ("openai", "python")),
    **dict.fromkeys(("temperature", "max_reply_tokens"), ("openai", "local json")),
    "chat_template_kwargs": ("openai", "local", "local json", "reward"),
    "method": ("local", "local json"),
    "path": ("python",),
}
"""Which judges read an option, where not all do; ``local json`` is the local judge that
writes its replies. Of a function of one's own a dry run tells what it would cost."""

_HOW = ("concurrency", "timeout", "max_wait", "max_attempts")
"""How an endpoint is asked. Whoever tries another judge in a command keeps these: they
are said and not refused, as a budget is that nobody would keep to."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class JudgeConfig:
    """A judge and how it is asked.

    Attributes:
      name: ``openai`` asks an endpoint that speaks OpenAI's chat completions, ``local``
        a checkpoint in this process, ``rules`` compares with accepted answers,
        ``python`` is a function of one's own, ``reward`` a reward model in this
        process (a sequence-classification checkpoint with one label).
      base_url: of the endpoint, up to and with ``/v1``; default that of OpenAI.
      key_variable: the environment variable that holds the endpoint's key, which comes
        from nowhere else.
      response_format: how the endpoint is told the form of its replies: by
        ``json_schema``; by ``json_object``, with the schema in the prompt; or, where it
        knows neither, by the prompt alone (``none``).
      model: the endpoint's name of the model; a checkpoint for ``local`` and
        ``reward``.
      path: for ``python``, the file with the function ``judge``, from a list of
        requests to a list of replies; see ``jaxalign.judging.function``. The file is
        executed. In Python a function may be given instead of a file.
      concurrency: requests on their way at the same time; for ``python`` those of one
        call.
      timeout: seconds that one attempt may take.
      method: how ``local`` scores segments: ``likelihood`` by what it would have
        written itself, on one aspect of that name; ``choice`` by asking for 0 to 4 on
        each aspect; ``json`` by writing the reply that an endpoint would be asked for,
        kept to its schema, which answers every kind of question. Default ``choice`` if
        aspects are given, else ``likelihood``.
      aspects: what segments are scored on; each has a rubric, but for ``python``, which
        may do without, and ``reward``, whose one aspect is a name for its score.
        Default ``reward`` there, elsewhere those of HelpSteer-2D: helpfulness,
        correctness, safety, completeness, clarity.
      votes: how often every question is asked.
      temperature: of the judge's sampling; null leaves it to the endpoint (some models
        take no other).
      max_attempts: calls that one request may cost before it has failed.
      max_reply_tokens: the most tokens of one reply; null leaves it to the endpoint,
        and is 1024 for ``method json``.
      max_wait: seconds that are waited at most because the endpoint says so
        (Retry-After); a request that would have to wait longer has failed.
      max_requests: calls that a run may make, retries included; null is no limit.
      max_total_tokens: tokens that a run may use.
      max_cost: what a run may cost, by the prices below.
      prompt_price: of a million tokens of prompts.
      completion_price: of a million tokens of replies.
      wording: directory of one's own with templates and rubrics that replace ours.
      chat_template_kwargs: what the judge's chat template is given, such as
        ``{"enable_thinking": false}``; an endpoint gets it in the request, where
        ``jaxalign serve``, vLLM and SGLang read it.
    Raises:
      UserError: an option is out of its range or does not go with the others.
    Example:
      >>> JudgeConfig(name="rules").votes
      1
    """

    name: Literal["openai", "local", "rules", "python", "reward"] = "openai"
    base_url: str | None = None
    key_variable: str = "OPENAI_API_KEY"
    response_format: Literal["json_schema", "json_object", "none"] = "json_schema"
    model: str | None = None
    path: str | None = None
    concurrency: int = 8
    timeout: float = 60.0
    method: Literal["likelihood", "choice", "json"] | None = None
    aspects: tuple[str, ...] | None = None
    votes: int = 1
    temperature: float | None = 0.0
    max_attempts: int = 6
    max_reply_tokens: int | None = None
    max_wait: float = 600.0
    max_requests: int | None = None
    max_total_tokens: int | None = None
    max_cost: float | None = None
    prompt_price: float = 0.0
    completion_price: float = 0.0
    wording: str | None = None
    chat_template_kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        check_fields(self)
        check_template_kwargs(self.chat_template_kwargs, "judge.chat_template_kwargs")
        for field in ("concurrency", "votes", "max_attempts"):
            _check(getattr(self, field) >= 1, field, "at least 1", self)
        for field in ("max_reply_tokens", "max_requests", "max_total_tokens"):
            value = getattr(self, field)
            _check(value is None or value >= 1, field, "at least 1, or null", self)
        for field in ("timeout", "max_wait"):
            _check(0 < getattr(self, field) < math.inf, field, "above 0", self)
        for field in ("prompt_price", "completion_price"):
            _check(0 <= getattr(self, field) < math.inf, field, "at least 0", self)
        heat, cost = self.temperature, self.max_cost
        _check(heat is None or 0 <= heat <= 2, "temperature", "in 0..2, or null", self)
        _check(cost is None or 0 < cost < math.inf, "max_cost", "above 0", self)
        self._check_effect()
        if cost is not None and not self.prompt_price + self.completion_price:
            raise UserError(
                "judge.max_cost needs the prices of the endpoint: give "
                "judge.prompt_price and judge.completion_price, each for a million "
                "tokens"
            )
        aspects = self.scored_aspects
        if not aspects or len(set(aspects)) < len(aspects):
            raise UserError(
                "judge.aspects must name at least one aspect, and each once: got "
                f"{list(aspects)}"
            )
        if self.method == LIKELIHOOD and self.aspects not in (None, (LIKELIHOOD,)):
            raise UserError(
                "judge.method likelihood scores one aspect, likelihood: got "
                f"judge.aspects {list(aspects)}. Leave the aspects out, or choose "
                "judge.method choice"
            )
        if self.name == "openai" and not self.model:
            raise UserError(
                "judge.model is missing: give the endpoint's name of the model "
                "(for a server of your own, GET /v1/models lists them)"
            )
        if self.name in ("local", "reward") and not self.model:
            raise UserError("judge.model is missing: give a checkpoint for the judge")
        if self.name == "reward" and len(aspects) != 1:
            raise UserError(
                "a reward model gives one score: judge.aspects may name one aspect, "
                f"got {list(aspects)}"
            )
        self._check_key_variable()
        self._check_path()
        if self.wording is not None and not Path(self.wording).is_dir():
            raise UserError(
                f"judge.wording {self.wording} is no directory: expected one with "
                "templates or rubrics (Markdown files) that replace ours"
            )
        for aspect in aspects if self.needs_rubrics else ():
            wording.rubric(aspect, self.own_wording)

    def _check_effect(self) -> None:
        """Refuse what was given and this judge does not read."""
        json = self.name == "local" and self.local_method == "json"
        defaults = {f.name: f for f in dataclasses.fields(self)}
        for name, judges in _READ_BY.items():
            if (f"{self.name} json" if json else self.name) in judges:
                continue
            default = defaults[name].default
            if default is dataclasses.MISSING:
                default = {}
            if getattr(self, name) == default:
                continue
            if name in _HOW:
                progress.say_once(
                    f"judge.{name} has no effect with judge.name {self.name}"
                )
            else:
                others = [other for other in judges if other != "local json"]
                if "local json" in judges and "local" not in judges:
                    others.append("local with judge.method json")
                raise UserError(
                    f"judge.{name} does nothing with judge.name {self.name}: leave it "
                    f"out, or choose judge.name {' or '.join(others)}"
                )

    def _check_key_variable(self) -> None:
        name = self.key_variable
        if not _VARIABLE.fullmatch(name) and name not in os.environ:
            raise UserError(  # without what was given: it may be the key itself
                "judge.key_variable must be the name of an environment variable, such "
                "as OPENAI_API_KEY (capitals, digits and _), or one that is set. Put "
                "the key into that variable; it has no place in options and files"
            )

    def _check_path(self) -> None:
        if self.name != "python":
            return
        if self.path is not None and not Path(self.path).is_file():
            raise UserError(
                f"judge.path must be a Python file with a function judge: got "
                f"{self.path}"
            )
        if self.model is not None:
            raise UserError(
                "judge.model does nothing with judge.name python: leave it out"
            )

    @property
    def local_method(self) -> Literal["likelihood", "choice", "json"]:
        """How a ``local`` judge scores segments."""
        return self.method or ("choice" if self.aspects else LIKELIHOOD)

    @property
    def scored_aspects(self) -> tuple[str, ...]:
        """What segments are scored on."""
        if self.name == "local" and self.local_method == LIKELIHOOD:
            return (LIKELIHOOD,)
        default = ("reward",) if self.name == "reward" else ASPECTS
        return default if self.aspects is None else self.aspects

    @property
    def needs_rubrics(self) -> bool:
        """Whether the judge is told what its scores mean, and so must be."""
        return self.name not in ("python", "reward")

    @property
    def renders(self) -> bool:
        """Whether the judge reads a conversation through its own chat template."""
        likelihood = self.name == "local" and self.local_method == LIKELIHOOD
        return likelihood or self.name == "reward"

    @property
    def writes(self) -> bool:
        """Whether the judge answers every kind of question, with texts of its own."""
        json = self.name == "local" and self.local_method == "json"
        return json or self.name in ("openai", "python")

    def check_writes(self, who: str) -> None:
        """Refuse a judge that does not, where somebody has it write.

        Args:
          who: does, and what is written, for the message.
        Raises:
          UserError: :attr:`writes` is false.
        """
        if not self.writes:
            raise UserError(
                f"{who}, which judge.name {self.name} does not: use judge.name openai "
                "(`jaxalign serve` is such an endpoint), a checkpoint in this process "
                "(judge.name local, judge.method json) or a function of your own "
                "(judge.name python)"
            )

    @property
    def own_wording(self) -> Path | None:
        """The directory of wording of one's own."""
        return None if self.wording is None else Path(self.wording)


def _check(right: bool, field: str, expected: str, config: Any) -> None:
    if not right:
        raise UserError(
            f"judge.{field} must be {expected}: got {getattr(config, field)}"
        )
