"""How fine should feedback be? The same data under twelve ways to read it.

    jaxalign fetch smollm2-135m --out smollm2
    python experiments/granularity.py --model smollm2 --data qa_feedback/records.jsonl \
        --out granularity --picture docs/granularity.png

Human span-level feedback (QA-Feedback in the record format), SmolLM2-135M with LoRA,
same pairs, optimiser and seeds for all. Held-out pairs tell whether the chosen response
gets the higher reward, whether segments that people marked as faulty get lower rewards
than good segments of the same response (no objective is told which response that is),
and how far the chosen responses fell. About 80 minutes on two cores; give the same
command again to go on after a stop. Expected: the table in the README.

The rows: ``dpo`` reads no segments; ``segments only`` gives every aspect the same
weight, an overall score of each segment; ``aspects only`` has the whole response as its
one segment; all others weigh the aspects that this data tells apart (correctness 0.4,
helpfulness 0.4, completeness 0.2).
"""

import statistics
from pathlib import Path
from typing import Any

import matplotlib


matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import variants  # noqa: E402
from variants import Variant  # noqa: E402

from jaxalign.objectives.dpo2d import DPO2DConfig  # noqa: E402
from jaxalign.objectives.pairwise import PairwiseConfig  # noqa: E402


WEIGHTS = {"correctness": 0.4, "helpfulness": 0.4, "completeness": 0.2}


def two_dimensional(**options: Any) -> DPO2DConfig:
    """Return 2D-DPO with the aspects that the data tells apart."""
    return DPO2DConfig(aspect_weights=WEIGHTS, **options)


VARIANTS = [
    Variant("dpo", PairwiseConfig(name="dpo")),
    Variant("aspects only", two_dimensional(), whole=True),
    Variant("segments only", DPO2DConfig()),
    Variant("vanilla", two_dimensional(form="vanilla")),
    Variant("group", two_dimensional()),
    Variant("top 2 a side", two_dimensional(form="vanilla", top_k=2)),
    Variant("group, inverted", two_dimensional(rejected_weight="inverted")),
    Variant("group, uniform", two_dimensional(rejected_weight="uniform")),
    Variant("group, centred", two_dimensional(rejected_weight="centred")),
    Variant("group, not normalised", two_dimensional(normalize="none")),
    Variant("group, mean 1", two_dimensional(normalize="mean1")),
    Variant("group + dpo", two_dimensional(dpo_weight=1.0)),
]


def main() -> None:
    """Run what is missing; print the table and draw the picture."""
    parser = variants.parser(__doc__ or "")
    parser.add_argument("--picture", help="where to draw the table")
    args = parser.parse_args()
    picture = args.picture
    del args.picture
    found = variants.run(args, VARIANTS)
    text = variants.table(found)
    print(text)
    (Path(args.out) / "table.md").write_text(text + "\n")
    if picture:
        draw(found, picture)


def draw(found: dict[str, Any], path: str) -> None:
    """Draw means with standard deviations, one panel a measure."""
    shown = ("accuracy", "segment_auc", "chosen_drop")
    titles = ("pair accuracy", "segment AUC", "fall of the chosen (nats)")
    names = list(found)[::-1]
    figure, panels = plt.subplots(1, 3, figsize=(11, 4.2), dpi=150, sharey=True)
    for panel, metric, title in zip(panels, shown, titles, strict=True):
        means = [statistics.mean(found[name][metric]) for name in names]
        errors = [
            statistics.stdev(found[name][metric]) if len(found[name][metric]) > 1 else 0
            for name in names
        ]
        panel.errorbar(means, names, xerr=errors, fmt="o", color="#228b6e", capsize=3)
        panel.axvline(0.0 if metric == "chosen_drop" else 0.5, color="#bbb", zorder=0)
        panel.set_title(title)
        panel.grid(axis="x", alpha=0.3)
    figure.tight_layout()
    figure.savefig(path)


if __name__ == "__main__":
    main()
