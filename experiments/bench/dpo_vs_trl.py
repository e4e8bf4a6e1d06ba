"""DPO with LoRA: jaxalign against TRL and tunix, each at its best, on the same pairs.

    pip install -e '.[test]' trl==1.16.0
    jaxalign fetch smollm2-135m --out smollm2
    python experiments/bench/hh_pairs.py --data HH.jsonl.gz --model smollm2 --out hh
    python experiments/bench/dpo_vs_trl.py --model smollm2 --data hh --out dpo.md

Rank 16 on q_proj and v_proj, the reference by switching the adapter off; then the
reference computed beforehand, TRL in its fastest setting of the first part against
jaxalign in its own. TRL runs plain, with gradient checkpointing, with its own mixed
precision (``bf16=True``), with weights in bfloat16, and with both; the last three only
where the CPU multiplies bfloat16 (``--without_units`` runs them anywhere). jaxalign
runs in float32, in bfloat16 and in what ``--dtype fastest`` takes. ``--tunix PYTHON``
adds google-tunix, from the environment that ``dpo_tunix.py`` says how to make.

Each setting runs in a fresh process, one after the other, in ``--rounds`` rounds, so
that a slow minute of the machine falls on all; settings of TRL that the first round
shows far from its best run once. Figures are medians. The error is the mean difference
of a token's log-probability under the model before training from the same library's
float32; the last column must be the same everywhere, then all compute the same thing
(TRL's differs a little: it also counts the line break behind the end of turn).

On two quiet cores about 75 minutes, with tunix 20 more; expected: the ratios in the
README.
"""

import argparse
import dataclasses
import json
from pathlib import Path

from side_by_side import (
    NO_UNITS,
    Result,
    Side,
    alternate,
    fastest,
    head_line,
    multiplies_bf16,
    script,
    table,
)


TRL = {
    "TRL": (),
    "TRL, checkpointed": ("--gradient_checkpointing", "true"),
    "TRL, bf16=True": ("--bf16", "true"),
    "TRL, bfloat16 weights": ("--dtype", "bfloat16"),
    "TRL, bf16=True, bfloat16 weights": ("--bf16", "true", "--dtype", "bfloat16"),
}
DTYPES = ("float32", "bfloat16", "fastest")
TUNIX = {
    "tunix": (),
    "tunix, bfloat16 weights": ("--dtype", "bfloat16"),
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, help="what hh_pairs.py wrote")
    parser.add_argument("--tunix", metavar="PYTHON", help="of tunix' environment")
    parser.add_argument("--tunix_batch_size", type=int, default=2)
    parser.add_argument("--batch_size", type=int, default=4, help="TRL's, in pairs")
    parser.add_argument("--steps", type=int, default=14)
    parser.add_argument("--warmup_steps", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--error_pairs", type=int, default=16)
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--row_length", type=int, default=1024)
    parser.add_argument("--remat", default="dots")
    parser.add_argument("--targets", default="q_proj,v_proj")
    parser.add_argument("--without_units", action="store_true")
    parser.add_argument("--out", type=Path, help="Markdown; .json beside it has it all")
    return parser.parse_args()


def sides(args: argparse.Namespace) -> list[Side]:
    """Return TRL's settings and ours in turn, and tunix last."""
    lacks = "" if args.without_units or multiplies_bf16() else NO_UNITS
    theirs = [
        Side(name, "TRL", _trl(args, *options), lacks if _bf16(options) else "")
        for name, options in TRL.items()
    ]
    ours = [
        Side(f"jaxalign, {dtype}", "ours", _ours(args, "--dtype", dtype))
        for dtype in DTYPES
    ]
    turns = [
        side
        for index in range(max(len(theirs), len(ours)))
        for side in (*theirs[index : index + 1], *ours[index : index + 1])
    ]
    return turns + _tunix(args, lacks)


def _bf16(options: tuple[str, ...]) -> bool:
    return bool({"--bf16", "--dtype"} & set(options))


def _common(args: argparse.Namespace) -> tuple[str, ...]:
    given = ("model", "data", "max_length", "targets")
    return tuple(f"--{name}={getattr(args, name)}" for name in given)


def _trl(args: argparse.Namespace, *options: str) -> tuple[str, ...]:
    given = ("batch_size", "steps", "warmup_steps")
    flags = (f"--{name}={getattr(args, name)}" for name in given)
    return script("trl_side.py", *_common(args), *flags, *options)


def _measured(args: argparse.Namespace) -> tuple[str, ...]:
    """The pairs that TRL's steps after the warm-up are made of."""
    skip = args.warmup_steps * args.batch_size
    return (f"--skip={skip}", f"--count={args.steps * args.batch_size - skip}")


def _ours(args: argparse.Namespace, *options: str) -> tuple[str, ...]:
    rows = (f"--row_length={args.row_length}", f"--remat={args.remat}")
    return script(
        *("jaxalign_side.py", "train", *_common(args), *_measured(args)),
        *(*rows, *options),
    )


def _tunix(args: argparse.Namespace, lacks: str) -> list[Side]:
    """Return tunix' settings; XLA's bfloat16 needs no units, but they are its best."""
    python = args.tunix or "python"
    batch = f"--batch_size={args.tunix_batch_size}"
    return [
        Side(
            name,
            "tunix",
            script(
                *("dpo_tunix.py", *_common(args), *_measured(args), batch, *options),
                python=python,
            ),
            (lacks if options else "")
            if args.tunix
            else "no --tunix PYTHON was given (dpo_tunix.py says how to get one)",
            once=True,
        )
        for name, options in TUNIX.items()
    ]


def precomputed(first: list[Side], results: dict[str, list[Result]]) -> list[Side]:
    """Return both sides' fastest with the reference's log-probabilities at hand."""
    options = {"TRL": ("--precompute", "true"), "ours": ("--cached",)}
    names = {"TRL": "precomputed", "ours": "cached"}
    return [
        dataclasses.replace(
            best,
            name=f"{best.name}, {names[kind]}",
            command=(*best.command, *options[kind]),
        )
        for kind in options
        if (best := fastest(first, results, kind)) is not None
    ]


def main() -> None:
    """Run both parts and print their tables."""
    args = arguments()
    errors = ("--error_pairs", str(args.error_pairs))
    first = sides(args)
    results, skipped = alternate(first, args.rounds, first=errors)
    second = precomputed(first, results)
    again, left_out = alternate(second, args.rounds, first=errors)
    runs = [run for each in (results, again) for some in each.values() for run in some]
    measured = (args.steps - args.warmup_steps) * args.batch_size
    text = "\n".join(
        [
            head_line(runs),
            "",
            f"{measured} pairs after a warm-up, at most {args.max_length} tokens an "
            f"answer with its prompt, LoRA of rank 16 on {args.targets}.",
            "",
            table(first, results, skipped, unit="pairs/s", peer="TRL"),
            "",
            "The reference computed beforehand:",
            "",
            table(second, again, left_out, unit="pairs/s", peer="TRL"),
        ]
    )
    print(text)
    if args.out:
        args.out.write_text(text + "\n", encoding="utf-8")
        kept = json.dumps({**results, **again}, indent=1)
        args.out.with_suffix(".json").write_text(kept + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
