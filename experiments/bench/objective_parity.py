"""Every objective against its source of truth: losses and gradients, as a table.

    pip install -e '.[test]' trl==1.16.0
    python -m experiments.bench.objective_parity --out objective_parity.md

Run from the repository's root: it compares what `tests/objectives/test_objectives.py`
compares, in float64 on one batch of eight pairs in four rows (unequal lengths,
one-token completions, unused places). `TRL` is the trainer's own code of the installed
version, `formula` an independent float64 reference written from the papers. Under a
minute on two cores; expected: no error above 1e-10, but below 1e-6 where TRL computes
in float32 or keeps the label smoothing in it (exo_pair).
"""

import argparse
from importlib.metadata import version
from pathlib import Path

import jax


jax.config.update("jax_platforms", "cpu")

from tests.objectives.test_objectives import (  # noqa: E402
    FORMULA_CASES,
    TRL_CASES,
    Case,
    errors,
)


SOURCES = {
    "formula": "formula",
    "dpo_loss": "TRL DPOTrainer",
    "kto_loss": "TRL KTOTrainer",
    "cpo_loss": "TRL CPOTrainer.cpo_loss",
    "orpo_loss": "TRL ORPOTrainer.odds_ratio_loss, float32",
}


def source(case: Case) -> str:
    """Name the source of truth."""
    if "dpo2d" in case.label:
        return "formula, weighted pairs, gradient by differences"
    if case.source == "dpo_loss" and case.tolerance > 1e-10:
        what = "float32" if case.tolerance == 1e-5 else "its smoothing float32"
        return f"{SOURCES[case.source]}, {what}"
    if case.weighted:
        return SOURCES[case.source] + ", weighted pairs"
    return SOURCES[case.source]


def main() -> None:
    """Compare all cases and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    cases = sorted(
        [*TRL_CASES, *FORMULA_CASES],
        key=lambda case: (case.label.startswith("mix"), case.label, case.source),
    )
    lines = [
        "# Objectives against their sources",
        "",
        f"jaxalign {version('jaxalign')} in float64, TRL {version('trl')}, JAX "
        f"{version('jax')}, torch {version('torch')}. Largest absolute errors of the "
        "loss of a batch and of its gradient towards the token log-probabilities (and "
        "the divergences of tdpo). Made by `objective_parity.py`.",
        "",
        "| objective | source | error of loss | error of gradient |",
        "|---|---|---|---|",
    ]
    for case in cases:
        found = errors(case)
        lines.append(
            f"| {case.label} | {source(case)} | {found.loss:.1e} "
            f"| {found.gradient:.1e} |"
        )
    Path(args.out).write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{len(cases)} comparisons, see {args.out}")


if __name__ == "__main__":
    main()
