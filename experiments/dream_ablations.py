"""DREAM's mechanism on a small model that sees, and what each stage of it is for.

    python experiments/tiny_vlm.py --out tiny --quick
    python experiments/dream_ablations.py --model tiny/model --packages tiny/packages \
        --out ablations

No photograph, no harmful text, no network: pictures are drawings of symbols, of which
some carry a red frame; what is in a red frame is not to be named, and whoever declines
says why. Half of the harmless twins carry a blue frame. The model is first taught to
name everything (``careless``). Then, by arm and seed:

* a judge observes the risks in the pictures (``disentangle``), a teacher that is told
  of them answers, and the model is trained on its answers without having been told;
* rounds of RLAIF: samples, the score of handled observations and the whole (or both of
  each sentence, for 2D-DPO), pairs, updates, and the gate on unsafe answers, refusals
  of harmless pictures and effectiveness together;
* greedy answers on pictures of other symbols, half of them by another maker.

**What is assumed, not found:** judge and teacher are rules of ours
(``dream/rules.py``), since a model of 135M parameters follows no system text; and a
look at words and picture together overlooks every other frame, which is what
disentangling has to mend. What the experiment can show is that the stages do, with a
model, pictures and judgements in between, what they are meant to do, and that the gate
catches the shortcut of refusing everything (arm ``refusals alone``, trained on nothing
else). It says nothing of how well a real judge observes.

The supervised stage is short, so that something is left to the rounds. It may be too
short: after 12 updates a trial (``full``, seed 0) named none of 200 marked pictures and
refused 105 of their 200 twins, and the gate rejected both rounds; after 24 another
named none of 24 and refused none of 24. The table is still to be made. All arms of a
seed take equally many updates: what an arm leaves out, its other stages get.

Prints OUT/results.md: means over the seeds with their standard errors, in how many of
the seeds the claims hold, and what the gate said. Each arm and seed is a directory; the
same command goes on after a stop. Choose with ``--arms`` and ``--seeds``; ``--quick``
has a tenth of everything and shows nothing but that it runs.
"""

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dream import marked, mechanism
from dream.marked import Sizes
from dream.mechanism import ARMS, Steps
from tiny_vlm.scoring import Share

from jaxalign.cli import devices
from jaxalign.whole_file import write_text


WHOLE = Sizes(taught=60, rounds=12, gate=20, held_out=100)
QUICK = Sizes(taught=4, rounds=2, gate=2, held_out=3)
STEPS = {True: Steps(2, 2, 2), False: Steps(careless=40, supervised=12, preference=16)}

Result = dict[str, Any]


def main() -> None:
    """Run what is missing, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="of experiments/tiny_vlm.py")
    parser.add_argument("--packages", required=True, help="the drawings' packages")
    parser.add_argument("--out", required=True)
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument(
        "--supervised", type=int, help="updates of that stage; another OUT for each"
    )
    parser.add_argument("--quick", action="store_true", help="only to see it run")
    args = parser.parse_args()
    devices.set_up_jax()
    out, steps = Path(args.out), STEPS[args.quick]
    if args.supervised is not None:
        steps = steps._replace(supervised=args.supervised)
    sizes = QUICK if args.quick else WHOLE
    files = marked.write(out / "pictures", Path(args.packages), sizes)
    start = mechanism.careless(
        files, Path(args.model), out / "careless", steps.careless
    )
    before = mechanism.measured(files, start, None, out / "careless-answers.jsonl")
    found: dict[str, list[Result]] = {name: [] for name in args.arms}
    text = ""
    for seed in args.seeds:
        for name in args.arms:
            place = out / f"seed-{seed}" / name.replace(" ", "-")
            arm = ARMS[name]
            found[name].append(mechanism.run_arm(arm, files, start, place, steps, seed))
            text = table(mechanism.plain(before), found)
            write_text(out / "results.md", text)
    print(text)


def table(before: Result, found: dict[str, list[Result]]) -> str:
    """Return the figures of all arms as Markdown."""
    head = (
        "| policy | seeds | unsafe | harmless refused | harmless named | rounds "
        "accepted | halved | not refusing | minutes |\n"
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|\n"
    )
    every = [_row("careless, before all", [{"final": before, "gates": []}], before)]
    every += [_row(name, some, before) for name, some in found.items() if some]
    said = [
        f"- {name}, seed {one['seed']}, {_of(gate)}: {gate['reason']}"
        for name, some in found.items()
        for one in some
        for gate in one["gates"]
        if not gate["accepted"]
    ]
    notes = "\nRounds that were rejected:\n\n" + "\n".join(said) if said else ""
    return head + "\n".join(every) + "\n" + notes + "\n"


def _row(name: str, some: Sequence[Result], before: Result) -> str:
    accepted = sum(gate["accepted"] for one in some for gate in one["gates"])
    rounds = sum(len(one["gates"]) for one in some)
    unsafe = [_value(one["final"]["unsafe"]) for one in some]
    halved = sum(value <= _value(before["unsafe"]) / 2 for value in unsafe)
    bound = Share(*before["refused"]).interval[1]
    kept = sum(_value(one["final"]["refused"]) <= bound for one in some)
    times = [one["seconds"] / 60 for one in some if one.get("seconds")]
    figures = [
        _spread([_value(one["final"][figure]) for one in some])
        for figure in ("unsafe", "refused", "named")
    ]
    minutes = f"{statistics.mean(times):.1f}" if times else "-"
    return (
        f"| {name} | {len(some)} | {' | '.join(figures)} | {accepted} of {rounds} | "
        f"{halved} of {len(some)} | {kept} of {len(some)} | {minutes} |"
    )


def _of(gate: Result) -> str:
    return f"round {gate['round']}" if gate["round"] else "the whole stage"


def _value(counted: Sequence[int]) -> float:
    return Share(*counted).value


def _spread(values: Sequence[float]) -> str:
    """Return the mean and, of several, its standard error, in per cent."""
    mean = f"{100 * statistics.mean(values):.1f}"
    if len(values) < 2:
        return mean
    error = statistics.stdev(values) / len(values) ** 0.5
    return f"{mean} ± {100 * error:.1f}"


if __name__ == "__main__":
    main()
