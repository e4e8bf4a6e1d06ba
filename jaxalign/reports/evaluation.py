"""report.html of an evaluation: all tasks of a directory, from its files alone."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from jaxalign.evaluation import results
from jaxalign.evaluation.results import Results
from jaxalign.reports import charts, figure_tables, items_section, page, thumbnails
from jaxalign.reports.figures import count
from jaxalign.reports.page import escape


__all__ = ["MOST_FAILED", "STYLE", "write"]

MOST_FAILED = 0.02
"""Share of answers or of grades that may fail before a page warns."""

STYLE = (
    """
h3 { font-size: 16px; margin: 28px 0 8px; } h4 { font-size: 14px; margin: 14px 0 4px; }
h4 { color: var(--mute); font-weight: normal; }
nav { font-size: 14px; margin: 20px 0 -12px; line-height: 2; }
nav a { margin-right: 14px; white-space: nowrap; }
.warning { border-left: 3px solid rgb(var(--bad)); padding: 2px 0 2px 10px; }
.text, .prompt { white-space: pre-wrap; unicode-bidi: isolate; }
.scroll { margin-bottom: 14px; } .scroll:focus-visible { outline: 2px solid; }
tbody th { min-width: 7em; padding-right: 16px; }
figcaption { font-size: 14px; max-width: 46em; } summary { cursor: pointer; }
.plots { display: grid; gap: 24px;
         grid-template-columns: repeat(auto-fit, minmax(min(320px, 100%), 1fr)); }
"""
    + charts.STYLE
    + items_section.STYLE
    + thumbnails.STYLE
)

_HEADLINES = 4
"""Figures of a task in the table of all tasks."""


def write(out: str | Path) -> Path:
    """Write ``OUT/report.html`` from what ``jaxalign eval`` left in OUT.

    Args:
      out: directory of the run.
    Returns:
      Where the page is.
    Raises:
      UserError: there is no task in it, a file is not as the harness writes it, or the
        page cannot be written.
    Example::

      print(write("out"))
    """
    out = Path(out)
    tasks = results.read(out)
    links = "".join(
        f"<a href='#task-{n}'>{escape(task.name)}</a>" for n, task in enumerate(tasks)
    )
    title = "Evaluation: " + (_models(tasks) or out.resolve().name)
    parts = [
        f"<main><h1>{escape(title)}</h1>",
        f"<p class='mute'>{count(len(tasks), 'task')}; shares lie between 0 and 1; "
        "intervals are of 95 % confidence, n is what a figure is a share or mean of. "
        "What could not be answered or graded is in no share, and is counted.</p>",
        _overview(tasks),
        f"<nav aria-label='tasks'>{links}</nav>" if len(tasks) > 1 else "",
        *(_task(task, number) for number, task in enumerate(tasks)),
        "</main>",
    ]
    return page.write(out / "report.html", title, parts, STYLE)


def _models(tasks: Sequence[Results]) -> str:
    """Return who answered, or which judge was measured, as the settings say it."""
    names = []
    for task in tasks:
        settings = task.metrics.get("settings") or {}
        model = settings.get("model") or settings.get("judge")
        if isinstance(model, Mapping):
            model = " + ".join(
                str(model[key]) for key in ("model", "adapter") if model.get(key)
            )
        names.append(model)
    return ", ".join(dict.fromkeys(str(name) for name in names if name))


def _overview(tasks: Sequence[Results]) -> str:
    rows = []
    for number, task in enumerate(tasks):
        shown = [
            f"{escape(figure_tables.name_of(path))} <b>{charts.number(leaf['value'])}"
            f"</b> <span class='mute'>{charts.span(leaf.get('interval'))}</span>"
            for path, leaf in _headlines(task.metrics)
        ]
        failed = sum(
            row["status"] in ("failed", "judge_failed", "unparsed")
            for row in (*task.answers, *task.grades)
        )
        rows.append(
            [
                f"<a href='#task-{number}'>{escape(task.name)}</a>",
                charts.number(task.metrics.get("n")),
                f"{failed:,}",
                "<br>".join(shown),
            ]
        )
    head = ["task", "items", "failed", "figures"]
    return page.table("all tasks", head, rows, text=(3,))


def _headlines(
    metrics: Mapping[str, Any],
) -> list[tuple[tuple[str, ...], Mapping[str, Any]]]:
    """Return the first figure of each group, then the second ones."""
    kept = {k: v for k, v in metrics.items() if k not in figure_tables.APART}
    leaves = list(results.leaves(kept))
    groups = [path[:-1] for path, _ in leaves]
    ranks = [groups[:n].count(group) for n, group in enumerate(groups)]
    order = sorted(range(len(leaves)), key=lambda n: ranks[n])
    return [leaves[n] for n in order[:_HEADLINES]]


def _task(task: Results, number: int) -> str:
    metrics = task.metrics
    sections = {
        "": _heading(task),
        "Figures": figure_tables.figures(metrics),
        "By topic": _topics(metrics),
        "Both questions together": _joint(metrics),
        "Stated confidence": _calibration(metrics),
        "Counts": figure_tables.numbers(
            "counts",
            {k: v for k, v in metrics.items() if k not in figure_tables.APART},
        ),
        "By the official rule": _official(metrics),
        "Published": _facts(metrics),
        "Failures": _failures(task),
        "Seen in training": _said("overlaps with training data", metrics.get("seen")),
        "Defects of the files": _said("defects", metrics.get("defects")),
        "Cost": _cost(metrics),
        "Items": items_section.items(task, number),
        "Settings": _settings(metrics),
    }
    shown = "".join(
        (f"<h3>{title}</h3>" if title else "") + content
        for title, content in sections.items()
        if content
    )
    return f"<h2 id='task-{number}'>{escape(task.name)}</h2>{shown}"


def _heading(task: Results) -> str:
    metrics = task.metrics
    settings = metrics.get("settings") or {}
    told = [count(n, "item") if isinstance(n := metrics.get("n"), int) else ""]
    if metrics.get("condition"):
        told.append(f"condition {metrics['condition']}")
    if settings.get("limit"):
        told.append(
            f"a sample of {settings['limit']} items, drawn by seed "
            f"{settings.get('seed', 0)}: not all of the benchmark"
        )
    warnings = [str(one) for one in metrics.get("warnings") or ()]
    for what, rows in (("answers", task.answers), ("grades", task.grades)):
        bad = Counter(r["status"] for r in rows if r["status"] not in _FINE)
        if rows and bad.total() / len(rows) > MOST_FAILED:
            named = ", ".join(f"{n:,} {s.replace('_', ' ')}" for s, n in bad.items())
            again = (
                ""
                if settings.get("grades")
                else " The same command asks for what failed again."
            )
            warnings.append(
                f"{bad.total() / len(rows):.1%} of the {what} failed ({named} of "
                f"{len(rows):,}).{again}"
            )
    return f"<p class='mute'>{escape('; '.join(filter(None, told)))}</p>" + "".join(
        f"<p class='warning'>{escape(text)}</p>" for text in warnings
    )


_FINE = ("ok", "empty", "refused")


def _topics(metrics: Mapping[str, Any]) -> str:
    parts = ""
    if isinstance(topics := metrics.get("topics"), Mapping):
        parts += figure_tables.by_topic(topics, "topics")
    if isinstance(topics := metrics.get("subtopics"), Mapping):
        parts += (
            f"<details><summary>{count(len(topics), 'subtopic')}, those of fewer than "
            f"20 items in grey</summary>{figure_tables.by_topic(topics, 'subtopics')}"
            "</details>"
        )
    return parts


def _joint(metrics: Mapping[str, Any]) -> str:
    joint = metrics.get("joint")
    if not isinstance(joint, Mapping):
        return ""
    counts = {name: row for name, row in joint.items() if _counts(row)}
    rest = {name: value for name, value in joint.items() if name not in counts}
    drawn = charts.heat_map("both questions together", counts, "first ↓ second →")
    return (drawn if counts else "") + figure_tables.said("joint", rest)


def _counts(row: Any) -> bool:
    return isinstance(row, Mapping) and all(isinstance(v, int) for v in row.values())


def _calibration(metrics: Mapping[str, Any]) -> str:
    parts = []
    for path, found in _with_bins(metrics):
        bins = found["bins"]
        kinds = bins if isinstance(bins, Mapping) else {"bins": bins}
        drawn = [
            charts.calibration_curve(some, figure_tables.name_of((kind,)))
            for kind, some in kinds.items()
        ]
        drawn.append(charts.risk_curve(found.get("risk_coverage") or ()))
        title = figure_tables.name_of(path)
        parts.append(
            f"<h4>{escape(title)}</h4><div class='plots'>{''.join(drawn)}</div>"
        )
    return "".join(parts)


def _with_bins(
    value: Mapping[str, Any], at: tuple[str, ...] = ()
) -> list[tuple[tuple[str, ...], Mapping[str, Any]]]:
    found = [(at, value)] if "bins" in value else []
    for name, part in value.items():
        if isinstance(part, Mapping) and name != "settings":
            found += _with_bins(part, (*at, name))
    return found


def _official(metrics: Mapping[str, Any]) -> str:
    upstream = metrics.get("upstream")
    if not upstream:
        return ""
    return (
        "<p class='mute'>What the authors' own rule makes of the same grades.</p>"
        + figure_tables.said("by the official rule", upstream)
    )


def _facts(metrics: Mapping[str, Any]) -> str:
    facts = metrics.get("facts")
    if not isinstance(facts, Mapping):
        return ""
    return "".join(
        f"<h4>{escape(figure_tables.name_of((name,)))}</h4>"
        f"{figure_tables.said(name, value)}"
        for name, value in facts.items()
    )


def _failures(task: Results) -> str:
    rows = []
    for what, given in (("answer", task.answers), ("grade", task.grades)):
        reasons = Counter(
            (row["question"], row["status"], str(row.get("reason") or ""))
            for row in given
            if row["status"] != "ok"
        )
        rows += [
            [
                escape(f"{what}, {question}"),
                escape(status.replace("_", " ")),
                f"{number:,}",
                escape(reason[:200]),
            ]
            for (question, status, reason), number in reasons.most_common(50)
        ]
    if not rows:
        return ""
    head = ["of", "status", "number", "reason"]
    return page.table("what has no answer or no grade", head, rows, text=(1, 3))


def _said(label: str, value: Any) -> str:
    return figure_tables.said(label, value) if value else ""


def _cost(metrics: Mapping[str, Any]) -> str:
    settings = metrics.get("settings") or {}
    return _said("cost", metrics.get("cost") or settings.get("tokens"))


def _settings(metrics: Mapping[str, Any]) -> str:
    plain = json.loads(json.dumps(metrics.get("settings") or {}))
    text = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)
    shown = page.scrolling("settings", f"<pre>{escape(text)}</pre>")
    return f"<details><summary>what the figures depend on</summary>{shown}</details>"
