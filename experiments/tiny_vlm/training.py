"""The stages: each is a run directory of the library, and goes on after a stop."""

from pathlib import Path
from typing import Any, NamedTuple

from jaxalign.adapters.adapter import NoAdapter
from jaxalign.adapters.lora import LoRAConfig
from jaxalign.objectives.dpo2d import DPO2DConfig
from jaxalign.objectives.pairwise import PairwiseConfig
from jaxalign.objectives.sft import SFTConfig
from jaxalign.training.config import TrainConfig
from jaxalign.training.optimizer import OptimizerConfig
from jaxalign.training.publish import publish_run
from jaxalign.training.run import train
from tiny_vlm.files import Data


__all__ = ["Steps", "align", "connector", "merged", "whole"]

CONNECTOR = "connector/.*"


class Steps(NamedTuple):
    """Updates of each stage."""

    connector: int
    whole: int
    alignment: int


def connector(data: Data, model: Path, steps: int) -> Path:
    """Train the connector alone, as LLaVA's first stage does."""
    return _sft(
        data,
        model,
        "stage1",
        adapter=NoAdapter(),
        trainable=(CONNECTOR,),
        optimizer=_rate(3e-4, steps),
        max_steps=steps,
    )


def whole(data: Data, model: Path, steps: int) -> Path:
    """Train LoRA on the decoder, and the connector beside it."""
    return _sft(
        data,
        model,
        "stage2",
        adapter=LoRAConfig(rank=16, alpha=32.0),
        trainable=(CONNECTOR,),
        optimizer=_rate(5e-4, steps, ratio=4.0),
        max_steps=steps,
    )


def align(data: Data, model: Path, pairs: Path, name: str, steps: int) -> Path:
    """Train LoRA on pairs with ``dpo`` or ``dpo2d``."""
    objectives = {
        "dpo": PairwiseConfig(name="sigmoid", beta=0.1),
        # Only what is wrong in a rejected answer is pushed down.
        "dpo2d": DPO2DConfig(beta=0.1, rejected_weight="inverted"),
    }
    return train(
        TrainConfig(
            **_common(data, model, pairs, name),
            objective=objectives[name],
            adapter=LoRAConfig(rank=16, alpha=32.0),
            optimizer=_rate(1e-4, steps),
            max_steps=steps,
        )
    )


def merged(run: Path, out: Path) -> Path:
    """Return a checkpoint with what a run trained in it; it is written once."""
    return out if out.is_dir() else publish_run(run, out, form="merged")


def _sft(data: Data, model: Path, name: str, **options: Any) -> Path:
    common = _common(data, model, data.train, name)
    return train(TrainConfig(**common, objective=SFTConfig(), **options))


def _common(data: Data, model: Path, file: Path, name: str) -> dict[str, Any]:
    return {
        "model": str(model),
        "data": str(file),
        "image_dir": str(data.folder),
        "image_features": "cached",
        "reference_cache": str(data.folder / "features"),
        "out": str(data.folder / name),
        "num_train_epochs": 1000,  # max_steps ends it
        "batch_rows": 1,
        "row_length": data.size.row_length,
        "max_length": 256,
        "save_steps": 50,
        "save_total_limit": 1,
        "logging_steps": 10,
        "report_to": "none",
    }


def _rate(peak: float, steps: int, ratio: float = 1.0) -> OptimizerConfig:
    return OptimizerConfig(
        learning_rate=peak,
        schedule="cosine",
        warmup_steps=min(10, steps // 4),
        loraplus_lr_ratio=ratio,
        b2=0.99,  # a memory of a hundred updates: there are only a few times as many
    )
