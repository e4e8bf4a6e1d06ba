"""Two rounds of RLAIF on SmolLM2 with a judge that needs no network.

    jaxalign fetch smollm2-135m --out smollm2
    python experiments/rlaif_smollm2.py --model smollm2 --out rlaif

The policy is SmolLM2-135M-Instruct and so is the judge, which scores every sentence by
its likelihood. Prompts are those of the packaged feedback: the first 48 for the rounds,
the last 24 for the gate, which takes two completions of each. What this can show is
that the loop works and does what the judge wants; ``judge_agreement.py`` measures how
far that is what people want.

Prints what the gate said of each round, the mean score and length of the candidates,
and writes OUT/report.html. 20 to 25 minutes on two quiet cores; give the same command
again to go on after a stop.
"""

import argparse
import importlib.resources
import json
from pathlib import Path
from typing import Any

import numpy as np

from jaxalign.adapters.lora import LoRAConfig
from jaxalign.cli import devices
from jaxalign.feedback.candidates import from_lines
from jaxalign.feedback.config import (
    GateConfig,
    GenerationOptions,
    RLAIFConfig,
    TrainingOptions,
)
from jaxalign.feedback.pairing import PairingConfig
from jaxalign.feedback.rounds import rlaif, store_path
from jaxalign.judging.config import JudgeConfig
from jaxalign.judging.store import Store
from jaxalign.objectives.dpo2d import DPO2DConfig
from jaxalign.reports import rounds as rounds_report
from jaxalign.training.optimizer import OptimizerConfig


def main() -> None:
    """Run the rounds and print what came of them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--max_steps", type=int, default=16)
    args = parser.parse_args()
    out = Path(args.out)
    train, held = _prompts(out.with_name(f"{out.name}_prompts"))
    devices.set_up_jax()
    config = RLAIFConfig(
        model=args.model,
        prompts=str(train),
        out=str(out),
        rounds=args.rounds,
        judge=JudgeConfig(name="local", model=args.model, method="likelihood"),
        generation=GenerationOptions(num_samples=4, max_new_tokens=96),
        pairing=PairingConfig(
            min_gap=0.1, max_pairs_per_prompt=2, max_length_ratio=2.0
        ),
        objective=DPO2DConfig(rejected_weight="inverted", normalize="mean1"),
        adapter=LoRAConfig(rank=16, alpha=32.0),
        optimizer=OptimizerConfig(
            learning_rate=2e-4, schedule="cosine", warmup_steps=2
        ),
        training=TrainingOptions(
            max_steps=args.max_steps, batch_rows=1, row_length=768, logging_steps=1
        ),
        gate=GateConfig(prompts=str(held), num_samples=2),
    )
    rlaif(config)
    with Store(store_path(config)) as store:
        rounds_report.write(out, config, store)
    print("| round | candidates' score | words | gate before | after | ± | accepted |")
    print("|---:|---:|---:|---:|---:|---:|---|")
    for number in range(1, args.rounds + 1):
        here = out / f"round-{number}"
        found = json.loads((here / "gate.json").read_text(encoding="utf-8"))
        judged = from_lines(here / "judged.jsonl")
        scores = [score for one in judged for score in one.scores]
        words = [len(text.split()) for one in judged for text in one.texts]
        print(
            f"| {number} | {np.mean(scores):.3f} | {np.mean(words):.0f} | "
            f"{_shown(found['before'])} | {_shown(found['after'])} | "
            f"{_shown(found['standard_error'])} | {found['accepted']} |"
        )
    print(f"report: {out / 'report.html'}")


def _shown(value: Any) -> str:
    return "-" if value is None else f"{value:.3f}"


def _prompts(folder: Path) -> tuple[Path, Path]:
    """Write the packaged prompts, each once, in a file for the rounds and another."""
    folder.mkdir(parents=True, exist_ok=True)
    sample = importlib.resources.files("jaxalign.data") / "samples"
    text = (sample / "two_dimensional_feedback.jsonl").read_text(encoding="utf-8")
    prompts = list(
        dict.fromkeys(json.dumps(json.loads(x)["prompt"]) for x in text.splitlines())
    )
    files = folder / "train.jsonl", folder / "held_out.jsonl"
    for path, some in zip(files, (prompts[:48], prompts[-24:]), strict=True):
        lines = "".join(f'{{"prompt": {prompt}}}\n' for prompt in some)
        path.write_text(lines, encoding="utf-8")
    return files


if __name__ == "__main__":
    main()
