"""jaxalign's side of the comparisons: the commands that people use, timed.

Run by ``dpo_vs_trl.py`` and ``generate_vs_hf.py`` in a fresh process; writes JSON (see
``side_by_side.py``). Nothing but the command line is called, so a figure is what
``jaxalign train`` and ``jaxalign generate`` give.

    python experiments/bench/jaxalign_side.py train --model smollm2 --data hh \
        --skip 8 --count 24 --out ours.json

Training: pairs a second over one pass of the measured pairs, from the end of the first
step to the end of the last, compiling, saving and a cached reference's making apart.
Generation: new tokens a second as the command says it, compiling apart.
"""

import argparse
import contextlib
import io
import itertools
import json
import re
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from side_by_side import peak_gb

from jaxalign.cli import main as cli


PACKAGES = ("jaxalign", "jax", "jaxlib", "flax")
NEVER = 10**9


def jaxalign(*arguments: object) -> str:
    """Run a command in this process and return what it printed."""
    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out):
            cli.main([str(argument) for argument in arguments])
    except SystemExit as end:
        if end.code:
            raise
    return out.getvalue()


def training(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Train one pass over the measured pairs."""
    data, run = folder / "pairs.jsonl", folder / "run"
    with open(args.data, encoding="utf-8") as lines:
        kept = list(itertools.islice(lines, args.skip, args.skip + args.count))
    data.write_text("".join(kept), encoding="utf-8")
    began = time.time()
    jaxalign(
        *("train", "--model", args.model, "--data", data, "--out", run),
        *("--dtype", args.dtype, "--remat", args.remat),
        *("--reference", "cached" if args.cached else "adapter_off"),
        *("--objective.name", "sigmoid", "--overflow", "error"),
        *("--max_length", args.max_length, "--row_length", args.row_length),
        *("--batch_rows", 1, "--num_train_epochs", 1),
        *("--adapter.rank", args.lora_rank, "--adapter.alpha", args.lora_alpha),
        *("--adapter.targets", json.dumps(args.targets.split(","))),
        *("--optimizer.learning_rate", args.learning_rate),
        *("--optimizer.schedule", "constant", "--report_to", "none"),
        *("--logging_steps", 1, "--save_steps", NEVER),
        *_pictures(args),
        *(("--image_features", args.image_features) if args.image_dir else ()),
    )
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [json.loads(line) for line in lines]
    if len(steps) < 2:
        raise SystemExit(f"{len(kept)} pairs make one step: give more --steps")
    # Rows are of one length and full: every step costs the same, whatever is in it.
    seconds = (steps[-1]["time"] - steps[0]["time"]) / (len(steps) - 1)
    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    return {
        "rate": len(kept) / (seconds * len(steps)),
        "peak_gb": peak_gb(),
        "chosen": config["dtype"] if config["dtype"] != args.dtype else "",
        "dtype": config["dtype"],
        "first_step_seconds": steps[0]["time"] - began,
        "losses": [step["loss"] for step in steps],
        "records": str(data),
    }


def _pictures(args: argparse.Namespace) -> tuple[str, ...]:
    if not args.image_dir:
        return ()
    patches = ("--row_patches", str(args.row_patches)) if args.row_patches else ()
    return ("--image_dir", args.image_dir, *patches)


def generation(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Answer the prompts; keep the first two texts of each for the error."""
    out, records = folder / "texts.jsonl", folder / "pairs.jsonl"
    said = jaxalign(
        *("generate", "--model", args.model, "--data", args.data, "--out", out),
        *("--dtype", args.dtype, "--num_samples", args.num_samples),
        *("--max_new_tokens", args.max_new_tokens, "--top_p", args.top_p),
        *("--temperature", args.temperature, "--batch_slots", args.batch_slots),
    )
    figures = re.search(r"(\d+) tokens in ([\d.]+) s, compile ([\d.]+) s", said)
    if figures is None:
        raise SystemExit(f"jaxalign generate said no speed: {said!r}")
    tokens, seconds, compiling = map(float, figures.groups())
    text = out.with_name(f"{out.name}.settings.json").read_text(encoding="utf-8")
    dtype = json.loads(text)["dtype"]
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    with records.open("w", encoding="utf-8") as file:
        for row in rows:
            texts = [
                made["text"] for made in row["completions"] if made["text"].strip()
            ]
            if texts:
                pair = {"chosen": texts[0], "rejected": texts[-1]}
                record = {"prompt": row["prompt"], **_replies(pair)}
                file.write(json.dumps(record) + "\n")
    return {
        "rate": tokens / seconds,
        "peak_gb": peak_gb(),
        "chosen": dtype if dtype != args.dtype else "",
        "dtype": dtype,
        "tokens": tokens,
        "seconds": seconds,
        "compile_seconds": compiling,
        "texts": [row["completions"][0]["tokens"] for row in rows],
        "records": str(records),
    }


def _replies(pair: dict[str, str]) -> dict[str, Any]:
    return {
        name: [{"role": "assistant", "content": text}] for name, text in pair.items()
    }


def error(result: dict[str, Any], args: argparse.Namespace) -> dict[str, float]:
    """Compare a token's log-probability in the side's dtype with float32.

    The policy is the model before training, on the first records. Both are scored in
    this process, after its peak of memory has been noted.
    """
    records = Path(result["records"])
    lines = records.read_text(encoding="utf-8").splitlines()[: args.error_pairs]
    few = records.with_name("few.jsonl")
    few.write_text("\n".join(lines) + "\n", encoding="utf-8")
    found: dict[str, list[float]] = {}
    for dtype in {result["dtype"], "float32"}:
        out = records.with_name(f"{dtype}.jsonl")
        jaxalign(
            *("score", "--model", args.model, "--data", few, "--out", out),
            *("--dtype", dtype, "--objective.name", "sigmoid"),
            *("--token_logps", "true", "--row_length", args.row_length),
            *_pictures(args),
        )
        scored = map(json.loads, out.read_text(encoding="utf-8").splitlines())
        found[dtype] = [
            value
            for row in scored
            for side in ("chosen", "rejected")
            for value in row[side]["token_logps"]
        ]
    mine, exact = found[result["dtype"]], found["float32"]
    apart = [abs(a - b) for a, b in zip(mine, exact, strict=True)]
    return {"error": sum(apart) / len(apart), "logp": sum(mine) / len(mine)}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("task", choices=["train", "generate"])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, help="pairs, or prompts")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--dtype", default="float32", help="as the commands take it")
    parser.add_argument("--error_pairs", type=int, default=0, help="records; 0: none")
    train = parser.add_argument_group("train")
    train.add_argument("--skip", type=int, default=0)
    train.add_argument("--count", type=int, default=NEVER)
    train.add_argument("--max_length", type=int, default=512)
    train.add_argument("--row_length", type=int, default=1024)
    train.add_argument("--row_patches", type=int)
    train.add_argument("--cached", action="store_true", help="the reference")
    train.add_argument("--remat", default="dots")
    train.add_argument("--targets", default="q_proj,v_proj")
    train.add_argument("--lora_rank", type=int, default=16)
    train.add_argument("--lora_alpha", type=float, default=32.0)
    train.add_argument("--learning_rate", type=float, default=1e-4)
    train.add_argument("--image_dir", help="of the records' pictures")
    train.add_argument("--image_features", default="recompute")
    generate = parser.add_argument_group("generate")
    generate.add_argument("--num_samples", type=int, default=4)
    generate.add_argument("--max_new_tokens", type=int, default=256)
    generate.add_argument("--batch_slots", type=int, default=64)
    generate.add_argument("--top_p", type=float, default=1.0)
    generate.add_argument("--temperature", type=float, default=1.0)
    return parser.parse_args()


def main() -> None:
    """Measure, then find the error, then write both."""
    args = arguments()
    with tempfile.TemporaryDirectory() as folder:
        task = training if args.task == "train" else generation
        result = task(args, Path(folder))
        if args.error_pairs:
            result |= error(result, args)
    del result["records"]
    result["versions"] = {name: version(name) for name in PACKAGES}
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
