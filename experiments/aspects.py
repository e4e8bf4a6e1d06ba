"""Which aspect carries the signal? One-hot weights and leave-one-out in one command.

    python experiments/aspects.py --model smollm2 --data qa_feedback/records.jsonl \
        --out aspects

Trains 2D-DPO with all aspects, with each one alone and with all but one, on the same
pairs with the same seeds, and prints a table. Aspects come from the data; those that
have the same score in every segment are left out, as they cannot tell segments apart.
About 60 minutes on two cores with the defaults; give the same command again to go on.
``--objective '{rejected_weight: inverted}'`` sets other options of 2D-DPO.
"""

from pathlib import Path

import variants
import yaml
from variants import Variant

from jaxalign.data import records
from jaxalign.objectives.dpo2d import DPO2DConfig
from jaxalign.training.config import from_dict


def informative(data: str) -> list[str]:
    """Return the aspects that have more than one score in the data."""
    seen: dict[str, set[float]] = {}
    for record in records.read(data):
        for segment in (
            *(record.chosen_segments or ()),
            *(record.rejected_segments or ()),
        ):
            for aspect, score in segment.scores.items():
                seen.setdefault(aspect, set()).add(score)
    return sorted(aspect for aspect, scores in seen.items() if len(scores) > 1)


def main() -> None:
    """Run what is missing and print the table."""
    parser = variants.parser(__doc__ or "")
    parser.add_argument("--objective", default="{}", help="options of dpo2d, as YAML")
    args = parser.parse_args()
    options = yaml.safe_load(args.objective)

    def config(weights: dict[str, float]) -> DPO2DConfig:
        # Through the run's own reader, so that options are checked as in training.
        values = {**options, "aspect_weights": weights}
        run = from_dict({"model": "", "data": "", "out": "", "objective": values})
        assert isinstance(run.objective, DPO2DConfig)
        return run.objective

    aspects = informative(args.data)
    chosen = [Variant("all", config(dict.fromkeys(aspects, 1.0)))]
    chosen += [Variant(f"only {name}", config({name: 1.0})) for name in aspects]
    if len(aspects) > 2:
        chosen += [
            Variant(
                f"without {name}",
                config({other: 1.0 for other in aspects if other != name}),
            )
            for name in aspects
        ]
    found = variants.run(args, chosen)
    text = variants.table(found)
    print(text)
    (Path(args.out) / "table.md").write_text(text + "\n")


if __name__ == "__main__":
    main()
