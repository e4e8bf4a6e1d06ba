"""The options of ``jaxalign eval``."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

from jaxalign import shards
from jaxalign.checkpoints.load import DType
from jaxalign.configs import check_fields
from jaxalign.data.columns import check_template_kwargs
from jaxalign.errors import UserError
from jaxalign.evaluation.task import TaskOptions
from jaxalign.judging.config import JudgeConfig
from jaxalign.judging.endpoint_model import EndpointConfig
from jaxalign.models.quantised import Quantize
from jaxalign.parallel.mesh import MeshConfig


__all__ = ["EndpointConfig", "EvalConfig", "GenerationConfig"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """What replaces a task's own way of drawing answers; null keeps the task's.

    Attributes:
      max_new_tokens: most tokens of an answer.
      temperature: 0 takes the most probable token.
      top_p: only the smallest set of tokens whose probabilities reach it.

    >>> GenerationConfig(temperature=0.7).given
    {'temperature': 0.7}
    """

    max_new_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if self.given:
            # Imports the engine's libraries, which an endpoint does not need.
            from jaxalign.generation.completions import Sampling

            Sampling(**self.given)

    @property
    def given(self) -> dict[str, Any]:
        """Those that are given."""
        return {name: v for name, v in vars(self).items() if v is not None}


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Evaluating a model on benchmarks.

    Attributes:
      tasks: names of ours, Python files with a ``TASK``, or JSON Lines files of
        ``{"prompt", "images", "references"}``.
      out: directory of the run: a folder for each task, ``store.db``, ``report.html``.
        The same command again goes on where it was stopped.
      data_dir: where the tasks' files are, as their authors publish them, plain or
        .gz: in it, or in folders of the tasks' names.
      model: Hugging Face checkpoint: a directory, or an id on the hub,
        ``owner/name`` or ``owner/name@revision``. Not with tasks that measure the judge
        (``dream_observations``).
      adapter: PEFT directory, exported hybrid or run directory on top of the model.
      endpoint: the model in its place, behind an endpoint.
      judge: who grades; default the rules, which compare with accepted answers.
      generation: what replaces the tasks' own way of drawing answers.
      grades: file of grades, or of an official tool's verdicts, of the one task:
        neither model nor judge is needed then.
      prompts: directory with Markdown files that replace the tasks' prompts.
      num_samples: answers of each question; default the task's own number.
      conditions: of ``chinese_simplevqa``: ``seen``, ``gold_object``, ``caption``,
        ``text_only``, ``blank``, ``shuffled``; each is a run of its own.
      confidence: ask the model how sure it is, in the same request.
      best_of: choose one of several answers by ``likelihood``, ``judge`` or
        ``majority``.
      agreement: check graders of refusal against XSTest's human labels.
      wording: ``ours``, or ``official`` for the authors' judge templates where they lie
        in the data directory.
      limit: a sample of so many items of each task, drawn by ``seed``.
      seed: of the sample and of what answers are drawn.
      shard: ``i/n``: ask about part i (from 0) of n of the items alone, every n-th;
        ``jaxalign join`` makes one evaluation, with its figures, of the parts.
      image_dir: where the tasks' pictures are; default where their files are.
      max_pixels: of a picture; larger ones are made smaller. Default as the run that
        ``adapter`` is was trained, elsewhere what the checkpoint's own files say.
      chat_template_kwargs: what the chat template is given, such as
        ``{"enable_thinking": false}``; default as the run that ``adapter`` is was
        trained.
      batch_slots: answers that are made at the same time.
      dtype: of weights and computation; ``auto`` keeps weights as they are stored,
        ``fastest`` is what this device multiplies faster.
      quantize: how frozen linear weights are held, see ``jaxalign train``; default as
        the run that ``adapter`` is was trained, elsewhere ``none``.
      mesh: how the devices are arranged.
      log_format: ``inspect`` also writes what inspect-ai's viewer reads.

    >>> EvalConfig(tasks=("xstest",), out="eval", model="smollm2").judge.name
    'rules'
    """

    tasks: tuple[str, ...]
    out: str
    data_dir: str | None = None
    model: str | None = None
    adapter: str | None = None
    endpoint: EndpointConfig = dataclasses.field(default_factory=EndpointConfig)
    judge: JudgeConfig = dataclasses.field(
        default_factory=lambda: JudgeConfig(name="rules")
    )
    generation: GenerationConfig = dataclasses.field(default_factory=GenerationConfig)
    grades: str | None = None
    prompts: str | None = None
    num_samples: int | None = None
    conditions: tuple[str, ...] = ("seen",)
    confidence: bool = False
    best_of: Literal["likelihood", "judge", "majority"] | None = None
    agreement: bool = True
    wording: Literal["ours", "official"] = "ours"
    limit: int | None = None
    seed: int = 0
    shard: str | None = None
    image_dir: str | None = None
    max_pixels: int | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    batch_slots: int = 64
    dtype: DType = "float32"
    quantize: Quantize | None = None
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    log_format: Literal["none", "inspect"] = "none"

    def __post_init__(self) -> None:
        check_fields(self)
        check_template_kwargs(self.chat_template_kwargs or {}, "chat_template_kwargs")
        if not self.tasks:
            raise UserError("--tasks is empty: name at least one task")
        if self.grades is not None and len(self.tasks) != 1:
            raise UserError(
                f"--grades is of one task: got --tasks {','.join(self.tasks)}"
            )
        if shards.parse(self.shard) and self.grades is not None:
            raise UserError(
                "--shard has no effect with --grades, where nobody is asked: leave it "
                "out"
            )
        self._check_model()
        for name in ("limit", "num_samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} must be at least 1: got {value}")
        if self.prompts is not None and not Path(self.prompts).is_dir():
            raise UserError(
                f"prompts {self.prompts} is no directory: expected one with Markdown "
                "files that replace the tasks' prompts"
            )
        if self.best_of is not None and (self.num_samples or 1) < 2:
            raise UserError(
                f"best_of {self.best_of} chooses among several answers: give "
                "--num_samples N, at least 2"
            )

    def _check_model(self) -> None:
        if self.grades is not None:
            return
        if self.endpoint.model is None:
            return
        for name in ("model", "adapter", "max_pixels", "quantize"):
            if getattr(self, name) is not None:
                raise UserError(
                    f"--{name} has no effect with --endpoint.model: leave one out"
                )

    @property
    def checkpoint(self) -> str | None:
        """The model in this process; None where an endpoint answers."""
        return None if self.endpoint.model is not None else self.model

    @property
    def options(self) -> TaskOptions:
        """What tasks read of all this."""
        return TaskOptions(
            num_samples=self.num_samples,
            conditions=self.conditions,
            confidence=self.confidence,
            best_of=self.best_of,
            agreement=self.agreement,
            wording=self.wording,
            own=None if self.prompts is None else Path(self.prompts),
            judge_own=self.judge.own_wording,
            aspects=self.judge.scored_aspects,
            image_dir=None if self.image_dir is None else Path(self.image_dir),
            seed=self.seed,
        )
