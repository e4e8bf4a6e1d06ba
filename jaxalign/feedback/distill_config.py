"""The options of ``jaxalign distill``."""

import dataclasses
from pathlib import Path
from typing import Any

from jaxalign.checkpoints.load import DType
from jaxalign.data import layouts
from jaxalign.data.columns import check_template_kwargs
from jaxalign.errors import UserError
from jaxalign.feedback.disentangle_file import DisentangleConfig
from jaxalign.feedback.examining import Distilling
from jaxalign.generation.text_model import check_slots
from jaxalign.judging.config import JudgeConfig
from jaxalign.judging.endpoint_model import EndpointConfig
from jaxalign.models.quantised import Quantize
from jaxalign.parallel.mesh import MeshConfig


__all__ = ["RISKS", "DistillConfig"]

RISKS = "risks"
"""The context that is made on the way."""

_ENGINE = ("adapter", "max_pixels", "quantize", "chat_template_kwargs")
_UNSENT = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
"""Options of sampling that chat completions do not know."""

_VERIFIERS = ("openai", "python", "local")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillConfig(Distilling):
    """Distilling a teacher that is told more than the student.

    Attributes:
      data: prompts, one object a line, ``{"prompt": text or messages}``, with
        ``images`` where it shows pictures. ``benign`` (true or false) says whether
        there is nothing to be careful about; default whether nothing was observed. A
        benign prompt is answered without the context, by the row's own ``completion``
        if it has one.
      out: JSON Lines file to write, ``{"index", "prompt", "images", "completion",
        "benign"}`` for each prompt with an answer that is kept, in order.
      context: what the teacher is told: ``risks``, which ``judge`` observes on the way;
        what ``jaxalign disentangle`` made of this data (.jsonl); or a system text (any
        other file).
      teacher: Hugging Face checkpoint: a directory, or an id on the hub, ``owner/name``
        or ``owner/name@revision``.
      adapter: PEFT directory, exported hybrid or run directory on top of the teacher.
      endpoint: the teacher in its place, behind an endpoint.
      judge: who observes the risks, verifies that answers handle them, and, with
        ``refusals judge``, tells refusals. ``judge.votes`` is how often it verifies.
      store: SQLite file that keeps every answer and verdict; default ``OUT.store.db``.
      layout: of the rows, see ``jaxalign.data.layouts``; default what their columns
        say.
      image_dir: where relative paths of pictures start; default beside the data file.
        Paths are written as they are: OUT is read with the same directory.
      max_pixels: of a picture that the teacher is shown; larger ones are made smaller.
      chat_template_kwargs: what the teacher's chat template is given; a prompt's own
        column comes first.
      batch_slots: answers that are made at the same time.
      dtype: of weights and computation; ``auto`` keeps weights as they are stored,
        ``fastest`` is what this device multiplies faster.
      quantize: how the teacher's frozen linear weights are held.
      mesh: how the devices are arranged.
    Raises:
      UserError: there is no teacher or there are two, or an option has no effect.

    >>> files = {"data": "prompts.jsonl", "out": "sft.jsonl", "context": "rules.md"}
    >>> DistillConfig(teacher="smollm2", **files).store_path.name
    'sft.jsonl.store.db'
    """

    data: str
    out: str
    context: str
    teacher: str | None = None
    adapter: str | None = None
    endpoint: EndpointConfig = dataclasses.field(default_factory=EndpointConfig)
    judge: JudgeConfig = dataclasses.field(
        default_factory=lambda: JudgeConfig(name="rules")
    )
    store: str | None = None
    layout: str | None = None
    image_dir: str | None = None
    max_pixels: int | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    batch_slots: int = 64
    dtype: DType = "float32"
    quantize: Quantize | None = None
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        layouts.check_name(self.layout)
        check_template_kwargs(self.chat_template_kwargs or {}, "chat_template_kwargs")
        check_slots(self.batch_slots, None, self.mesh)
        self._check_teacher()
        self._check_judge()

    def _check_teacher(self) -> None:
        if self.teacher is None and self.endpoint.model is None:
            raise UserError(
                "there is no teacher: give --teacher CHECKPOINT or --endpoint.model "
                "NAME"
            )
        if self.endpoint.model is None:
            return
        if self.teacher is not None:
            raise UserError(
                f"there are two teachers, --teacher {self.teacher} and "
                f"--endpoint.model {self.endpoint.model}: leave one out"
            )
        unsent = [name for name, v in _UNSENT.items() if getattr(self, name) != v]
        engine = [name for name in _ENGINE if getattr(self, name) is not None]
        for name in (*engine, *unsent):
            cure = "leave it out"
            if name == "chat_template_kwargs":
                cure = "give --endpoint.chat_template_kwargs"
            raise UserError(f"--{name} has no effect with --endpoint.model: {cure}")

    def _check_judge(self) -> None:
        judge, name = self.judge, self.judge.name
        if judge.aspects is not None:
            raise UserError(
                "judge.aspects does nothing here, where no segment is scored: leave it "
                "out"
            )
        if self.context == RISKS:
            _ = self.disentangling  # which says what the judge lacks
        verifying = self.verify and self.observed
        if verifying and name not in _VERIFIERS:
            raise UserError(
                f"judge.name {name} cannot verify that answers handle what was "
                "observed: give --judge.* (judge.name openai, python or local), or "
                "--verify false, which keeps answers that overlook a risk"
            )
        if self.refusals == "judge" and name == "reward":
            raise UserError(
                "judge.name reward tells no refusals: give another judge, or leave "
                "--refusals judge out"
            )
        asked = verifying or self.context == RISKS or self.refusals == "judge"
        if not asked and name != "rules":
            raise UserError(
                f"judge.name {name} does nothing here: nothing was observed that "
                "answers must handle, and the rules tell refusals. Leave the judge "
                "out, or give --refusals judge"
            )
        if judge.votes > 1 and not verifying:
            raise UserError(
                f"judge.votes {judge.votes} does nothing where nothing is verified: "
                "leave it out"
            )

    @property
    def observed(self) -> bool:
        """Whether the context is what was observed in each prompt."""
        return self.context == RISKS or Path(self.context).suffix == ".jsonl"

    @property
    def disentangling(self) -> DisentangleConfig:
        """How ``risks`` are observed."""
        return DisentangleConfig(
            data=self.data,
            out=f"{self.out}.observations.jsonl",
            judge=self.judge,
            store=str(self.store_path),
            layout=self.layout,
            image_dir=self.image_dir,
        )

    @property
    def store_path(self) -> Path:
        """Where the store is."""
        return Path(self.store or f"{self.out}.store.db")

    @property
    def dropped_path(self) -> Path:
        """Where the prompts are that nobody learns from."""
        return Path(f"{self.out}.dropped.jsonl")
