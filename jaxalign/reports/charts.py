"""Pictures of figures with their intervals, of joint counts, and of calibration."""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxalign.reports import page
from jaxalign.reports.page import escape


__all__ = [
    "STYLE",
    "calibration_curve",
    "heat_map",
    "interval_bar",
    "number",
    "risk_curve",
    "span",
]

STYLE = """
.interval { width: 100%; min-width: 84px; max-width: 220px; height: 14px;
            display: block; }
.interval .ground { fill: var(--line); } .interval .bar { fill: #5b8fc4; }
.whisker { stroke: var(--ink); stroke-width: 1.6; vector-effect: non-scaling-stroke; }
.heat td { text-align: right; min-width: 5em; padding: 6px 12px; }
.heat table { width: auto; }
.plot { max-width: 420px; } .plot .diagonal { stroke: var(--mute);
  stroke-dasharray: 4 4; } .plot .line { stroke: #5b8fc4; stroke-width: 2; fill: none; }
.plot .dot { fill: #5b8fc4; } .plot .count { fill: #5b8fc4; opacity: .35; }
"""

_LEFT, _TOP, _SIDE = 44, 10, 260
"""Of a plot: where its square begins, and its size."""
_COUNTS = 46
"""Height of the counts below a calibration curve."""


def number(value: Any) -> str:
    """Return a figure for people: three places, fewer of large ones.

    >>> number(0.41283), number(-9.25), number(1114.28), number(None), number(12)
    ('0.413', '−9.250', '1,114.3', '–', '12')
    """
    if not page.is_number(value):
        return "–" if value is None else escape(str(value))
    if isinstance(value, int):
        return f"{value:,}".replace("-", "−")
    places = 1 if abs(value) >= 1000 else 2 if abs(value) >= 100 else 3
    return f"{value:,.{places}f}".replace("-", "−")


def span(interval: Any) -> str:
    """Return two ends for people.

    >>> span([0.25, 0.5]), span(None)
    ('0.250 to 0.500', '–')
    """
    if not isinstance(interval, Sequence) or len(interval) != 2:
        return "–"
    return f"{number(interval[0])} to {number(interval[1])}"


def interval_bar(
    figure: Mapping[str, Any], low: float | int = 0.0, high: float | int = 1.0
) -> str:
    """Draw a figure's value as a bar from zero, and its interval as a line over it.

    Args:
      figure: leaf of metrics.
      low: what the left end stands for.
      high: what the right end stands for; nothing is drawn where it is not above low.
    Example:
      >>> interval_bar({"value": None, "n": 0})
      ''
    """
    value, ends = figure.get("value"), figure.get("interval")
    if not page.is_number(value) or high <= low:
        return ""

    def at(place: float | int) -> float:
        return 200 * (min(max(place, low), high) - low) / (high - low)

    left, right = sorted((at(0.0), at(value)))
    whisker = ""
    if isinstance(ends, Sequence) and len(ends) == 2:
        whisker = (
            f"<line x1='{at(ends[0]):.1f}' x2='{at(ends[1]):.1f}' y1='7' y2='7' "
            "class='whisker'/>"
        )
    return (
        "<svg class='interval' viewBox='0 0 200 14' preserveAspectRatio='none' "
        "aria-hidden='true'><rect x='0' y='3' width='200' height='8' class='ground'/>"
        f"<rect x='{left:.1f}' y='3' width='{right - left:.1f}' height='8' "
        f"class='bar'/>{whisker}</svg>"
    )


def heat_map(label: str, counts: Mapping[str, Mapping[str, Any]], corner: str) -> str:
    """Draw a table of counts whose cells are the darker the more they hold.

    Args:
      label: what it shows, for who hears the page.
      counts: by row and column.
      corner: what rows and columns are.
    Example:
      >>> "412" in heat_map("joint", {"CO": {"CO": 412, "IN": 80}}, "both")
      True
    """
    columns = list(dict.fromkeys(name for row in counts.values() for name in row))
    numbers = [v for row in counts.values() for v in row.values() if page.is_number(v)]
    total, most = sum(numbers) or 1, max(numbers, default=0) or 1

    def cell(value: Any) -> str:
        if not page.is_number(value):
            return f"<td>{number(value)}</td>"
        shade = 0.75 * max(value, 0) / most
        return (
            f"<td class='n' style='background: rgba(91, 143, 196, {shade:.2f})'>"
            f"{number(value)}<br><span class='mute'>{value / total:.1%}</span></td>"
        )

    head = "".join(f"<th scope='col' class='n'>{escape(c)}</th>" for c in columns)
    body = "".join(
        f"<tr><th scope='row'>{escape(name)}</th>"
        f"{''.join(cell(row.get(column)) for column in columns)}</tr>"
        for name, row in counts.items()
    )
    table = (
        f"<table><thead><tr><th scope='col'>{escape(corner)}</th>{head}</tr></thead>"
        f"<tbody>{body}</tbody></table>"
    )
    return f"<div class='heat'>{page.scrolling(label, table)}</div>"


def calibration_curve(bins: Sequence[Mapping[str, Any]], title: str) -> str:
    """Draw the accuracy of each bin over its confidence, and its count below.

    Args:
      bins: of :mod:`jaxalign.evaluation.calibration`.
      title: what the bins have in common.
    Example:
      >>> calibration_curve([], "ten bins of equal width")
      ''
    """
    filled = [b for b in bins if b.get("n")]
    if not filled:
        return ""
    points = [(b["confidence"], b["accuracy"]) for b in filled]
    most = max(b["n"] for b in filled)
    floor = _TOP + _SIDE + 22 + _COUNTS
    bars = "".join(
        f"<rect x='{x:.1f}' y='{floor - tall:.1f}' width='{wide:.1f}' "
        f"height='{tall:.1f}' class='count'><title>{b['n']:,} stated "
        f"{b['low']:.2f} to {b['high']:.2f}: {b['accuracy']:.1%} correct</title></rect>"
        for b in filled
        for tall in [_COUNTS * b["n"] / most]
        for wide in [max(4.0, _SIDE * (b["high"] - b["low"]) - 2)]
        for x in [_x((b["low"] + b["high"]) / 2) - wide / 2]
    )
    said = "; ".join(
        f"{b['confidence']:.2f} stated, {b['accuracy']:.2f} correct, {b['n']}"
        for b in filled
    )
    diagonal = (
        f"<line x1='{_x(0)}' y1='{_y(0)}' x2='{_x(1)}' y2='{_y(1)}' class='diagonal'/>"
    )
    content = diagonal + _line(points) + _dots(points) + bars
    return _plot(
        content,
        floor + 4,
        said,
        f"<b>Calibration</b>, {escape(title)}: share "
        "correct over the confidence stated; on the dashed line they are equal. Below, "
        "how many answers state it.",
        "confidence",
        "correct",
    )


def risk_curve(points: Sequence[Mapping[str, Any]]) -> str:
    """Draw the share of errors among the most confident answers.

    Args:
      points: with ``coverage`` and ``risk``.
    Example:
      >>> risk_curve([])
      ''
    """
    if not points:
        return ""
    line = [(point["coverage"], point["risk"]) for point in points]
    said = f"risk {line[0][1]:.3f} at coverage {line[0][0]:.2f}, {line[-1][1]:.3f} at 1"
    return _plot(
        _line(line) + _dots(line[-1:]),
        _TOP + _SIDE + 24,
        said,
        "<b>Risk against coverage</b>: share of errors if only the most confident "
        "answers are given; a confidence that says nothing gives a flat line.",
        "coverage",
        "risk",
    )


def _plot(
    content: str, height: int, said: str, caption: str, below: str, beside: str
) -> str:
    grid = "".join(
        f"<line x1='{_x(0)}' x2='{_x(1)}' y1='{_y(v)}' y2='{_y(v)}' "
        f"stroke='var(--line)'/><text x='{_LEFT - 6}' y='{_y(v) + 4}' "
        f"text-anchor='end'>{v:g}</text><text x='{_x(v)}' y='{_y(0) + 15}' "
        f"text-anchor='middle'>{v:g}</text>"
        for v in (0, 0.5, 1)
    )
    return (
        f"<figure class='plot'><svg viewBox='0 0 {_LEFT + _SIDE + 14} {height}' "
        f"font-size='11' fill='var(--mute)' role='img' aria-label='{escape(said)}'>"
        f"{grid}{content}<text x='{_x(0.75)}' y='{_y(0) + 15}' text-anchor='middle'>"
        f"{below}</text><text x='{_x(0) + 4}' y='{_TOP + 12}'>{beside}</text></svg>"
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _line(points: Sequence[tuple[float | int, float | int]]) -> str:
    places = " ".join(f"{_x(x):.1f},{_y(y):.1f}" for x, y in points)
    return f"<polyline points='{places}' class='line'/>"


def _dots(points: Sequence[tuple[float | int, float | int]]) -> str:
    return "".join(
        f"<circle cx='{_x(x):.1f}' cy='{_y(y):.1f}' r='4' class='dot'/>"
        for x, y in points
    )


def _x(value: float | int) -> float:
    return _LEFT + _SIDE * float(value)


def _y(value: float | int) -> float:
    return _TOP + _SIDE * (1 - float(value))
