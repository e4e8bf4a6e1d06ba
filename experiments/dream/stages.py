"""The stages of DREAM as commands of this library, each with a directory of its own."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from dream.plan import EVALUATIONS, Scale


__all__ = ["Run", "Stage", "stages"]

_GATE = {"unsafe": "lower", "refused_benign": "lower", "effective": "higher"}
_TOLERANCE = 0.02
_GLOBAL_WEIGHT = 0.5
_PAIRS_OF_UPDATE = 8
_ROWS = 4
"""Of an update: two pairs of LLaVA-1.5's size fit into one."""
_WARMUP = 0.05
_LENGTH = 2048


class Run(NamedTuple):
    """What a run is of."""

    model: str
    prompts: Path
    gate_prompts: Path
    out: Path
    data_dir: str | None
    """Of the benchmarks; None leaves the evaluation out."""
    objective: str
    """``sigmoid`` (DPO) or ``dpo2d``."""
    tasks: Sequence[str]
    judge: Sequence[str]
    """Flags ``--judge.*``, the same for all stages."""
    teacher: Sequence[str]
    """``--teacher DIR`` or flags ``--endpoint.*``."""


class Stage(NamedTuple):
    """A command."""

    name: str
    arguments: list[str]
    """Behind ``jaxalign``."""
    makes: Path | None = None
    """What is not made a second time, of a command that would refuse to."""


def stages(run: Run, scale: Scale) -> Iterator[Stage]:
    """Yield the commands in their order, each when those before it have run.

    Args:
      run: what it is of.
      scale: rounds, candidates, epochs and lengths.
    """
    out, prompts = run.out, str(run.prompts)
    seen, taught = out / "observations.jsonl", out / "distilled.jsonl"
    store = ["--store", str(out / "judgements.db")]
    files = ["--data", prompts, "--out"]
    yield Stage("disentangle", ["disentangle", *files, str(seen), *store, *run.judge])
    context = ["--context", str(seen)]
    yield Stage(
        "distill",
        ["distill", *files, str(taught), *context, *run.teacher, *run.judge],
    )
    supervised, model = out / "supervised", out / "supervised-model"
    yield Stage("supervised stage", _supervised(run, taught, supervised, scale))
    export = ["export", "--run", str(supervised), "--out", str(model)]
    yield Stage("its checkpoint", export, model)
    rounds = out / "rounds"
    yield Stage("rounds", _rounds(run, model, rounds, store, scale))
    if run.data_dir is None:
        return
    yield Stage("evaluation before", _evaluation(run, run.model, None, "eval-before"))
    adapter = rounds / "export"
    # Where no round was accepted, the supervised stage's policy is the last.
    kept = adapter if adapter.is_dir() or not rounds.is_dir() else None
    yield Stage("evaluation after", _evaluation(run, str(model), kept, "eval-after"))
    pair = [str(out / name) for name in ("eval-before", "eval-after")]
    yield Stage("comparison", ["compare", *pair, "--out", str(out / "compare.html")])


def _supervised(run: Run, data: Path, out: Path, scale: Scale) -> list[str]:
    return [
        *("train", "--model", run.model, "--data", str(data), "--out", str(out)),
        *("--image_dir", str(run.prompts.parent), "--objective.name", "sft"),
        *("--num_train_epochs", str(scale.supervised_epochs)),
        *("--optimizer.learning_rate", "2e-4", *_schedule(1)),
        *("--batch_rows", str(_ROWS), *_lengths("")),
    ]


def _rounds(
    run: Run, model: Path, out: Path, store: list[str], scale: Scale
) -> list[str]:
    steps = scale.epochs * scale.pairs * scale.count // _PAIRS_OF_UPDATE
    return [
        *("rlaif", "--model", str(model), "--prompts", str(run.prompts)),
        *("--out", str(out), "--rounds", str(scale.rounds), *store, *run.judge),
        *("--decomposer.name", "risks"),
        *("--decomposer.global_weight", str(_GLOBAL_WEIGHT)),
        *("--generation.num_samples", str(scale.candidates)),
        *("--generation.temperature", "0.7"),
        *("--generation.max_new_tokens", "512"),
        *("--pairing.max_pairs_per_prompt", str(scale.pairs)),
        *("--pairing.strategy", "random", "--pairing.min_gap", "0.1"),
        *("--pairing.length_balance", "true"),
        *("--objective.name", run.objective, "--objective.beta", "0.1"),
        *("--optimizer.learning_rate", "1e-5", *_schedule(steps)),
        *("--training.max_steps", str(steps)),
        *("--training.batch_rows", str(_ROWS), *_lengths("training.")),
        *("--gate.prompts", str(run.gate_prompts)),
        *("--gate.metrics", json.dumps(_GATE), "--gate.tolerance", str(_TOLERANCE)),
    ]


def _evaluation(run: Run, model: str, adapter: Path | None, name: str) -> list[str]:
    assert run.data_dir is not None
    return [
        *("eval", "--tasks", ",".join(run.tasks or EVALUATIONS)),
        *("--data_dir", run.data_dir, "--model", model),
        *([] if adapter is None else ["--adapter", str(adapter)]),
        *("--out", str(run.out / name), *run.judge),
    ]


def _schedule(steps: int) -> list[str]:
    warmup = str(round(_WARMUP * steps))
    return [
        *("--optimizer.schedule", "cosine", "--optimizer.warmup_steps", warmup),
        *("--optimizer.weight_decay", "0.01"),
    ]


def _lengths(prefix: str) -> list[str]:
    return [
        *(f"--{prefix}row_length", str(_LENGTH)),
        *(f"--{prefix}max_length", str(_LENGTH)),
    ]
