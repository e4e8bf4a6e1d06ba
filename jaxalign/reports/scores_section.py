"""How scores are distributed, by aspect and round."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence

from jaxalign.reports import page
from jaxalign.reports.figures import Bins, bar, histogram, signed
from jaxalign.reports.page import escape
from jaxalign.reports.run_files import Run, judged_of


__all__ = ["distributions"]


def distributions(run: Run) -> str:
    """Draw a row of histograms for each aspect, and one for the candidates."""
    columns = [*(f"round {one.number}" for one in run.rounds)]
    groups = [one.judged for one in run.rounds]
    # By metrics held-out responses have labels, and scores of another scale.
    if run.policy in run.held_out and run.config.gate.metrics is None:
        columns.append(f"held out, {run.policy.replace('-', ' ')}")
        groups.append(run.held_out[run.policy])
    every = [list(judged_of(group)) for group in groups]
    scores = [[j.score for j in some if j.score is not None] for some in every]
    rows = [_row("<b>candidate</b>", scores, ())]
    aspects = sorted(
        {a for some in every for j in some for s in j.segments for a in s.scores}
    )
    # A checkpoint's scores are probabilities in disguise and fill no scale.
    ends = () if run.config.judge.name in ("local", "reward") else (0.0, 4.0)
    for aspect in aspects:
        values = [
            [s.scores[aspect] for j in some for s in j.segments if aspect in s.scores]
            for some in every
        ]
        rows.append(_row(escape(aspect), values, ends))
    what = "Scores of candidates; higher is better."
    if aspects and run.config.decomposer.name == "segments":
        what = (
            "A candidate's score is the mean over its segments of the mean over "
            "aspects; the rows below it count segments."
        )
    elif aspects:
        what = f"{what} The rows below them count segments."
    units = [
        Counter((u.kind, u.verdict) for j in some for u in j.units) for some in every
    ]
    return (
        f"<p>{what} Bars are shares of a row's largest; the line is the mean.</p>"
        + page.table("distributions of scores", ("", *columns), rows)
        + (_units(columns, units) if any(units) else "")
    )


def _row(
    name: str, groups: Sequence[Sequence[float]], ends: Sequence[float]
) -> list[str]:
    bins = Bins.of([value for group in groups for value in group], ends=ends)
    top = max((max(bins.shares(group)) for group in groups), default=0.0) or 1.0
    return [
        name,
        *(
            f"{histogram(group, bins, top)}mean "
            f"{signed(math.fsum(group) / len(group), plus='')} "
            f"<span class='mute'>of {len(group):,}</span>"
            if group
            else "<span class='mute'>no score</span>"
            for group in groups
        ),
    ]


def _units(
    columns: Sequence[str], found: Sequence[Mapping[tuple[str, str | None], int]]
) -> str:
    kinds = sorted(
        {key for counts in found for key in counts}, key=lambda key: repr(key)
    )
    totals = [sum(counts.values()) for counts in found]
    rows = [
        [
            escape(f"{kind}: {verdict or 'no verdict'}"),
            *(
                f"{counts.get((kind, verdict), 0):,} "
                f"{bar(counts.get((kind, verdict), 0) / max(1, total))}"
                for counts, total in zip(found, totals, strict=True)
            ),
        ]
        for kind, verdict in kinds
    ]
    return "<h3>What was found in them</h3>" + page.table(
        "verdicts on the parts of candidates", ("", *columns), rows
    )
