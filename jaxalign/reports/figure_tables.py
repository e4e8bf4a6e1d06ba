"""Metrics as tables, whatever a task calls its figures and however it nests them."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jaxalign.evaluation import results
from jaxalign.reports import charts, page
from jaxalign.reports.page import escape


__all__ = ["APART", "by_topic", "figures", "name_of", "numbers", "said"]

APART = (
    *("task", "n", "settings", "facts", "topics", "subtopics", "joint", "upstream"),
    *("seen", "defects", "cost", "warnings"),
)
"""Parts of metrics that have sections of their own."""

_LEAF = ("value", "standard_error", "interval", "n", "bounds")


def name_of(path: Sequence[str]) -> str:
    """Return a figure's path for people.

    >>> name_of(("final", "judge_failed"))
    'final · judge failed'
    """
    return " · ".join(part.replace("_", " ") for part in path)


def figures(metrics: Mapping[str, Any]) -> str:
    """Return the table of all figures, each with its interval as a bar and in numbers.

    Args:
      metrics: of a task.
    Example:
      >>> figures({"n": 8})
      ''
    """
    kept = {name: v for name, v in metrics.items() if name not in APART}
    leaves = list(results.leaves(kept))
    if not leaves:
        return ""
    notes = {path: _notes(leaf) for path, leaf in leaves}
    rows = []
    for path, leaf in leaves:
        group = [other for place, other in leaves if place[:-1] == path[:-1]]
        rows.append(
            [
                escape(name_of(path)),
                f"<b>{charts.number(leaf['value'])}</b>",
                charts.interval_bar(leaf, *_ends(group)),
                charts.span(leaf.get("interval")),
                charts.number(leaf.get("standard_error")),
                charts.number(leaf["n"]),
                *([notes[path]] if any(notes.values()) else []),
            ]
        )
    head = ["", "value", "", "95 % interval", "standard error", "n"]
    if any(notes.values()):
        head.append("")
    return page.table("figures", head, rows, text=(6,))


def by_topic(topics: Mapping[str, Any], label: str, small: int = 20) -> str:
    """Return, for each group of figures, a table of topics with bars.

    Args:
      topics: figures, nested or not, by topic.
      label: what the topics are.
      small: topics of fewer are shown in grey.
    Example:
      >>> leaf = {"value": 0.5, "interval": [0.2, 0.8], "n": 8}
      >>> by_topic({"sea": {"final": {"CO": leaf}}}, "topics").startswith("<h4>final")
      True
    """
    found = {
        topic: dict(results.leaves(of)) for topic, of in topics.items() if _map(of)
    }
    paths = list(dict.fromkeys(path for leaves in found.values() for path in leaves))
    parts = []
    for group in dict.fromkeys(path[:-1] for path in paths):
        mine = [path for path in paths if path[:-1] == group]
        every = [leaves[p] for leaves in found.values() for p in mine if p in leaves]
        ends = _ends(every)
        rows = []
        for topic, leaves in found.items():
            counts = [leaves[p]["n"] for p in mine if p in leaves]
            grey = "class='mute'" if counts and max(counts) < small else ""
            rows.append(
                [
                    f"<span {grey}>{escape(topic)}</span>",
                    charts.number(max(counts, default=None)),
                    *(_cell(leaves.get(path), ends) for path in mine),
                ]
            )
        title = f"<h4>{escape(name_of(group))}</h4>" if group else ""
        head = ["", "n", *(escape(name_of(path[-1:])) for path in mine)]
        parts.append(title + page.table(f"{label}, {name_of(group)}", head, rows))
    return "".join(parts)


def numbers(label: str, values: Mapping[str, Any]) -> str:
    """Return a table of plain numbers and texts, nested or not; figures are left out.

    Args:
      label: what it shows.
      values: by name.
    Example:
      >>> "judge failed" in numbers("counts", {"final": {"judge_failed": 3}})
      True
    """
    rows = [[escape(name_of(path)), value] for path, value in _plain(values)]
    return page.table(label, ["", ""], rows, text=(1,)) if rows else ""


def said(label: str, value: Any) -> str:
    """Return anything that a task says: a text, numbers, a list of rows.

    Args:
      label: what it is.
      value: of JSON.
    Example:
      >>> said("source", "a < b")
      '<p>a &lt; b</p>'
    """
    if isinstance(value, str):
        return f"<p>{escape(value)}</p>"
    if _map(value):
        leaves = figures(value)
        inner = {k: v for k, v in value.items() if _map(v) and not _leaf(v)}
        if inner and len(inner) == len(value) and not leaves:
            return _matrix(label, inner)
        return leaves + numbers(label, value)
    if isinstance(value, Sequence) and value and all(map(_map, value)):
        return _matrix(label, {str(n): row for n, row in enumerate(value, 1)})
    if isinstance(value, Sequence) and value:
        return "<ul>" + "".join(f"<li>{_text(v)}</li>" for v in value) + "</ul>"
    return f"<p>{_text(value)}</p>"


def _matrix(label: str, rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Return mappings below each other, their names as columns."""
    flat = {name: dict(_plain(row, figures_too=True)) for name, row in rows.items()}
    columns = list(dict.fromkeys(path for row in flat.values() for path in row))
    head = ["", *(escape(name_of(path)) for path in columns)]
    body = [
        [escape(name), *(row.get(path, "–") for path in columns)]
        for name, row in flat.items()
    ]
    return page.table(label, head, body)


def _cell(leaf: Mapping[str, Any] | None, ends: tuple[float | int, float | int]) -> str:
    if leaf is None:
        return "–"
    told = f"95 %: {charts.span(leaf.get('interval'))}, n = {leaf['n']}"
    return (
        f"<span title='{escape(told)}'>{charts.number(leaf['value'])}"
        f"{charts.interval_bar(leaf, *ends)}</span>"
    )


def _ends(leaves: Sequence[Mapping[str, Any]]) -> tuple[float | int, float | int]:
    """Return the scale that figures side by side share: 0 to 1 where that holds all."""
    every = [0.0]
    for leaf in leaves:
        for value in (leaf.get("value"), *(leaf.get("interval") or ())):
            if page.is_number(value):
                every.append(value)
    low, high = min(every), max(every)
    return (0.0, 1.0) if low >= 0 and high <= 1 else (low, high)


def _notes(leaf: Mapping[str, Any]) -> str:
    notes = []
    bounds = leaf.get("bounds")
    if bounds is not None:
        notes.append(
            f"{charts.span(bounds)} if all undecided fell one way or the other"
        )
    notes += [
        f"{escape(name_of((name,)))}: {_text(value)}"
        for name, value in leaf.items()
        if name not in _LEAF
    ]
    return f"<span class='mute'>{'; '.join(notes)}</span>" if notes else ""


def _plain(
    values: Mapping[str, Any], at: tuple[str, ...] = (), *, figures_too: bool = False
) -> Iterator[tuple[tuple[str, ...], str]]:
    for name, value in values.items():
        path = (*at, name)
        if _leaf(value):
            if figures_too:
                yield path, _cell(value, (0.0, 0.0))
        elif _map(value):
            yield from _plain(value, path, figures_too=figures_too)
        else:
            yield path, _text(value)


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Sequence) and not isinstance(value, str):
        if len(value) == 2 and all(map(page.is_number, value)):
            return charts.span(value)
        return ", ".join(map(_text, value))
    return charts.number(value)


def _map(value: Any) -> bool:
    return isinstance(value, Mapping)


def _leaf(value: Any) -> bool:
    return isinstance(value, Mapping) and "value" in value and "n" in value
