"""The page of ``jaxalign compare``: runs side by side, with paired differences."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxalign.evaluation import compare, results
from jaxalign.evaluation.compare import Compared, Comparison, QuestionComparison
from jaxalign.evaluation.measures import Difference
from jaxalign.evaluation.results import Results
from jaxalign.reports import charts, evaluation, figure_tables, page
from jaxalign.reports.figures import signed
from jaxalign.reports.page import escape
from jaxalign.whole_file import whole


__all__ = ["write"]

_STYLE = """
.differs { width: 140px; height: 16px; display: block; }
.differs .zero { stroke: var(--mute); stroke-dasharray: 2 2; }
.differs circle { fill: #5b8fc4; }
"""

_TESTS = {
    "mcnemar": "McNemar, exact",
    "sign_flip": "sign flips",
    "swap": "exchanged rows",
}


def write(path: str | Path, found: Compared) -> Path:
    """Write the page, and the same as JSON beside it.

    Args:
      path: of the page; the JSON has its name with ``.json``.
      found: of :func:`jaxalign.evaluation.compare.compare`.
    Returns:
      Where the page is.
    Raises:
      UserError: one of them cannot be written.
    Example::

      write("compare.html", compare(["out/base", "out/tuned"], CompareConfig()))
    """
    path = Path(path)
    with whole(path.with_suffix(".json"), "the runs are as they were") as file:
        json.dump(compare.as_json(found), file, indent=1)
    baselines = list(dict.fromkeys(task.baseline for task in found.tasks))
    runs = list(dict.fromkeys(task.run for task in found.tasks))
    tasks = list(dict.fromkeys(task.task for task in found.tasks))
    parts = [
        "<main><h1>Evaluations compared</h1>",
        f"<p>Baseline: <b>{escape(', '.join(baselines))}</b>. Beside it: "
        f"<b>{escape(', '.join(runs))}</b>.</p>",
        "<p class='mute'>A difference is the run's figure minus the baseline's, on the "
        "rows that both graded, with the standard error of paired rows and an interval "
        "of 95 %. p is two-sided. Rows that one of them lacks, or that could not be "
        "graded, are in neither side.</p>",
        *(
            f"<p class='warning'>In one run alone ({escape(run)}): "
            f"{escape(', '.join(alone))}.</p>"
            for run, alone in found.unshared.items()
        ),
    ]
    for name in tasks:
        mine = [task for task in found.tasks if task.task == name]
        parts.append(f"<h2>{escape(name)}</h2>{_side_by_side(mine)}")
        parts += [_comparison(task) for task in mine]
    parts.append("</main>")
    return page.write(path, "Evaluations compared", parts, evaluation.STYLE + _STYLE)


def _comparison(task: Comparison) -> str:
    parts = [f"<h3>{escape(task.run)} minus {escape(task.baseline)}</h3>"]
    if task.settings:
        told = "; ".join(
            f"{name}: {json.dumps(one, ensure_ascii=False)[:80]} and "
            f"{json.dumps(other, ensure_ascii=False)[:80]}"
            for name, (one, other) in task.settings.items()
        )
        parts.append(f"<p class='warning'>Not the same settings: {escape(told)}.</p>")
    if task.asked_otherwise:
        parts.append(
            f"<p class='warning'>{task.asked_otherwise:,} items were asked in other "
            "words.</p>"
        )
    return "".join([*parts, *map(_question, task.questions)])


def _question(question: QuestionComparison) -> str:
    left = [f"{n:,} {k.replace('_', ' ')}" for k, n in question.left_out.items() if n]
    told = f"{question.rows:,} rows"
    if question.clusters is not None:
        told += f" of {question.clusters:,} items, which are clusters"
    if left:
        told += f"; left out: {', '.join(left)}"
    parts = [f"<h4>{escape(question.name)}: {escape(told)}</h4>"]
    if not question.differences:
        return parts[0] + "<p>Grades are neither classes nor numbers.</p>"
    rows = [_cells(d, d.measure, question.differences) for d in question.differences]
    head = [
        *("", "baseline", "run", "difference", "", "95 % interval"),
        *("standard error", "p", "test", "gained", "lost"),
    ]
    parts.append(page.table(question.name, head, rows, text=(8,)))
    for d in question.differences:
        if d.topics:
            parts.append(_topics(d))
    return "".join(parts)


def _topics(whole: Difference) -> str:
    every = list(whole.topics.values())
    rows = [
        [*_cells(d, name, every)[:8], _p(d.adjusted), charts.number(d.difference.n)]
        for name, d in whole.topics.items()
    ]
    head = [
        *("", "baseline", "run", "difference", "", "95 % interval"),
        *("standard error", "p", "p, Holm", "n"),
    ]
    table = page.table(f"{whole.measure} by topic", head, rows)
    return (
        f"<details><summary>{escape(whole.measure)} by topic, p corrected over the "
        f"topics (Holm)</summary>{table}</details>"
    )


def _cells(d: Difference, title: str, beside: Sequence[Difference]) -> list[str]:
    apart = d.difference
    ends = "–"
    if apart.interval is not None:
        ends = f"{signed(apart.interval[0])} to {signed(apart.interval[1])}"
    return [
        escape(title),
        charts.number(d.baseline.value),
        charts.number(d.run.value),
        "–" if apart.value is None else f"<b>{signed(apart.value)}</b>",
        _picture(d, beside),
        ends,
        charts.number(apart.standard_error),
        _p(d.p_value),
        _TESTS[d.test],
        charts.number(d.gained),
        charts.number(d.lost),
    ]


def _picture(d: Difference, beside: Sequence[Difference]) -> str:
    """Draw a difference and its interval about zero, to the scale of those beside."""
    every = [
        abs(end)
        for other in beside
        for end in (other.difference.value, *(other.difference.interval or ()))
        if end is not None
    ]
    most = max(every, default=0.0)
    if d.difference.value is None or most == 0:
        return ""

    def at(value: float) -> float:
        return 70 + 64 * value / most

    line = ""
    if d.difference.interval is not None:
        low, high = map(at, d.difference.interval)
        line = f"<line x1='{low:.1f}' x2='{high:.1f}' y1='8' y2='8' class='whisker'/>"
    return (
        "<svg class='differs' viewBox='0 0 140 16' aria-hidden='true'><line x1='70' "
        f"x2='70' y1='0' y2='16' class='zero'/>{line}"
        f"<circle cx='{at(d.difference.value):.1f}' cy='8' r='3.5'/></svg>"
    )


def _p(value: float | None) -> str:
    if value is None:
        return "–"
    return "&lt; 0.0001" if value < 0.0001 else f"{value:.4f}"


def _side_by_side(comparisons: Sequence[Comparison]) -> str:
    """Return the runs' own figures, each over all rows of its run."""
    sides: dict[str, Results] = {}
    for task in comparisons:
        sides.setdefault(task.baseline, task.sources[0])
        sides[task.run] = task.sources[1]
    found = {
        name: dict(results.leaves(_figures(source.metrics)))
        for name, source in sides.items()
    }
    paths = list(dict.fromkeys(path for leaves in found.values() for path in leaves))
    if not paths:
        return ""
    rows = [
        [
            escape(figure_tables.name_of(path)),
            *(_figure(leaves.get(path)) for leaves in found.values()),
        ]
        for path in paths
    ]
    head = ["", *map(escape, found)]
    table = page.table("the runs' own figures", head, rows)
    return (
        "<details open><summary>Each run's own figures, over all rows that it graded"
        f"</summary>{table}</details>"
    )


def _figures(metrics: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in metrics.items() if k not in figure_tables.APART}


def _figure(leaf: Mapping[str, Any] | None) -> str:
    if leaf is None:
        return "–"
    return (
        f"<b>{charts.number(leaf['value'])}</b> <span class='mute'>"
        f"{charts.span(leaf.get('interval'))}, n = {charts.number(leaf['n'])}</span>"
    )
