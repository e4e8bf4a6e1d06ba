"""The README's picture: what the demo's model learned about held-out segments.

    jaxalign demo --out demo
    jaxalign score --model demo/smollm2-135m --adapter demo/run \
        --data demo/held_out.jsonl --out demo/scores.jsonl \
        --objective.normalize mean1 --objective.rejected_weight inverted
    python experiments/demo_picture.py --demo demo --out docs/demo.png

A second. Expected: segments with higher given scores have higher learned rewards.
"""

import argparse
import json
from pathlib import Path

import matplotlib
import numpy as np


matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


BETA = 0.1
COLOURS = {"chosen": "#228b6e", "rejected": "#c8423e"}


def main() -> None:
    """Draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--demo", required=True)
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    demo = Path(args.demo)
    records = _lines(demo / "held_out.jsonl")
    scored = _lines(demo / "scores.jsonl")
    steps = _lines(demo / "run" / "metrics.jsonl")

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), dpi=150)
    jitter = np.random.default_rng(0)
    for side, colour in COLOURS.items():
        given, learned = [], []
        for record, result in zip(records, scored, strict=True):
            segments = zip(
                record[f"{side}_segments"], result[side]["segments"], strict=True
            )
            for segment, found in segments:
                given.append(np.mean(list(segment["scores"].values())))
                ratio = found["logp"] - found["ref_logp"]
                learned.append(BETA * ratio / max(1, found["tokens"]))
        spread = np.array(given) + jitter.uniform(-0.05, 0.05, len(given))
        left.scatter(spread, learned, s=18, alpha=0.75, color=colour, label=side)
    left.axhline(0, color="#888", linewidth=0.8)
    left.set_xlabel("given score of the segment, mean of five aspects")
    left.set_ylabel("learned reward a token")
    left.set_title("Held-out segments after training", fontsize=10)
    left.legend(frameon=False)

    held = [s for s in steps if "eval_segments/accuracy" in s]
    at = [s["step"] for s in held]
    for name, label, colour in (
        ("eval_segments/accuracy", "segment accuracy", "#1f5fa8"),
        ("eval_rewards/accuracies", "pair accuracy", "#d08a1d"),
    ):
        right.plot(at, [s[name] for s in held], "o-", color=colour, label=label)
    right.axhline(0.5, color="#888", linewidth=0.8, linestyle=":")
    right.set_ylim(0, 1.02)
    right.set_xlabel("updates")
    right.set_title("Held-out accuracy", fontsize=10)
    right.legend(frameon=False, loc="lower right")
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(args.out)


def _lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":
    main()
