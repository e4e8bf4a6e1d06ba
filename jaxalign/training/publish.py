"""From a run to files that others load: checkpoint, adapter, model card."""

from pathlib import Path
from typing import Any, Literal

import jax
import yaml

import jaxalign
from jaxalign.checkpoints import export
from jaxalign.checkpoints import load as load_lib
from jaxalign.errors import UserError
from jaxalign.training import metrics as metrics_lib
from jaxalign.training import restore
from jaxalign.training.config import NoAdapter, to_dict
from jaxalign.training.restore import Restored


__all__ = ["Format", "model_card", "publish_model", "publish_run"]

Format = Literal["merged", "peft"]


def publish_run(
    run: Path,
    out: Path,
    *,
    form: Format,
    step: int | None = None,
    max_shard_size: str | None = None,
    restored: Restored | None = None,
) -> Path:
    """Write what a run trained.

    Args:
      run: run directory.
      out: new directory.
      form: ``merged`` for a whole Hugging Face checkpoint, ``peft`` for the adapter.
      step: of the checkpoint; default the newest.
      max_shard_size: of a file of the merged checkpoint; default as in the base.
      restored: the run, if it is loaded already.
    Raises:
      UserError: no such run or step, no adapter to write, ``out`` is taken.
    """
    if max_shard_size is not None:
        export.parse_size(max_shard_size)
    restored = restore.load_run(run, step=step) if restored is None else restored
    card = model_card(run, restored, form)
    config = restored.config
    if form == "merged":
        return export.save_hf(
            restored.checkpoint,
            restored.variables,
            out,
            max_shard_size=max_shard_size,
            card=card,
        )
    if config is None or isinstance(config.adapter, NoAdapter):
        raise UserError(
            f"{run} trained base weights, so there is no adapter: use --format merged"
        )
    return export.save_peft(
        restored.checkpoint,
        restored.variables["lora"],
        out,
        dropout=config.adapter.dropout,
        card=card,
    )


def publish_model(model: str, out: Path, *, max_shard_size: str | None = None) -> Path:
    """Write a checkpoint as it was loaded: the same names, dtypes and bits.

    Raises:
      UserError: it cannot be loaded, has weights that would lose bits, or ``out`` is
        taken.
    """
    if max_shard_size is not None:
        export.parse_size(max_shard_size)
    load_lib.open_config(model)
    dtypes = {i.dtype for i in load_lib.source_info(Path(model)).values()}
    if "float64" in dtypes:
        raise UserError(
            f"{model} has float64 weights, which would be rounded: save it in float32"
        )
    # Through float32 only where the source has it, so that no bit is lost.
    dtype = "float32" if dtypes != {"bfloat16"} else "bfloat16"
    checkpoint = load_lib.load(model, dtype=jax.numpy.dtype(dtype))
    return export.save_hf(
        checkpoint, checkpoint.variables, out, max_shard_size=max_shard_size
    )


def model_card(run: Path, restored: Restored, form: Format) -> str:
    """Return README.md of an export: what it is, how it was made, what it measured."""
    config = restored.config
    assert config is not None
    steps = metrics_lib.read(run / "metrics.jsonl")
    shown = _shown_metrics(steps, restored.step)
    load = (
        "AutoModelForCausalLM.from_pretrained(path)"
        if form == "merged"
        else "PeftModel.from_pretrained(base_model, path)"
    )
    head = {
        "base_model": restored.checkpoint.path.name,
        "library_name": "transformers" if form == "merged" else "peft",
        "tags": ["jaxalign", config.objective.name],
    }
    settings = to_dict(config)
    for name in ("model", "data", "eval_data", "out", "reference", "reference_cache"):
        # Paths tell about the machine, not about the model.
        settings[name] = Path(settings[name]).name if settings[name] else None
    return (
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n\n"
        f"# {restored.checkpoint.path.name} aligned with {config.objective.name}\n\n"
        f"Trained with jaxalign {jaxalign.__version__} for {restored.step} steps. "
        f"Load it with `{load}`.\n\n"
        f"## Metrics\n\n{shown}\n\n"
        f"## Settings\n\n```yaml\n{yaml.safe_dump(settings, sort_keys=False)}```\n"
    )


def _shown_metrics(steps: dict[int, dict[str, Any]], last: int | None) -> str:
    upto = [values for step, values in steps.items() if last is None or step <= last]
    if not upto:
        return "None were recorded."
    rows = [
        f"| {name} | {value:.4g} |"
        for name, value in upto[-1].items()
        if isinstance(value, int | float) and name != "time"
    ]
    return "\n".join(["| metric | last value |", "|---|---|", *rows])
