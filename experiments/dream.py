"""DREAM, whole: from prompts with pictures to a model that knows their risks.

    python experiments/dream.py --dry_run
    python experiments/dream.py --model llava-1.5-7b --prompts data/prompts.jsonl \
        --gate_prompts data/gate.jsonl --data_dir data --out dream \
        --endpoint.base_url URL --endpoint.model TEACHER --judge.model JUDGE

DREAM (https://arxiv.org/abs/2504.18053) published its data and its prompts, and no
program. These are its stages as commands of this library, on any vision-language
checkpoint here: ``disentangle`` the risks in each prompt; ``distill`` the answers of a
teacher that is told of them, and train on these without them; ``rlaif`` rounds whose
score is that of the risks handled and of the whole, each accepted only if it is safer
and neither refuses what is harmless nor helps less; ``eval`` before and after, with
safety and over-refusal in the same run, and ``compare``.

Prompts are lines of ``{"prompt", "images"}``, harmless ones among them; the gate's also
say ``"benign": true`` or ``false`` and are no benchmark's. ``--judge.*`` goes to every
command, ``--teacher DIR`` or ``--endpoint.*`` to the teacher, ``--tasks`` names other
benchmarks than those below. Every command is printed before it runs and can be given by
hand; each has its own place in OUT, and the same call goes on after a stop.

What is set, and where from:

| setting | value | from |
|---|---|---|
| passes joint, image, text; verifier | all | DREAM's prompts, in words of ours |
| four sources, nine categories | as named there | DREAM |
| prompts (`--count`, for the plan) | 2,000 | DREAM's data: VLGuard's training set |
| teacher told of observations, student not | yes | DREAM: `observe` is no text |
| teacher, its filters | yours; `distill`'s | ours |
| supervised stage: epochs, rate, adapter | 3, 2e-4, LoRA of rank 16 | ours |
| score: global 1 to 10, and risks handled | both | DREAM's prompts |
| score: weight of the global part | 0.5 | ours |
| rounds | 4 | RLAIF-V |
| candidates, temperature, longest | 10, 0.7, 512 tokens | RLAIF-V |
| pairs of a prompt, which | 2, random among those apart | RLAIF-V |
| least gap of a pair | 0.1 of a score in 0..1 | ours; RLAIF-V counts facts |
| balance of lengths | on | RLAIF-V |
| objective, beta | DPO, 0.1 (`--objective dpo2d`: ours) | RLAIF-V |
| rate, schedule, warm-up, weight decay | 1e-5 (LoRA), cosine, 5 %, 0.01 | RLAIF-V |
| epochs of a round, pairs of an update | 4, about 8 | RLAIF-V (8 devices of 1) |
| longest pair | 2,048 tokens | RLAIF-V |
| which round is kept | the gate's choice | ours; RLAIF-V: by the benchmarks |
| gate: tolerance | 0.02 | ours |

``--dry_run`` prints the commands and what they would take at this scale: calls, tokens,
cost at ``--judge.prompt_price`` and ``--judge.completion_price`` (a million tokens),
hours. It assumes what ``dream/plan.py`` says; nothing is sent, read or written. Before
a stage spends anything, its own ``--dry_run`` says more: the commands take it.

Nothing here was run at that scale. What the stages do on a small model is measured by
``experiments/dream_ablations.py``.
"""

import argparse
import dataclasses
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from dream.plan import Scale, table
from dream.stages import Run, Stage, stages


_COMMAND = "from jaxalign.cli.main import main; main()"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the stages, or say what they would take."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="MODEL")
    parser.add_argument("--prompts", default="prompts.jsonl")
    parser.add_argument("--gate_prompts", default="gate.jsonl")
    parser.add_argument("--out", default="dream")
    parser.add_argument("--data_dir", help="of the benchmarks; without: no evaluation")
    parser.add_argument("--tasks", default="", help="benchmarks, with commas")
    parser.add_argument("--teacher", help="checkpoint; or give --endpoint.*")
    parser.add_argument("--objective", choices=["sigmoid", "dpo2d"], default="sigmoid")
    parser.add_argument("--dry_run", action="store_true")
    for field in dataclasses.fields(Scale):
        if field.name not in _DERIVED:
            parser.add_argument(
                f"--{field.name}", type=type(field.default), default=field.default
            )
    args, rest = parser.parse_known_args(arguments)
    rest = [part for one in rest for part in _parts(one)]
    judge, endpoint = (_flags(rest, part) for part in ("judge", "endpoint"))
    unknown = [x for x in rest if x not in (*judge, *endpoint)]
    if unknown:
        parser.error(f"unknown arguments: {' '.join(unknown)}")
    teacher = ["--teacher", args.teacher] if args.teacher else endpoint
    run = Run(
        args.model,
        Path(args.prompts),
        Path(args.gate_prompts),
        Path(args.out),
        args.data_dir,
        args.objective,
        [name for name in args.tasks.split(",") if name],
        judge,
        teacher,
    )
    scale = _scale(args, judge)
    if args.dry_run:
        run = run._replace(
            data_dir=run.data_dir or "DATA",
            teacher=run.teacher or ["--endpoint.model", "TEACHER"],
        )
        for stage in stages(run, scale):
            print(_shown(stage))
        print(f"\n{table(scale)}")
        return 0
    for name in ("model", "prompts", "gate_prompts"):
        if getattr(args, name) == parser.get_default(name):
            parser.error(f"--{name} is missing")
    if not teacher:
        parser.error("there is no teacher: give --teacher DIR or --endpoint.*")
    run.out.mkdir(parents=True, exist_ok=True)
    for stage in stages(run, scale):
        print(_shown(stage), flush=True)
        if stage.makes is not None and stage.makes.exists():
            continue
        command = [sys.executable, "-c", _COMMAND, *stage.arguments]
        status = subprocess.run(command, check=False).returncode
        if status:
            print(f"{stage.name} ended with {status}; the same call goes on from it")
            return status
    return 0


_DERIVED = (
    *("segments", "teacher_calls", "prompt_price", "completion_price", "concurrency"),
)
"""Fields of the scale that other flags tell."""


def _scale(args: argparse.Namespace, judge: Sequence[str]) -> Scale:
    given = {
        field.name: getattr(args, field.name)
        for field in dataclasses.fields(Scale)
        if field.name not in _DERIVED
    }
    told = {
        name: float(judge[judge.index(flag) + 1])
        for name in ("prompt_price", "completion_price", "concurrency")
        if (flag := f"--judge.{name}") in judge
    }
    if "concurrency" in told:
        told["concurrency"] = int(told["concurrency"])
    return Scale(
        **given,
        **told,
        segments=args.objective == "dpo2d",
        teacher_calls=not args.teacher,
    )


def _flags(arguments: Sequence[str], part: str) -> list[str]:
    """Return the flags of a part with their values."""
    found: list[str] = []
    taking = False
    for argument in arguments:
        if argument.startswith("--"):
            taking = argument.startswith(f"--{part}.")
        if taking:
            found.append(argument)
    return found


def _parts(argument: str) -> list[str]:
    """Return a flag and its value, where they are one argument."""
    flag, equals, value = argument.partition("=")
    return [flag, value] if equals and flag.startswith("--") else [argument]


def _shown(stage: Stage) -> str:
    return f"# {stage.name}\njaxalign {shlex.join(stage.arguments)}"


if __name__ == "__main__":
    sys.exit(main())
