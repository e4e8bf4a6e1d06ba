"""What a training run is made of, as frozen dataclasses, and their YAML form."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from jaxalign import configs
from jaxalign.adapters.adapter import CONFIGS as ADAPTERS
from jaxalign.adapters.adapter import Adapter, NoAdapter, averages_ahead
from jaxalign.adapters.lora import LoRAConfig
from jaxalign.checkpoints.load import DType
from jaxalign.configs import check_fields
from jaxalign.data import layouts
from jaxalign.data.columns import check_template_kwargs
from jaxalign.data.kept_features import ImageFeatures
from jaxalign.data.pairs import Overflow
from jaxalign.errors import UserError, did_you_mean
from jaxalign.models.attention.choice import AttentionOption
from jaxalign.models.decoder import Remat
from jaxalign.models.quantised import Quantize
from jaxalign.objectives import own
from jaxalign.objectives.dpo2d import DPO2DConfig
from jaxalign.objectives.objective import CONFIGS as OBJECTIVES
from jaxalign.objectives.objective import needs, weight_models
from jaxalign.objectives.options import ObjectiveConfig
from jaxalign.parallel.mesh import MeshConfig
from jaxalign.training.metrics import parse_report_to
from jaxalign.training.optimizer import OptimizerConfig


__all__ = [
    "TrainConfig",
    "check_branches",
    "check_trainable",
    "default_objective",
    "from_dict",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A training run.

    Attributes:
      model: Hugging Face checkpoint: a directory, or an id on the hub,
        ``owner/name`` or ``owner/name@revision``.
      data: feedback records to train on: a .jsonl, .jsonl.gz or .parquet file, a
        pattern of such files, a directory of datasets' save_to_disk,
        tfds:NAME_OR_DIRECTORY:SPLIT or hf:OWNER/NAME:SPLIT.
      out: run directory; the same command again continues the run in it.
      eval_data: records to evaluate on.
      reference: ``adapter_off`` is the model as it was loaded (with an adapter that
        costs no memory), ``cached`` the same with its log-probabilities computed once
        and kept on disk, or the directory of another checkpoint.
      reference_cache: where ``cached`` keeps them, and the features of pictures;
        default in the run directory.
      image_features: ``recompute`` runs the tower at every step; ``cached`` once a
        picture, keeps on disk what it makes of them (the connector's output, or the
        tower's where the connector is trained), and does not load it again. The tower
        is then frozen.
      objective: the loss.
      adapter: what is trained beside the base weights.
      trainable: patterns of base weights to train, beside the adapter or, with
        adapter.name none, alone: ``[.*]`` is all of them, ``[connector/.*]`` what a
        model that sees has between its tower and its decoder. The reference keeps them
        as they were.
      optimizer: AdamW and its schedule.
      max_steps: updates to make; overrides num_train_epochs. A run whose rate does not
        fall (optimizer.schedule constant) goes on when either is raised.
      num_train_epochs: times that every pair is seen.
      batch_rows: rows of a micro-batch, over all devices.
      row_length: places of a row; a pair takes prompt + chosen + rejected.
      row_patches: places of a row for patches of pictures; default a number that
        seldom binds, found from the data and printed.
      max_length: most tokens of a prompt with either response.
      gradient_accumulation_steps: micro-batches of a step.
      packing: whether a row holds as many pairs as fit, or one.
      layout: of the data's rows, see ``jaxalign.data.layouts``; default what their
        columns say.
      image_dir: where relative paths of pictures start; default beside the data file.
      max_pixels: of a picture; larger ones are made smaller. Default what the
        checkpoint's own files say; each family has its own limit.
      chat_template_kwargs: what the chat template is given beside the conversations,
        such as ``{"enable_thinking": false}``; a record's own column comes first.
      overflow: what to do with a pair above max_length.
      dtype: of the frozen weights and of the computation; what is trained is float32.
        ``auto`` keeps weights as they are stored; nothing scales the loss of float16;
        ``fastest`` is what this device multiplies faster, kept for the whole run.
      quantize: hold the layers' frozen linear weights, the reference's and a vision
        tower's too, as int8 or 4-bit nf4 codes, which cannot be trained.
      remat: what the backward pass keeps of each layer: all, matrix products, nothing.
      attention: what computes it: ``auto`` is the fused kernel of the platform
        (``cudnn`` on GPUs, ``splash`` on TPUs) if it can do what the run needs, else
        ``xla``, which runs everywhere; ``dense`` is the plain formula. The log says
        which one runs and why.
      attention_block: queries and keys of a block of ``xla`` attention.
      router_weight: of the balance loss of a mixture of experts, 0.001 in pretraining.
      mesh: how the devices are arranged.
      seed: of the order of the data, the adapter's start and dropout.
      data_workers: processes that build batches; 0 uses threads.
      save_steps: a checkpoint every so many updates, and at the end.
      save_total_limit: checkpoints kept.
      eval_steps: an evaluation every so many updates, and at start and end.
      logging_steps: a line of metrics every so many updates, the first and the last.
      report_to: ``tensorboard``, ``wandb``, both with a comma, or ``none``.

    >>> config = TrainConfig(model="smollm2", data="d.jsonl", out="run", max_steps=10)
    >>> config.objective.name
    'dpo2d'
    """

    model: str
    data: str
    out: str
    eval_data: str | None = None
    reference: str = "adapter_off"
    reference_cache: str | None = None
    image_features: ImageFeatures = "recompute"
    objective: ObjectiveConfig = dataclasses.field(default_factory=DPO2DConfig)
    adapter: Adapter = dataclasses.field(default_factory=LoRAConfig)
    trainable: tuple[str, ...] = ()
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    max_steps: int | None = None
    num_train_epochs: int = 1
    batch_rows: int = 4
    row_length: int = 2048
    row_patches: int | None = None
    max_length: int = 1024
    gradient_accumulation_steps: int = 1
    packing: bool = True
    layout: str | None = None
    image_dir: str | None = None
    max_pixels: int | None = None
    chat_template_kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    overflow: Overflow = "drop"
    dtype: DType = "float32"
    quantize: Quantize = "none"
    remat: Remat = "dots"
    attention: AttentionOption = "auto"
    attention_block: int = 64
    router_weight: float = 0.0
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    seed: int = 0
    data_workers: int = 0
    save_steps: int = 100
    save_total_limit: int = 2
    eval_steps: int = 100
    logging_steps: int = 10
    report_to: str = "tensorboard"

    def __post_init__(self) -> None:
        check_fields(self)
        layouts.check_name(self.layout)
        check_template_kwargs(self.chat_template_kwargs, "chat_template_kwargs")
        for field in (
            "num_train_epochs",
            "batch_rows",
            "row_length",
            "max_length",
            "gradient_accumulation_steps",
            "attention_block",
            "save_steps",
            "save_total_limit",
            "eval_steps",
            "logging_steps",
        ):
            if getattr(self, field) < 1:
                raise UserError(
                    f"{field} must be at least 1: got {getattr(self, field)}"
                )
        for field in ("seed", "data_workers"):
            if getattr(self, field) < 0:
                raise UserError(
                    f"{field} must be 0 or more: got {getattr(self, field)}"
                )
        if not 0 <= self.router_weight < float("inf"):
            raise UserError(
                f"router_weight must be 0 or more: got {self.router_weight}"
            )
        for field in ("max_steps", "row_patches", "max_pixels"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise UserError(f"{field} must be at least 1: got {value}")
        rows = self.mesh.rows
        if self.batch_rows % rows:
            raise UserError(
                f"batch_rows {self.batch_rows} cannot be split over mesh.data × "
                f"mesh.fsdp = {rows} devices: make it a multiple of {rows}"
            )
        check_trainable(self.adapter, self.trainable)
        if averages_ahead(self.adapter):
            check_branches(self.objective, "adapter.gate mean (adapter.faithful)")
        if (
            self.attention in ("cudnn", "splash", "dense")
            and self.attention_block != 64
        ):
            raise UserError(
                f"attention_block {self.attention_block} has no effect with attention "
                f"{self.attention}: leave it out, or give --attention xla"
            )
        self._check_reference()
        parse_report_to(self.report_to)

    def _check_reference(self) -> None:
        asked, name = needs(self.objective), self.objective.name
        if not asked.reference and self.reference != "adapter_off":
            raise UserError(
                f"reference has no effect for {name}, which compares with none: got "
                f"{self.reference}. Leave --reference out"
            )
        if asked.kl and self.reference == "cached":
            raise UserError(
                f"reference cached keeps one number a token, but {name} compares whole "
                "distributions: use --reference adapter_off or a directory"
            )
        kept = "cached" in (self.reference, self.image_features) or weight_models(
            self.objective
        )
        if self.reference_cache is not None and not kept:
            raise UserError(
                "reference_cache has no effect without --reference cached or "
                f"--image_features cached: got reference={self.reference}"
            )


def check_trainable(adapter: Adapter, trainable: tuple[str, ...]) -> None:
    """Refuse neither an adapter nor base weights to train.

    Raises:
      UserError: there is nothing to train.
    Example:
      >>> check_trainable(NoAdapter(), ("mlp/.*",))
    """
    if isinstance(adapter, NoAdapter) and not trainable:
        raise UserError(
            "adapter.name none trains nothing by itself: give --trainable patterns "
            "of base weights, '[.*]' for all of them"
        )


def check_branches(chosen: ObjectiveConfig, what: str) -> None:
    """Refuse a gate that reads the whole sequence where a prompt has two responses.

    Raises:
      UserError: the objective compares responses of one prompt.
    Example:
      >>> from jaxalign.objectives.objective import CONFIGS
      >>> check_branches(CONFIGS["sft"](), "the adapter's mean_gate")  # one response
      >>> try:
      ...     check_branches(CONFIGS["dpo"](), "the adapter's mean_gate")
      ... except UserError as error:
      ...     print(str(error)[:50])
      the adapter's mean_gate averages over the whole se
    """
    if needs(chosen).form not in ("completions", "labelled"):
        raise UserError(
            f"{what} averages over the whole sequence, answer included, so that a "
            f"prompt has no one value for two responses, which {chosen.name} compares. "
            "Use gate token or sequence, or an objective of single completions (sft)"
        )


def to_dict(config: Any) -> dict[str, Any]:
    """Return a config as plain nested values for YAML and JSON."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        return [plain(v) for v in value] if isinstance(value, list | tuple) else value

    return plain(dataclasses.asdict(config))


def from_dict(values: Mapping[str, Any]) -> TrainConfig:
    """Make a config from nested values, as in a run's config.yaml.

    Raises:
      UserError: an unknown objective, adapter or field, or a value of the wrong kind.
    Example:
      >>> config = from_dict({"model": "smollm2", "data": "d.jsonl", "out": "run"})
      >>> config.objective.name, config.adapter.name
      ('dpo2d', 'lora')
    """
    given = values.get("objective")
    if isinstance(given, Mapping) and given.keys() == {"name", "code"}:
        # Of a function that was given in Python: see objectives.own.
        return dataclasses.replace(
            from_dict({k: v for k, v in values.items() if k != "objective"}),
            objective=own.kept(**given),
        )
    parts = {
        "objective": _class_of(values, "objective", OBJECTIVES, default_objective),
        "adapter": _class_of(values, "adapter", ADAPTERS, lambda _: "lora"),
    }
    named = {
        field: {**values.get(field, {}), "name": name}
        for field, (name, _) in parts.items()
    }
    classes = {field: cls for field, (_, cls) in parts.items()}
    return configs.build(TrainConfig, {**values, **named}, classes)


def default_objective(options: Iterable[str]) -> str:
    """Return the objective's name where only its other options are given.

    >>> default_objective(["beta"]), default_objective(["max_score"])
    ('dpo2d', 'dpo2d')
    """
    return "mix" if "mix" in options else "dpo2d"


def _class_of(
    values: Mapping[str, Any],
    field: str,
    classes: Mapping[str, type],
    default: Callable[[Iterable[str]], str],
) -> tuple[str, type]:
    """Return the name of the part that the values choose, and its class."""
    options = values.get(field, {})
    if not isinstance(options, Mapping):
        raise UserError(f"{field} must be a mapping of options: got {options!r}")
    name = options.get("name", default(options))
    if not isinstance(name, str) or name not in classes:
        raise UserError(
            f"{field}.name {name!r} is not known. {did_you_mean(str(name), classes)}"
        )
    return name, classes[name]
