"""DREAM's stages on drawings whose rule is known: each a directory that goes on."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from tiny_vlm.scoring import Share, share
from tiny_vlm.training import CONNECTOR, merged

from dream import rules
from dream.marked import ANSWER, DECLINED, Files
from jaxalign.adapters.lora import LoRAConfig
from jaxalign.data.images import NamedPictures
from jaxalign.feedback import gate, gate_metrics
from jaxalign.feedback.candidates import judge_candidates, read_samples
from jaxalign.feedback.config import GenerationOptions, RLAIFConfig, TrainingOptions
from jaxalign.feedback.decompose.config import DecomposerConfig
from jaxalign.feedback.disentangle import disentangle
from jaxalign.feedback.distill import distill
from jaxalign.feedback.gate_config import WANTED, GateConfig
from jaxalign.feedback.pairing import PairingConfig
from jaxalign.feedback.round_prompts import with_benign
from jaxalign.feedback.rounds import rlaif
from jaxalign.feedback.segmenters import SegmenterConfig
from jaxalign.generation.files import GenerateConfig, generate_file
from jaxalign.judging.config import JudgeConfig
from jaxalign.objectives.dpo2d import DPO2DConfig
from jaxalign.objectives.options import ObjectiveConfig
from jaxalign.objectives.pairwise import PairwiseConfig
from jaxalign.objectives.sft import SFTConfig
from jaxalign.training.config import TrainConfig
from jaxalign.training.optimizer import OptimizerConfig
from jaxalign.training.run import train
from jaxalign.whole_file import write_lines, write_text


__all__ = [
    "ARMS",
    "Arm",
    "Figures",
    "Steps",
    "careless",
    "lines",
    "measured",
    "plain",
    "run_arm",
]

_TOKENS = 20
_ROW = 256
_TOLERANCE = 0.05
"""Of the gate: two of its forty pictures a side."""

Function = Callable[[Sequence[Mapping[str, Any]]], list[Any]]


class Steps(NamedTuple):
    """Updates of each stage."""

    careless: int
    supervised: int
    preference: int
    """Of all rounds together."""


class Arm(NamedTuple):
    """What is done, and what is left out. All arms of a seed take as many updates."""

    judge: Function = rules.judge_stepwise
    supervised: Literal["told", "refusals", "none"] = "told"
    """Whose answers: those of the teacher that is told of risks, or refusals alone."""
    objective: str = "dpo2d"
    rounds: int = 2
    """0: the updates of the rounds are supervised ones, and the gate compares what they
    made with the careless policy."""


ARMS = {
    "full": Arm(),
    "without disentangling": Arm(judge=rules.judge_once),
    "without the supervised stage": Arm(supervised="none"),
    "supervised alone": Arm(rounds=0),
    "DPO": Arm(objective="dpo"),
    "one round": Arm(rounds=1),
    "refusals alone": Arm(supervised="refusals", rounds=0),
}


class Figures(NamedTuple):
    """What a policy does on held-out pictures."""

    unsafe: Share
    """Marked pictures that it does not decline to name."""
    refused: Share
    """Harmless twins that it declines to name."""
    named: Share
    """Harmless twins that it names; the rest is neither."""


def careless(files: Files, model: Path, out: Path, steps: int) -> Path:
    """Return the checkpoint that names whatever it is shown, made once for all arms."""
    rows = [_taught(row, row["named"]) for row in lines(files.taught)]
    return _sft(files, rows, model, out, steps, seed=0)


def run_arm(
    arm: Arm, files: Files, start: Path, out: Path, steps: Steps, seed: int
) -> dict[str, Any]:
    """Run an arm with a seed, or what is left of it.

    Args:
      arm: what is done.
      files: prompts.
      start: the careless checkpoint.
      out: directory of the arm and seed; the supervised stage lies beside it, where
        other arms of the seed find it.
      steps: updates.
      seed: of everything that is drawn.
    Returns:
      ``final``, the figures as [counted, of]; ``gates``, what was said of each round;
      ``seconds``, None if the arm was begun before. A supervised stage that another arm
      of the seed has made takes none.
    """
    result = out / "result.json"
    if result.is_file():
        return json.loads(result.read_text(encoding="utf-8"))
    fresh, began = not out.exists(), time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    model, preference = start, steps.preference
    if arm.supervised == "none":
        preference += steps.supervised
    else:
        updates = steps.supervised + (0 if arm.rounds else preference)
        model = _supervised(arm, files, start, out.parent, updates, seed)
    adapter = None
    if not arm.rounds:
        gates = [_gated(files, start, model, out)]
    else:
        adapter, gates = _rounds(arm, files, model, out / "rounds", preference, seed)
    found = measured(files, model, adapter, out / "answers.jsonl")
    made = {
        "seed": seed,
        "final": plain(found),
        "gates": gates,
        "seconds": round(time.monotonic() - began) if fresh else None,
    }
    write_text(result, json.dumps(made, indent=2) + "\n")
    return made


def measured(files: Files, model: Path, adapter: Path | None, out: Path) -> Figures:
    """Return what a policy says to the held-out pictures, the likeliest answer each."""
    _answer(files, files.held_out, model, adapter, out)
    said = [
        (row["benign"], line["completions"][0]["text"])
        for row, line in zip(lines(files.held_out), lines(out), strict=True)
    ]
    declined = {
        benign: [rules.declines(text) for kind, text in said if kind is benign]
        for benign in (False, True)
    }
    return Figures(
        share(not one for one in declined[False]),
        share(declined[True]),
        share(text.strip().startswith(ANSWER) for kind, text in said if kind),
    )


def _answer(
    files: Files, data: Path, model: Path, adapter: Path | None, out: Path
) -> None:
    generate_file(
        GenerateConfig(
            model=str(model),
            adapter=None if adapter is None else str(adapter),
            data=str(data),
            image_dir=str(files.folder),
            out=str(out),
            temperature=0.0,
            max_new_tokens=_TOKENS,
        )
    )


def lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a file."""
    return [json.loads(x) for x in path.read_text(encoding="utf-8").splitlines()]


def plain(figures: Figures) -> dict[str, list[int]]:
    """Return figures as [counted, of] by name."""
    return {name: [one.right, one.of] for name, one in figures._asdict().items()}


def _taught(row: Mapping[str, Any], said: str) -> dict[str, Any]:
    answer = [{"role": "assistant", "content": said}]
    return {"prompt": row["prompt"], "images": row["images"], "completion": answer}


def _supervised(
    arm: Arm, files: Files, start: Path, beside: Path, steps: int, seed: int
) -> Path:
    """Train on the teacher's answers; it was told what was observed, the model is not.

    Arms of a seed that differ in nothing of this share it.
    """
    # Whether a picture is harmless the teacher is not told: what was observed decides.
    asked = [_taught(row, row["named"]) for row in lines(files.taught)]
    if arm.supervised == "refusals":
        rows, name = [_taught(row, DECLINED) for row in asked], "refusals"
    else:
        judge, name = arm.judge, arm.judge.__name__
        seen = disentangle(asked, judge, image_dir=files.folder)
        context: Any = {"context": seen, "image_dir": files.folder}
        rows = distill(asked, rules.teacher, judge, **context).records
    out = beside / f"supervised-{name}-{steps}"
    return _sft(files, rows, start, out, steps, seed)


def _sft(
    files: Files,
    rows: list[dict[str, Any]],
    model: Path,
    out: Path,
    steps: int,
    seed: int,
) -> Path:
    data = out.with_name(f"{out.name}.jsonl")
    data.parent.mkdir(parents=True, exist_ok=True)
    write_lines(data, rows)
    run = train(
        TrainConfig(
            model=str(model),
            data=str(data),
            image_dir=str(files.folder),
            image_features="cached",
            reference_cache=str(files.folder / "features"),
            out=str(out),
            objective=SFTConfig(),
            adapter=LoRAConfig(rank=16, alpha=32.0),
            trainable=(CONNECTOR,),
            optimizer=_rate(5e-4, steps),
            num_train_epochs=1000,  # max_steps ends it
            max_steps=steps,
            batch_rows=2,
            row_length=_ROW,
            max_length=_ROW,
            save_steps=50,
            save_total_limit=1,
            logging_steps=10,
            report_to="none",
            seed=seed,
        )
    )
    return merged(run, out.with_name(f"{out.name}-model"))


def _rounds(
    arm: Arm, files: Files, model: Path, out: Path, steps: int, seed: int
) -> tuple[Path | None, list[dict[str, Any]]]:
    """Run the rounds; return the last accepted adapter and what the gate said."""
    each = steps // arm.rounds
    objectives: dict[str, ObjectiveConfig] = {
        "dpo": PairwiseConfig(name="sigmoid", beta=0.1),
        "dpo2d": DPO2DConfig(beta=0.1, rejected_weight="inverted"),
    }
    rlaif(
        RLAIFConfig(
            model=str(model),
            prompts=str(files.rounds),
            out=str(out),
            rounds=arm.rounds,
            seed=seed,
            judge=JudgeConfig(name="python", concurrency=64),
            generation=GenerationOptions(num_samples=4, max_new_tokens=_TOKENS),
            decomposer=DecomposerConfig(name="risks", global_weight=0.5),
            pairing=PairingConfig(min_gap=0.1, max_pairs_per_prompt=1),
            objective=objectives[arm.objective],
            adapter=LoRAConfig(rank=16, alpha=32.0),
            optimizer=_rate(2e-4, each),
            training=TrainingOptions(
                max_steps=each, batch_rows=2, row_length=_ROW, logging_steps=4
            ),
            gate=GateConfig(
                prompts=str(files.gate),
                metrics=dict(WANTED),
                tolerance=_TOLERANCE,
            ),
        ),
        judge=arm.judge,
    )
    gates = [
        json.loads((out / f"round-{n}" / "gate.json").read_text(encoding="utf-8"))
        for n in range(1, arm.rounds + 1)
    ]
    export = out / "export"
    return (export if export.is_dir() else None), gates


def _gated(files: Files, start: Path, model: Path, out: Path) -> dict[str, Any]:
    """Return what the gate of the rounds says of a policy after the careless one."""
    benign = [row["benign"] for row in lines(files.gate)]
    sides = []
    for name, policy in (("before", start), ("after", model)):
        path, pictures = out / f"gate-{name}.jsonl", NamedPictures()
        _answer(files, files.gate, policy, None, path)
        seen: Any = {"image_dir": files.folder, "pictures": pictures}
        sampled = read_samples(path, SegmenterConfig(), **seen)
        judged = judge_candidates(
            with_benign(sampled, benign),
            gate_metrics.decomposer(WANTED),
            rules.judge_stepwise,
            load_image=pictures.load,
        )
        sides.append(judged)
    before, after = sides
    decision = gate_metrics.decide(before, after, WANTED, tolerance=_TOLERANCE)
    return {"round": 0, **gate.to_dict(decision)}


def _rate(peak: float, steps: int) -> OptimizerConfig:
    return OptimizerConfig(
        learning_rate=peak,
        schedule="cosine",
        warmup_steps=min(8, steps // 4),
        b2=0.99,  # a memory of a hundred updates: there are only a few times as many
    )
