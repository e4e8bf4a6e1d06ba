"""``jaxalign demo``: the whole way on a laptop, from feedback to a checkpoint.

Fetches SmolLM2-135M-Instruct, has it answer a few prompts and judge its own answers,
sentence by sentence, as a round of RLAIF begins; then trains LoRA with 2D-DPO on the
packaged feedback, compares the held-out quarter before and after, and writes the merged
checkpoint, the PEFT adapter and report.html.
"""

import dataclasses
import functools
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from jaxalign.cli import devices, parsing
from jaxalign.whole_file import write_lines, write_text


if TYPE_CHECKING:
    from jaxalign.training.config import TrainConfig


__all__ = ["DemoConfig", "run"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Where to put things, and how long to train.

    Attributes:
      out: directory for everything.
      model: checkpoint to train; default fetches SmolLM2-135M-Instruct.
      max_steps: updates to make.
      seed: of the run.
    """

    out: str = "demo"
    model: str | None = None
    max_steps: int = 16
    seed: int = 0


HELD_OUT = 24
"""Records at the end of the packaged file that are never trained on."""

SAMPLED = 4
"""Prompts that the model answers, twice each."""


def run(arguments: Sequence[str]) -> int:
    """Parse and run the demo."""
    parser = parsing.make_parser("demo", DemoConfig, description=__doc__ or "")
    config = parsing.parse(parser, arguments, DemoConfig)
    devices.set_up_jax()
    began = time.monotonic()
    from jaxalign.training.preemption import Preempted, Preemption

    preemption = Preemption()
    preemption.install()
    try:
        _demo(config, preemption, began)
    except Preempted:
        return 42
    return 0


def split_sample(out: Path) -> tuple[Path, Path]:
    """Write the packaged records as a training and a held-out file."""
    from jaxalign.data import sample

    text = sample.path().read_text(encoding="utf-8")
    lines = text.splitlines(keepends=True)
    train, held = out / "train.jsonl", out / "held_out.jsonl"
    train.write_text("".join(lines[:-HELD_OUT]), encoding="utf-8")
    held.write_text("".join(lines[-HELD_OUT:]), encoding="utf-8")
    return train, held


def _sample_and_judge(
    model: str, records_file: Path, out: Path, seed: int
) -> dict[str, Any]:
    """Make two-dimensional feedback of the model's own answers; return its figures."""

    import numpy as np

    from jaxalign import progress
    from jaxalign.feedback import candidates, pairing
    from jaxalign.feedback.decompose import segments
    from jaxalign.feedback.segmenters import SegmenterConfig
    from jaxalign.generation.files import GenerateConfig, generate_file
    from jaxalign.judging.config import JudgeConfig
    from jaxalign.judging.make import make_judge
    from jaxalign.judging.store import Store

    out.mkdir(exist_ok=True)
    lines = records_file.read_text(encoding="utf-8").splitlines()[:SAMPLED]
    prompts = [{"prompt": json.loads(line)["prompt"]} for line in lines]
    write_lines(out / "prompts.jsonl", prompts)
    generate_file(
        GenerateConfig(
            model=model,
            data=str(out / "prompts.jsonl"),
            out=str(out / "samples.jsonl"),
            num_samples=2,
            max_new_tokens=48,
            dtype="fastest",
            seed=seed,
        )
    )
    judge = JudgeConfig(name="local", model=model, method="likelihood")
    with Store(out / "store.db") as store:
        judged = candidates.judge_candidates(
            candidates.read_samples(out / "samples.jsonl", SegmenterConfig()),
            segments.decomposer(judge.scored_aspects),
            make_judge(judge),
            store,
        )
    write_text(out / "judged.jsonl", candidates.to_lines(judged))
    preferences, _ = pairing.pair(
        candidates.scored(judged), pairing.PairingConfig(min_gap=0.05)
    )
    write_lines(out / "pairs.jsonl", preferences)
    scores = [score for one in judged for score in one.scores]
    figures = {
        "answers": sum(len(one.texts) for one in judged),
        "sentences": sum(len(j.segments) for one in judged for j in one.judged),
        "mean_score": round(float(np.mean(scores)), 3) if scores else None,
        "pairs": len(preferences),
    }
    progress.say(
        f"sampled {figures['answers']} answers, judged {figures['sentences']} "
        f"sentences of them: mean score {figures['mean_score']} of 4, "
        f"{figures['pairs']} pairs ({out / 'pairs.jsonl'})"
    )
    return figures


def _demo(config: DemoConfig, preemption: Any, began: float) -> None:
    from jaxalign.checkpoints import policy as policy_lib
    from jaxalign.checkpoints.fetch import fetch
    from jaxalign.reports.run import held_out_figures
    from jaxalign.training import metrics
    from jaxalign.training.run import train

    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    model = config.model or str(fetch("smollm2-135m", out / "smollm2-135m"))
    train_file, held_file = split_sample(out)
    feedback = _sample_and_judge(model, train_file, out / "feedback", config.seed)
    run_config = _run_config(config, model, train_file, held_file)
    run = train(run_config, preemption=preemption)
    policy = policy_lib.open_run(run)
    _publish(run, out, policy)
    examples = _examples(run_config, policy)
    results = _Results(
        run=run,
        figures=[figure for figure in held_out_figures(run) if figure.name != "loss"],
        examples=examples,
        feedback=feedback,
        seconds=time.monotonic() - began,
        peak_gb=metrics.peak_memory_gb(),
    )
    page = _report(out / "report.html", run_config, results)
    write_text(out / "summary.json", json.dumps(results.summary(), indent=2) + "\n")
    _print(results, out, page)


class _Results(NamedTuple):
    """What the demo has to show."""

    run: Path
    figures: Sequence[Any]
    """``reports.run.Figures`` of the held-out records."""
    examples: Sequence[Any]
    """``reports.run.Example`` of each held-out record."""
    feedback: dict[str, Any]
    """Figures of the model's judgement of its own answers."""
    seconds: float
    peak_gb: float

    def summary(self) -> dict[str, Any]:
        """Return the figures of ``summary.json``."""
        return {
            "seconds": round(self.seconds, 1),
            "peak_gb": round(self.peak_gb, 2),
            "sampled": self.feedback,
            **{
                figure.name.replace(" ", "_"): [figure.before, figure.after]
                for figure in self.figures
            },
        }


def _run_config(
    config: DemoConfig, model: str, train_file: Path, held_file: Path
) -> "TrainConfig":
    from jaxalign.adapters.lora import LoRAConfig
    from jaxalign.objectives.dpo2d import DPO2DConfig
    from jaxalign.training.config import TrainConfig
    from jaxalign.training.optimizer import OptimizerConfig

    return TrainConfig(
        model=model,
        dtype="fastest",
        data=str(train_file),
        eval_data=str(held_file),
        out=str(Path(config.out) / "run"),
        reference="cached",
        objective=DPO2DConfig(rejected_weight="inverted", normalize="mean1"),
        adapter=LoRAConfig(rank=16, alpha=32.0),
        optimizer=OptimizerConfig(
            learning_rate=2e-4, schedule="cosine", warmup_steps=min(2, config.max_steps)
        ),
        max_steps=config.max_steps,
        batch_rows=1,
        row_length=768,
        max_length=512,
        eval_steps=8,
        save_steps=8,
        logging_steps=1,
        seed=config.seed,
    )


def _publish(run: Path, out: Path, policy: Any) -> None:
    """Write what the run trained, unless an earlier start of the demo did."""
    from jaxalign.training import publish

    if not (out / "merged").exists():
        publish.publish_run(run, out / "merged", form="merged", policy=policy)
    if not (out / "adapter").exists():
        publish.publish_run(run, out / "adapter", form="peft", policy=policy)


def _examples(config: "TrainConfig", policy: Any) -> list[Any]:
    """Return the held-out records with what the trained model gives their segments."""
    from jaxalign.checkpoints.renderer import open_renderer
    from jaxalign.data import pairs, records
    from jaxalign.evaluation.score import PolicyAndReference, score_records
    from jaxalign.parallel import sharding
    from jaxalign.parallel.mesh import MeshConfig, make_mesh
    from jaxalign.reports.run import Example

    held_out = records.read(str(config.eval_data))
    model = policy.checkpoint.model
    results = score_records(
        pairs.prepare(held_out, open_renderer(config.model), max_length=None),
        PolicyAndReference(model, policy.variables, model, policy.base),
        objective=config.objective,
        row_length=config.row_length,
        put=functools.partial(sharding.put_batch, mesh=make_mesh(MeshConfig())),
    )
    return [
        Example(record, result)
        for record, result in zip(held_out, results, strict=True)
    ]


def _report(path: Path, config: "TrainConfig", results: _Results) -> Path:
    from jaxalign.data import records
    from jaxalign.objectives.objective import beta_of
    from jaxalign.reports.run import write_report
    from jaxalign.training import metrics

    return write_report(
        path,
        title="jaxalign demo: 2D-DPO on SmolLM2-135M-Instruct",
        run=results.run,
        figures=results.figures,
        examples=results.examples,
        facts={
            "steps": str(max(metrics.read(results.run / "metrics.jsonl"))),
            "training pairs": str(len(records.read(config.data))),
            "held-out pairs": str(len(results.examples)),
            "time": f"{results.seconds:.0f} s",
            "peak memory": f"{results.peak_gb:.2f} GB",
        },
        beta=beta_of(config.objective),
    )


def _print(results: _Results, out: Path, page: Path) -> None:
    from jaxalign import progress

    progress.say("")
    print(f"held out ({len(results.examples)} pairs)      before    after")
    for figure in results.figures:
        print(f"  {figure.name:20} {figure.before:8.3f} {figure.after:8.3f}")
    print(f"time {results.seconds:.0f} s, peak memory {results.peak_gb:.2f} GB")
    print(f"merged checkpoint: {out / 'merged'}")
    print(f"PEFT adapter:      {out / 'adapter'}")
    print(f"report:            {page}")
