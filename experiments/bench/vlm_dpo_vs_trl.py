"""DPO of models that see: jaxalign against TRL on the same pairs and pictures.

    pip install -e '.[test]' trl==1.16.0
    jaxalign fetch smollm2-135m --out smollm2
    python experiments/bench/hh_pairs.py --data HH.jsonl.gz --model smollm2 --out hh
    python experiments/bench/vlm_dpo_vs_trl.py --tokenizer smollm2 --data hh \
        --pictures FigStep-Benign/images --out vlm.md

Checkpoints with random weights (``vlm_checkpoints.py``): SmolVLM-256M whole,
Qwen2.5-VL-3B's widths with few layers. A pair is a question of HH-RLHF and its two
answers, with one picture before it. LoRA of rank 16 on the decoder's q_proj and v_proj,
the tower frozen, the reference by switching the adapter off. TRL runs in float32 and,
where the CPU multiplies bfloat16, with ``bf16=True`` (``--without_units`` runs it
anywhere). jaxalign runs in float32 and in what ``--dtype fastest`` takes, each with the
tower at every step, with its features cached, which TRL has not, and with the
reference's log-probabilities cached too.

Each setting runs in a fresh process, in turn (``side_by_side.py``). The tower's share
is for TRL the time in its vision tower, by hooks; for jaxalign what cached features
save of a step. The last column must be the same everywhere, then all compute the same
thing.

``--quick`` takes the tiny shape and few pairs, for trying: two minutes on two quiet
cores. All of it takes about an hour there.
"""

import argparse
import itertools
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import vlm_checkpoints
from side_by_side import (
    NO_UNITS,
    Result,
    Side,
    alternate,
    head_line,
    multiplies_bf16,
    rate,
    script,
    table,
)


KEPT = {
    "recompute": ("--image_features", "recompute"),
    "cached": ("--image_features", "cached"),
    "cached, and the reference": ("--image_features", "cached", "--cached"),
}
"""What is computed before the first step and kept, with jaxalign's options for it."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokenizer", type=Path, required=True, help="SmolLM2's")
    parser.add_argument("--data", type=Path, required=True, help="of hh_pairs.py")
    parser.add_argument("--pictures", type=Path, required=True, help="a directory")
    parser.add_argument(
        "--shapes", nargs="+", choices=[*vlm_checkpoints.SHAPES], default=None
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--batch_size", type=int, default=2, help="TRL's, in pairs")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warmup_steps", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--error_pairs", type=int, default=4)
    parser.add_argument("--max_length", type=int, default=640)
    parser.add_argument("--row_length", type=int, default=768)
    parser.add_argument("--row_patches", type=int, help="default: found from the data")
    parser.add_argument("--remat", default="dots")
    parser.add_argument("--without_units", action="store_true")
    parser.add_argument("--out", type=Path, help="Markdown; .json beside it has it all")
    args = parser.parse_args()
    if args.quick:
        args.steps, args.rounds, args.error_pairs = 10, 1, 2
    if args.shapes is None:
        names = [name for name in vlm_checkpoints.SHAPES if name != "tiny"]
        args.shapes = ["tiny"] if args.quick else names
    return args


def write_pairs(args: argparse.Namespace, path: Path) -> None:
    """Write pairs of one question and a picture, as both sides read them."""
    pictures = sorted(p.name for p in args.pictures.glob("*.png"))
    count = args.steps * args.batch_size
    found = list(itertools.islice(_questions(args), count))
    if len(found) < count:
        raise SystemExit(f"{args.data} has {len(found)} short pairs, {count} wanted")
    with path.open("w", encoding="utf-8") as file:
        for record, picture in zip(found, itertools.cycle(pictures), strict=False):
            file.write(json.dumps({**record, "images": [picture]}) + "\n")


def _questions(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield pairs whose texts leave room for a picture's tokens in both libraries."""
    with args.data.open(encoding="utf-8") as lines:
        for record in map(json.loads, lines):
            answers = [record[side][0]["content"] for side in ("chosen", "rejected")]
            question = record["prompt"][-1]["content"]
            if max(map(len, answers)) + len(question) < 900:
                yield {**record, "prompt": [{"role": "user", "content": question}]}


def sides(args: argparse.Namespace, model: Path, pairs: Path) -> list[Side]:
    """Return TRL's settings and ours."""
    common = (
        *(f"--model={model}", f"--data={pairs}", f"--image_dir={args.pictures}"),
        f"--max_length={args.max_length}",
    )
    given = ("batch_size", "steps", "warmup_steps")
    steps = tuple(f"--{name}={getattr(args, name)}" for name in given)
    lacks = "" if args.without_units or multiplies_bf16() else NO_UNITS
    theirs = [
        Side("TRL", "TRL", script("trl_side.py", *common, *steps)),
        Side(
            "TRL, bf16=True",
            "TRL",
            script("trl_side.py", *common, *steps, "--bf16", "true"),
            lacks,
        ),
    ]
    skip = args.warmup_steps * args.batch_size
    measured = (f"--skip={skip}", f"--count={args.steps * args.batch_size - skip}")
    rows = (f"--row_length={args.row_length}", f"--remat={args.remat}")
    if args.row_patches is not None:
        rows += (f"--row_patches={args.row_patches}",)
    ours = [
        Side(
            f"jaxalign, {dtype}, {kept}",
            "ours",
            script(
                *("jaxalign_side.py", "train", *common, *measured, *rows),
                *("--dtype", dtype, *options),
            ),
        )
        for dtype in (("float32",) if args.quick else ("float32", "fastest"))
        for kept, options in KEPT.items()
    ]
    return [*theirs, *ours]


def tower_share(results: dict[str, list[Result]]) -> str:
    """Say what part of a step the tower takes on each side."""
    said = [
        f"{name}: {runs[0]['tower_share']:.0%}"
        for name, runs in results.items()
        if "tower_share" in runs[0]
    ]
    for name, runs in results.items():
        base, _, how = name.rpartition(", ")
        other = results.get(f"{base}, cached")
        if how == "recompute" and other:
            said.append(f"{base}: {1 - rate(runs) / rate(other):.0%}")
    return f"The tower's share of a step: {'; '.join(said)}."


def compare(args: argparse.Namespace, shape: str, folder: Path) -> tuple[str, Any]:
    """Run one shape; return its section, and all figures."""
    model, pairs = folder / shape, folder / "pairs.jsonl"
    vlm_checkpoints.write(shape, args.tokenizer, model)
    write_pairs(args, pairs)
    chosen = sides(args, model, pairs)
    errors = ("--error_pairs", str(args.error_pairs))
    results, skipped = alternate(chosen, args.rounds, first=errors)
    runs = [run for some in results.values() for run in some]
    measured = (args.steps - args.warmup_steps) * args.batch_size
    text = "\n".join(
        [
            f"## {shape}",
            "",
            head_line(runs),
            "",
            f"{measured} pairs with a picture each after a warm-up, at most "
            f"{args.max_length} tokens an answer with its prompt.",
            "",
            table(chosen, results, skipped, unit="pairs/s", peer="TRL"),
            "",
            tower_share(results),
        ]
    )
    return text, results


def main() -> None:
    """Run the shapes and print their tables."""
    args = arguments()
    sections, kept = [], {}
    for shape in args.shapes:
        with tempfile.TemporaryDirectory() as folder:
            section, kept[shape] = compare(args, shape, Path(folder))
        sections.append(section)
        print(section, flush=True)
    if args.out:
        args.out.write_text("\n\n".join(sections) + "\n", encoding="utf-8")
        text = json.dumps(kept, indent=1) + "\n"
        args.out.with_suffix(".json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
