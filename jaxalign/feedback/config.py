"""What an RLAIF run is made of, as frozen dataclasses."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from jaxalign.adapters.adapter import Adapter, NoAdapter, PeftConfig
from jaxalign.adapters.lora import LoRAConfig
from jaxalign.checkpoints.load import DType
from jaxalign.configs import check_fields
from jaxalign.errors import UserError
from jaxalign.feedback.decompose import risk_scores
from jaxalign.feedback.decompose.config import DecomposerConfig
from jaxalign.feedback.gate_config import GateConfig
from jaxalign.feedback.pairing import PairingConfig
from jaxalign.feedback.segmenters import SegmenterConfig
from jaxalign.generation.engine import Sampling
from jaxalign.judging.config import JudgeConfig
from jaxalign.models.quantised import Quantize
from jaxalign.objectives.dpo2d import DPO2DConfig
from jaxalign.objectives.objective import needs
from jaxalign.objectives.options import ObjectiveConfig
from jaxalign.parallel.mesh import MeshConfig
from jaxalign.training.config import TrainConfig
from jaxalign.training.optimizer import OptimizerConfig


__all__ = [
    "DecomposerConfig",
    "GateConfig",
    "GenerationOptions",
    "RLAIFConfig",
    "TrainingOptions",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """How candidates are sampled.

    Attributes:
      num_samples: candidates of each prompt.
      temperature: logits are divided by it.
      top_p: only the smallest set of tokens whose probabilities reach it.
      top_k: only the k most probable tokens; 0 is all.
      max_new_tokens: most tokens of a candidate.
      batch_slots: candidates that are made at the same time.

    >>> GenerationOptions().num_samples
    4
    """

    num_samples: int = 4
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 256
    batch_slots: int = 64

    def __post_init__(self) -> None:
        if self.num_samples < 2:
            raise UserError(
                "generation.num_samples must be at least 2, or there is nothing to "
                f"pair: got {self.num_samples}"
            )
        if self.temperature == 0:
            raise UserError(
                "generation.temperature 0 makes all candidates of a prompt equal: give "
                "one above 0"
            )
        self.sampling()

    def sampling(self, **others: Any) -> dict[str, Any]:
        """Return the options of ``jaxalign generate``, checked."""
        options = {**dataclasses.asdict(self), **others}
        slots = options.pop("batch_slots")
        Sampling(**options)
        return {**options, "batch_slots": slots}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """How each round trains; see ``jaxalign train``.

    Attributes:
      max_steps: updates of a round.
      batch_rows: rows of a micro-batch.
      row_length: places of a row; a pair takes prompt + chosen + rejected.
      max_length: most tokens of a prompt with either response; default row_length.
      gradient_accumulation_steps: micro-batches of a step.
      reference: ``adapter_off``, or ``cached`` log-probabilities of the same.
      save_steps: a checkpoint every so many updates, and at the end.
      logging_steps: a line of metrics every so many updates.

    >>> TrainingOptions().max_steps
    100
    """

    max_steps: int = 100
    batch_rows: int = 4
    row_length: int = 2048
    max_length: int | None = None
    gradient_accumulation_steps: int = 1
    reference: Literal["adapter_off", "cached"] = "adapter_off"
    save_steps: int = 50
    logging_steps: int = 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class RLAIFConfig:
    """Rounds of sample, decompose, judge, pair, train and gate.

    Attributes:
      model: Hugging Face checkpoint that the policy starts from.
      prompts: file of prompts, ``{"prompt": text or messages}`` a line, with
        ``images`` where it shows pictures.
      out: directory of the run; the same command again goes on in it.
      image_dir: where relative paths of pictures start, of the gate's prompts too;
        default beside each file of prompts.
      max_pixels: of a picture, when sampling and training; larger ones are made
        smaller. Default what the checkpoint's own files say. Judges get whole files.
      judge: who judges.
      gate: when a round is accepted.
      rounds: how many.
      seed: of sampling, pairing and training.
      store: SQLite file of every judgement; default ``OUT/store.db``.
      generation: how candidates are sampled.
      segmenter: how they are cut.
      decomposer: what of them is judged.
      pairing: which candidates become a record.
      objective: the loss.
      adapter: what is trained; it grows from round to round, and the model without it
        is the reference of all rounds.
      optimizer: AdamW and its schedule, anew in each round.
      training: how each round trains.
      dtype: of frozen weights and computation; ``fastest`` is what this device
        multiplies faster, kept for the whole run.
      chat_template_kwargs: what the chat template is given beside the conversations,
        such as ``{"enable_thinking": false}``; a record's own column comes first.
      quantize: how frozen linear weights are held.
      mesh: how the devices are arranged.

    >>> judge = JudgeConfig(name="python", aspects=("brevity",))
    >>> files = {"model": "smollm2", "prompts": "prompts.jsonl", "out": "rounds"}
    >>> gate = GateConfig(prompts="held_out.jsonl")
    >>> RLAIFConfig(judge=judge, gate=gate, rounds=3, **files).decomposer.name
    'segments'
    """

    model: str
    prompts: str
    out: str
    judge: JudgeConfig
    gate: GateConfig
    rounds: int = 2
    seed: int = 0
    store: str | None = None
    image_dir: str | None = None
    max_pixels: int | None = None
    generation: GenerationOptions = dataclasses.field(default_factory=GenerationOptions)
    segmenter: SegmenterConfig = dataclasses.field(default_factory=SegmenterConfig)
    decomposer: DecomposerConfig = dataclasses.field(default_factory=DecomposerConfig)
    pairing: PairingConfig = dataclasses.field(default_factory=PairingConfig)
    objective: ObjectiveConfig = dataclasses.field(default_factory=DPO2DConfig)
    adapter: Adapter = dataclasses.field(default_factory=LoRAConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    training: TrainingOptions = dataclasses.field(default_factory=TrainingOptions)
    dtype: DType = "float32"
    chat_template_kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    quantize: Quantize = "none"
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)

    def __post_init__(self) -> None:
        check_fields(self)
        if self.rounds < 1:
            raise UserError(f"rounds must be at least 1: got {self.rounds}")
        if isinstance(self.adapter, NoAdapter):
            raise UserError(
                "rlaif trains an adapter, so that the model without it is the "
                "reference of every round: got adapter.name none"
            )
        decomposer, judge = self.decomposer.name, self.judge.name
        if decomposer in ("claims", "risks"):
            who = f"decomposer.name {decomposer} has the judge write texts"
            self.judge.check_writes(who)
        if judge == "rules" and decomposer != "hops":
            raise UserError(
                "judge.name rules compares with accepted answers, which only "
                f"decomposer.name hops asks about: got {decomposer}"
            )
        if judge == "reward" and decomposer != "segments":
            raise UserError(
                "judge.name reward scores segments and answers no questions, as "
                f"decomposer.name {decomposer} asks: use decomposer.name segments"
            )
        asked = needs(self.objective)
        if asked.segments and decomposer not in ("segments", "risks"):
            raise UserError(
                f"objective.name {self.objective.name} learns from scores of segments, "
                f"and decomposer.name {decomposer} scores whole responses: use an "
                "objective of pairs (--objective.name sigmoid), or decomposer.name "
                "segments or risks"
            )
        if asked.token_weights:
            raise UserError(
                f"objective.name {self.objective.name} learns from token weights, "
                "which no judge gives"
            )
        aspects = self.judge.aspects
        if decomposer == "risks" and {*(aspects or ())} - {*risk_scores.ASPECTS}:
            raise UserError(
                "decomposer.name risks scores segments on "
                f"{' and '.join(risk_scores.ASPECTS)}, and only for an objective that "
                f"learns from them: got judge.aspects {list(aspects or ())}. Leave it "
                "out"
            )
        self._fit_pairing()
        self._check_gate()
        self.train_config("pairs.jsonl", "run", 1, None)

    def _fit_pairing(self) -> None:
        """Give pairing the least gap of the scores' scale, or refuse one above it."""
        graded = self.decomposer.score == "graded"
        if self.pairing.min_gap is None:
            # A run's file then says by what it was paired.
            gap = 0.1 if graded else self.pairing.least_gap
            pairing = dataclasses.replace(self.pairing, min_gap=gap)
            object.__setattr__(self, "pairing", pairing)
        if graded and self.pairing.least_gap > 1:
            raise UserError(
                "no two responses are pairing.min_gap apart: the graded score of risks "
                f"lies in 0..1, got {self.pairing.min_gap}"
            )

    def _check_gate(self) -> None:
        """Refuse a gate that this judge cannot do."""
        judge, metrics = self.judge.name, self.gate.metrics or {}
        if self.gate.judge_model is not None and judge in ("rules", "python"):
            raise UserError(f"gate.judge_model does nothing with judge.name {judge}")
        if judge == "rules" and metrics.keys() - {"refused_benign"}:
            raise UserError(
                "judge.name rules knows a refusal by its first words and nothing of "
                "safety or use: gate.metrics may hold refused_benign alone, got "
                f"{', '.join(metrics)}"
            )
        if judge == "reward" and metrics:
            raise UserError(
                "judge.name reward gives scores and no labels, as gate.metrics need: "
                f"got {', '.join(metrics)}. Leave them out, or choose another judge"
            )

    def train_config(
        self, data: str, out: str, number: int, policy: str | None
    ) -> TrainConfig:
        """Return the training run of a round.

        Args:
          data: its records.
          out: its directory.
          number: of the round.
          policy: adapter that it goes on from; None begins with ``adapter``.
        """
        options: Mapping[str, Any] = dataclasses.asdict(self.training)
        length = self.training.max_length or self.training.row_length
        adapter = self.adapter if policy is None else PeftConfig(path=policy)
        return TrainConfig(
            model=self.model,
            data=data,
            out=out,
            objective=self.objective,
            adapter=adapter,
            optimizer=self.optimizer,
            seed=self.seed + number,
            max_pixels=self.max_pixels,
            chat_template_kwargs=self.chat_template_kwargs,
            dtype=self.dtype,
            quantize=self.quantize,
            mesh=self.mesh,
            report_to="none",
            **{**options, "max_length": length},
        )
