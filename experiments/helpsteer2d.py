"""From prompts to two-dimensional feedback to a better model: HelpSteer-2D in small.

    python experiments/helpsteer2d.py --model smollm2 --prompts prompts.jsonl \
        --held_out held.jsonl --out helpsteer2d \
        --base_url http://127.0.0.1:8000/v1 --judge_model M

The way of HelpSteer-2D (https://arxiv.org/abs/2410.19720): several answers to each
prompt are cut into sentences, and a judge scores each sentence on helpfulness,
correctness, safety, completeness and clarity, 0 to 4, each on its own rubric. Answers
whose mean scores are far enough apart become pairs, 2D-DPO trains on them, and the
held-out pairs, made in the same way, tell whether the model now prefers what the judge
does. All of it is written with the library's functions, for people who want to change
a step; ``jaxalign rlaif`` is the same in one command, several times over.

Without ``--base_url`` the model is its own judge, by likelihood. Every step's file is
kept: what is there is not made again. With 24 + 12 prompts and SmolLM2 as its own judge
about 10 minutes on two quiet cores.
"""

import argparse
import asyncio
import json
from pathlib import Path

from jaxalign.adapters.lora import LoRAConfig
from jaxalign.cli import devices
from jaxalign.feedback import candidates, pairing
from jaxalign.feedback.decompose import segments
from jaxalign.feedback.segmenters import SegmenterConfig
from jaxalign.generation.files import GenerateConfig, generate_file
from jaxalign.judging.config import JudgeConfig
from jaxalign.judging.make import make_judge
from jaxalign.judging.store import Store
from jaxalign.objectives.dpo2d import DPO2DConfig
from jaxalign.reports import run as run_report
from jaxalign.training.config import TrainConfig
from jaxalign.training.optimizer import OptimizerConfig
from jaxalign.training.run import train
from jaxalign.whole_file import write_lines


def main() -> None:
    """Build feedback, train and evaluate."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--prompts", required=True)
    parser.add_argument("--held_out", required=True, help="prompts to evaluate on")
    parser.add_argument("--out", required=True)
    parser.add_argument("--base_url", help="of a judge that speaks OpenAI's protocol")
    parser.add_argument("--judge_model", help="its name there")
    parser.add_argument("--num_samples", type=int, default=4)
    parser.add_argument("--max_new_tokens", type=int, default=96)
    parser.add_argument("--min_gap", type=float, default=0.1)
    parser.add_argument("--max_steps", type=int, default=24)
    args = parser.parse_args()
    devices.set_up_jax()
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    judge = JudgeConfig(name="local", model=args.model, method="likelihood")
    if args.base_url:
        judge = JudgeConfig(base_url=args.base_url, model=args.judge_model)
    files = {
        name: _feedback(out, name, prompts, judge, args)
        for name, prompts in (("train", args.prompts), ("held_out", args.held_out))
    }
    run = train(
        TrainConfig(
            model=args.model,
            data=str(files["train"]),
            eval_data=str(files["held_out"]),
            out=str(out / "run"),
            reference="cached",
            objective=DPO2DConfig(rejected_weight="inverted", normalize="mean1"),
            adapter=LoRAConfig(rank=16, alpha=32.0),
            optimizer=OptimizerConfig(learning_rate=2e-4, schedule="cosine"),
            max_steps=args.max_steps,
            batch_rows=1,
            row_length=768,
            max_length=512,
            eval_steps=args.max_steps,
            logging_steps=1,
        )
    )
    print("| held out | before | after |\n|---|---:|---:|")
    for figure in run_report.held_out_figures(run):
        print(f"| {figure.name} | {figure.before:.3f} | {figure.after:.3f} |")


def _feedback(
    out: Path, name: str, prompts: str, judge: JudgeConfig, args: argparse.Namespace
) -> Path:
    """Make the records of a file of prompts and return their file."""
    samples, pairs = out / f"{name}_samples.jsonl", out / f"{name}_pairs.jsonl"
    if pairs.exists():
        return pairs
    generate_file(
        GenerateConfig(
            model=args.model,
            data=prompts,
            out=str(samples),
            num_samples=args.num_samples,
            max_new_tokens=args.max_new_tokens,
        )
    )
    asked = candidates.read_samples(samples, SegmenterConfig())
    with Store(out / "store.db") as store:
        judged = asyncio.run(
            candidates.judge_candidates_async(
                asked,
                segments.decomposer(judge.scored_aspects),
                make_judge(judge),
                store,
                votes=judge.votes,
            )
        )
    found, statistics = pairing.pair(
        candidates.scored(judged), pairing.PairingConfig(min_gap=args.min_gap)
    )
    print(f"{name}: {len(found)} pairs; {json.dumps(statistics.fates)}")
    write_lines(pairs, found)
    return pairs


if __name__ == "__main__":
    main()
