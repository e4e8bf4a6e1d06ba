"""DPO with LoRA: jaxalign against TRL on the same pairs, model, adapter and machine.

    pip install -e '.[test]' trl==1.16.0
    jaxalign fetch smollm2-135m --out smollm2
    python experiments/bench/hh_pairs.py --data HH.jsonl.gz --model smollm2 --out hh
    python experiments/bench/dpo_vs_trl.py --model smollm2 --data hh

Each setting runs in a fresh process, one after the other, TRL and jaxalign in turn, so
that a slow minute of the machine falls on both. TRL runs at its own defaults but for
gradient checkpointing, which is off because that is faster; its peak memory with it is
given beside. About 15 minutes on two cores; expected: the ratios in the README.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any


HERE = Path(__file__).parent


def run(script: str, *arguments: str) -> dict[str, Any]:
    """Run one side in a fresh process and return what it measured."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        subprocess.run(
            [sys.executable, str(HERE / script), *arguments, "--out", str(out)],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        return json.loads(out.read_text())


def main() -> None:
    """Run all settings and print a table with the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--warmup_steps", type=int, default=2)
    parser.add_argument("--row_length", type=int, default=1024)
    parser.add_argument("--remat", default="dots")
    parser.add_argument("--out", help="where to write all figures as JSON")
    args = parser.parse_args()
    skip = args.warmup_steps * args.batch_size
    common = ["--model", args.model, "--data", args.data, "--max_length", "512"]
    trl = [
        *common,
        *("--batch_size", str(args.batch_size)),
        *("--steps", str(args.steps)),
        *("--warmup_steps", str(args.warmup_steps)),
    ]
    ours = [
        *common,
        *("--skip", str(skip)),
        *("--count", str(args.steps * args.batch_size - skip)),
        *("--row_length", str(args.row_length)),
        *("--remat", args.remat),
    ]
    results = {}
    for name, script, arguments in (
        ("TRL", "trl_side.py", trl),
        ("jaxalign, adapter off", "jaxalign_side.py", ours),
        ("TRL, precomputed", "trl_side.py", [*trl, "--precompute", "true"]),
        ("jaxalign, cached", "jaxalign_side.py", [*ours, "--cached"]),
    ):
        results[name] = run(script, *arguments)
        print(name, end=": ")
        print(
            f"{results[name]['pairs_per_second']:.3f} pairs/s, "
            f"{results[name]['tokens_per_second']:.0f} tokens/s, "
            f"{results[name]['peak_gb']:.2f} GB",
            flush=True,
        )
    base, off, cached = (
        results[name] for name in ("TRL", "jaxalign, adapter off", "jaxalign, cached")
    )
    for name, side in (("adapter off", off), ("cached", cached)):
        speed = side["pairs_per_second"] / base["pairs_per_second"]
        print(
            f"{name}: {speed:.2f} × TRL's pairs/s, "
            f"{side['peak_gb'] / base['peak_gb']:.2f} × its memory "
            f"(compiled in {side['compile_seconds']:.1f} s)"
        )
    pre = results["TRL, precomputed"]["pairs_per_second"]
    print(f"cached against TRL precomputed: {cached['pairs_per_second'] / pre:.2f} ×")
    if args.out:
        Path(args.out).write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
