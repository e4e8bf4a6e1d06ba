"""From a run to files that others load: checkpoint, adapter, model card."""

from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import yaml

from jaxalign import progress
from jaxalign.adapters import adapter
from jaxalign.adapters.adapter import NoAdapter
from jaxalign.checkpoints import adapter_files, contents, export
from jaxalign.checkpoints import load as load_lib
from jaxalign.checkpoints import policy as policy_lib
from jaxalign.checkpoints.gguf import convert_llama_gguf
from jaxalign.checkpoints.policy import Policy
from jaxalign.configs import to_dict
from jaxalign.errors import UserError
from jaxalign.training import metrics as metrics_lib
from jaxalign.training import run_directory
from jaxalign.training.config import TrainConfig


__all__ = [
    "Format",
    "model_card",
    "publish_adapted",
    "publish_model",
    "publish_run",
]

Format = Literal["merged", "peft"]

_ABOUT_LOADER = f""".

PEFT has no gates and no prefixes of some layers only, so the adapter brings its loader,
`{adapter_files.LOADER}` (the same as `jaxalign.adapters.torch_loader`), which needs
torch, transformers and peft alone:

```python
import sys

from transformers import AutoModelForCausalLM

sys.path.insert(0, path)
from {Path(adapter_files.LOADER).stem} import load

model = load(AutoModelForCausalLM.from_pretrained(base_model), path)
```

`lora/` is a stock PEFT adapter but for its gates; `prefix/prefix.safetensors` holds
keys (before the rotary embedding) and values of each layer."""


def publish_run(
    run: str | Path,
    out: str | Path,
    *,
    form: Format,
    step: int | None = None,
    max_shard_size: str | None = None,
    policy: Policy | None = None,
) -> Path:
    """Write what a run trained.

    An adapter that was trained on a quantised base is merged into the source's own
    weights, as PEFT's users do.

    Args:
      run: run directory.
      out: new directory.
      form: ``merged`` for a whole Hugging Face checkpoint, ``peft`` for the adapter.
      step: of the checkpoint; default the newest.
      max_shard_size: of a file of the merged checkpoint; default as in the base.
      policy: the run, if it is loaded already.
    Raises:
      UserError: no such run or step, no adapter to write, ``out`` is taken.
    Example::

      publish_run("run", "merged", form="merged")
      publish_run("run", "adapter", form="peft", step=500)
    """
    run, out = Path(run), Path(out)
    if max_shard_size is not None:
        export.parse_size(max_shard_size)
    config = run_directory.read_config(run)
    policy = _load(run, config, step, form) if policy is None else policy
    if form == "peft" and isinstance(config.adapter, NoAdapter):
        raise UserError(
            f"{run} trained base weights, so there is no adapter: use --format merged"
        )
    return _publish(
        policy,
        out,
        form=form,
        max_shard_size=max_shard_size,
        dropout=adapter.dropout(config.adapter),
        card=model_card(run, config, policy, form),
    )


def _load(run: Path, config: TrainConfig, step: int | None, form: Format) -> Policy:
    if config.quantize == "none" or form == "peft":
        return policy_lib.open_run(run, step=step)
    return policy_lib.open_run(run, step=step, dtype="auto", quantize="none")


def _publish(
    policy: Policy,
    out: Path,
    *,
    form: Format,
    max_shard_size: str | None,
    dropout: float = 0.0,
    card: str | None = None,
) -> Path:
    if form == "peft":
        return adapter_files.save_adapter(
            policy.checkpoint, policy.adapter(), out, dropout=dropout, card=card
        )
    return export.save_hf(
        policy.variables,
        out,
        like=policy.checkpoint,
        max_shard_size=max_shard_size,
        card=card,
    )


def publish_adapted(
    model: str | Path,
    adapter_path: str | Path,
    out: str | Path,
    *,
    form: Format,
    max_shard_size: str | None = None,
) -> Path:
    """Write a checkpoint with an adapter merged in, or the adapter anew.

    Raises:
      UserError: the adapter does not fit or cannot be merged, or ``out`` is taken.
    Example::

      publish_adapted("smollm2", "adapter", "merged", form="merged")
    """
    model, adapter_path, out = str(model), str(adapter_path), Path(out)
    if max_shard_size is not None:
        export.parse_size(max_shard_size)
    _refuse_float64(model)
    policy = policy_lib.open_policy(model, adapter_path, dtype="auto")
    return _publish(policy, out, form=form, max_shard_size=max_shard_size)


def publish_model(
    model: str | Path, out: str | Path, *, max_shard_size: str | None = None
) -> Path:
    """Write a checkpoint as it was loaded: the same names, dtypes and bits.

    A GGUF file becomes a checkpoint in float32.

    Raises:
      UserError: it cannot be loaded, has weights that would lose bits, or ``out`` is
        taken.
    Example::

      publish_model("smollm2-q4.gguf", "smollm2")
    """
    model, out = str(model), Path(out)
    if Path(model).suffix == ".gguf":
        if max_shard_size is not None:
            raise UserError("--max_shard_size has no effect with a GGUF file")
        convert_llama_gguf(Path(model), out)
        return out
    if max_shard_size is not None:
        export.parse_size(max_shard_size)
    _refuse_float64(model)
    with progress.reading(f"loading {model}") as show:
        checkpoint = load_lib.load(model, dtype="auto", progress=show)
    return export.save_hf(
        checkpoint.variables, out, like=checkpoint, max_shard_size=max_shard_size
    )


def _refuse_float64(model: str) -> None:
    load_lib.open_config(model)
    if "float64" in {i.dtype for i in contents.tensor_infos(model).values()}:
        raise UserError(
            f"{model} has float64 weights, which would be rounded: save it in float32"
        )


def model_card(run: Path, config: TrainConfig, policy: Policy, form: Format) -> str:
    """Return README.md of an export: what it is, how it was made, what it measured.

    Args:
      run: its directory.
      config: of the run.
      policy: what is exported.
      form: ``peft`` or ``merged``.
    Example::

      card = model_card(run, run_directory.read_config(run), open_policy(model, "run"),
                        "merged")
    """
    steps = metrics_lib.read(run / "metrics.jsonl")
    shown = _shown_metrics(steps, policy.step)
    kind = "ImageTextToText" if policy.checkpoint.config.sees else "CausalLM"
    load, about = f"AutoModelFor{kind}.from_pretrained(path)", "."
    if form == "peft":
        load = "PeftModel.from_pretrained(base_model, path)"
        if not adapter_files.is_stock(policy.checkpoint, policy.adapter()):
            load = f"{Path(adapter_files.LOADER).stem}.load(base_model, path)"
            about = _ABOUT_LOADER
    head = {
        "base_model": policy.checkpoint.name,
        "library_name": "transformers" if form == "merged" else "peft",
        "tags": ["jaxalign", config.objective.name],
    }
    settings = _without_paths(to_dict(config))
    version = metadata.version("jaxalign")
    return (
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n\n"
        f"# {policy.checkpoint.name} aligned with {config.objective.name}\n\n"
        f"Trained with jaxalign {version} for {policy.step} steps. "
        f"{_about_base(config, form)}Load it with `{load}`{about}\n\n"
        f"## Metrics\n\n{shown}\n\n"
        f"## Settings\n\n```yaml\n{yaml.safe_dump(settings, sort_keys=False)}```\n"
    )


def _about_base(config: TrainConfig, form: Format) -> str:
    if config.quantize == "none":
        return ""
    trained = f"The base weights were held as {config.quantize} codes in training"
    if form == "merged":
        return f"{trained}; the adapter is merged into the unquantised ones. "
    return f"{trained}; load them in any precision. "


_PATHS = (
    *("model", "data", "eval_data", "out", "reference", "reference_cache"),
    *("path", "positive_model", "negative_model"),
)


def _without_paths(settings: dict[str, Any]) -> dict[str, Any]:
    """Leave the last name of each path: the rest is about a machine, not the model."""

    def shown(name: str, value: Any) -> Any:
        if isinstance(value, dict):
            return _without_paths(value)
        path = name in _PATHS and isinstance(value, str)
        return Path(value).name if path else value

    return {name: shown(name, value) for name, value in settings.items()}


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
