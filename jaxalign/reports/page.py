"""Pages of results: one HTML file each, without scripts and without the network."""

import html
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

from jaxalign.whole_file import whole


__all__ = [
    "curves",
    "escape",
    "folded",
    "is_number",
    "scrolling",
    "table",
    "write",
]

STYLE = """
:root { --ink: #1c2430; --mute: #5d697c; --line: #dfe4ea; --paper: #fff;
        --good: 34, 139, 110; --bad: 200, 66, 62; color-scheme: light dark; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e9f0; --mute: #98a3b3; --line: #333d4a; --paper: #151a21; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 32px 20px 80px; max-width: 1080px; color: var(--ink);
       background: var(--paper); font: 16px/1.55 system-ui, sans-serif;
       overflow-wrap: anywhere; }
h1 { font-size: 28px; line-height: 1.25; margin: 0 0 4px; }
h2 { font-size: 20px; margin: 44px 0 12px; }
a { color: inherit; }
.mute, figcaption, th { color: var(--mute); font-weight: normal; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: 6px 12px 6px 0; vertical-align: top;
         border-bottom: 1px solid var(--line); }
td.n, th.n { font-variant-numeric: tabular-nums; white-space: nowrap; }
.scroll { overflow-x: auto; overflow-wrap: normal; }
.curves { display: grid; gap: 24px;
          grid-template-columns: repeat(auto-fit, minmax(min(300px, 100%), 1fr)); }
figure { margin: 0; } svg { width: 100%; height: auto; display: block; }
.pair { border-top: 1px solid var(--line); padding: 18px 0; }
.sides { display: grid; grid-template-columns: minmax(0, 1fr) minmax(0, 1fr);
         gap: 28px; }
@media (max-width: 720px) { .sides { grid-template-columns: minmax(0, 1fr); } }
.prompt { white-space: pre-wrap; margin: 0 0 12px; font-weight: 600; }
.segment { white-space: pre-wrap; padding: 1px 2px; border-radius: 3px; }
.rows { margin-top: 8px; font-size: 13px; }
.rows td, .rows th { padding: 2px 8px 2px 0; }
pre { overflow-x: auto; font-size: 13px; background: rgba(127, 127, 127, .08);
      padding: 12px; border-radius: 6px; overflow-wrap: normal; }
.scale { display: inline-block; width: 120px; height: 10px; border-radius: 5px;
  background: linear-gradient(90deg, rgba(var(--bad), .7), transparent,
  rgba(var(--good), .7)); }
"""

# Nothing on a page may load or run anything, whatever a response holds.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"

_CURVES = (
    ("loss", "loss", "mean loss of a pair"),
    ("rewards/margins", "reward margin", "β × (log-ratio chosen − rejected), nats"),
    ("rewards/accuracies", "accuracy", "share of pairs whose chosen answer is ahead"),
    ("segments/accuracy", "segment accuracy", "share of segment couples in order"),
    ("logps/chosen", "log-probability of chosen answers", "nats an answer"),
    ("grad_norm", "gradient norm", "before clipping"),
)

_LONG = 900
"""Characters from which on a text is folded."""

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def escape(text: str) -> str:
    r"""Return a text that nobody vouches for as the content of a page.

    What no page may hold is shown by its escape: control characters, and half a
    surrogate pair, which a model or an endpoint may send.

    >>> escape("<b>\0 \ud800")
    '&lt;b&gt;\\x00 \\ud800'
    """
    whole = text.replace("\r\n", "\n").encode("utf-8", "backslashreplace").decode()
    return html.escape(_CONTROL.sub(lambda m: f"\\x{ord(m[0]):02x}", whole))


def write(path: Path, title: str, parts: Iterable[str], style: str = "") -> Path:
    """Write a page; it appears under its name when it is complete.

    Args:
      path: of the file.
      title: of the page, any text.
      parts: HTML of its body, in order.
      style: further rules.
    Raises:
      UserError: the disk is full or the place cannot be written.
    Example:
      >>> import tempfile
      >>> path = write(Path(tempfile.mkdtemp()) / "page.html", "A < B", ["<p>text</p>"])
      >>> "<title>A &lt; B</title>" in path.read_text()
      True
    """
    text = "\n".join(
        [
            "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            "<meta name='viewport' content='width=device-width, initial-scale=1'>",
            f"<title>{escape(title)}</title><style>{STYLE}{style}</style></head><body>",
            *parts,
            "</body></html>\n",
        ]
    )
    with whole(path, "what it shows is in the run's files") as file:
        file.write(text)
    return path


def table(
    label: str,
    head: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    text: Sequence[int] = (),
) -> str:
    """Return a table that scrolls by itself where the page is too narrow.

    Args:
      label: what it shows, for who hears the page.
      head: titles of the columns, HTML.
      rows: of cells, HTML; the first of each is the row's title.
      text: columns that hold texts; the others, but the first, hold figures.
    Example:
      >>> "<th" in table("losses", ["step", "loss"], [["1", "0.69"]])
      True
    """

    def kind(column: int) -> str:
        return "" if column in (0, *text) else " class='n'"

    titles = "".join(
        f"<th scope='col'{kind(i)}>{title}</th>" if title else "<td></td>"
        for i, title in enumerate(head)
    )
    body = "".join(
        "<tr>"
        + f"<th scope='row'>{row[0]}</th>"
        + "".join(f"<td{kind(i)}>{cell}</td>" for i, cell in enumerate(row) if i)
        + "</tr>"
        for row in rows
    )
    return scrolling(
        label,
        f"<table><thead><tr>{titles}</tr></thead><tbody>{body}</tbody></table>",
    )


def scrolling(label: str, content: str) -> str:
    """Return what may be wider than the page, for the keyboard too.

    >>> scrolling("losses", "<table></table>").endswith("<table></table></div>")
    True
    """
    return (
        f"<div class='scroll' role='region' tabindex='0' aria-label='{escape(label)}'>"
        f"{content}</div>"
    )


def folded(text: str, content: str, kind: str) -> str:
    """Return a text, closed if it is long.

    Args:
      text: that is shown.
      content: its HTML.
      kind: class of the element.
    Example:
      >>> folded("short", "short", "text")
      "<div class='text' dir='auto'>short</div>"
    """
    shown = f"<div class='{kind}' dir='auto'>{content}</div>"
    if len(text) <= _LONG:
        return shown
    start = " ".join(text[:200].split())
    return (
        f"<details><summary><span class='{kind}'>{escape(start)} …</span> "
        f"<span class='mute'>({len(text):,} characters)</span></summary>{shown}"
        "</details>"
    )


def curves(steps: Mapping[int, Mapping[str, Any]]) -> str:
    """Draw a run's metrics over its steps; those with one point or none are left out.

    Args:
      steps: as of ``training.metrics.read``.
    Example:
      >>> curves({1: {"loss": 0.69}})
      ''
    """
    drawn = [found for name in _CURVES if (found := _curve(steps, *name))]
    return f"<div class='curves'>{''.join(drawn)}</div>" if drawn else ""


def is_number(value: Any) -> TypeGuard[float]:
    """Tell whether a logged value is a number; what is not finite is logged as a text.

    >>> is_number(1.5), is_number("NaN"), is_number(True)
    (True, False, False)
    """
    return isinstance(value, int | float) and not isinstance(value, bool)


def _curve(
    steps: Mapping[int, Mapping[str, Any]], name: str, title: str, unit: str
) -> str:
    train, held = (
        [(s, v[key]) for s, v in steps.items() if is_number(v.get(key))]
        for key in (name, f"eval_{name}")
    )
    points = [*train, *held]
    if len(points) < 2:
        return ""
    low, high = min(y for _, y in points), max(y for _, y in points)
    pad = (high - low) * 0.08 or abs(high) * 0.1 or 1.0
    low, high = low - pad, high + pad
    last = max(s for s, _ in points) or 1
    width, height, left, bottom = 360, 190, 46, 24

    def place(step: int, value: float) -> str:
        x = left + (width - left - 8) * step / last
        y = 8 + (height - bottom - 8) * (1 - (value - low) / (high - low))
        return f"{x:.1f},{y:.1f}"

    grid = "".join(
        f"<line x1='{left}' x2='{width - 8}' y1='{y}' y2='{y}' stroke='var(--line)'/>"
        f"<text x='{left - 6}' y='{y + 4}' text-anchor='end'>{value:.3g}</text>"
        for value, y in (
            (value, float(place(0, value).split(",")[1]))
            for value in (low + pad, (low + high) / 2, high - pad)
        )
    )
    lines = (
        f"<polyline fill='none' stroke='#8a96a8' stroke-width='1.5' points='"
        f"{' '.join(place(*p) for p in train)}'/>"
        f"<polyline fill='none' stroke='#228b6e' stroke-width='2.5' points='"
        f"{' '.join(place(*p) for p in held)}'/>"
    )
    dots = "".join(
        "<circle r='3.5' fill='#228b6e' cx='{}' cy='{}'/>".format(*place(*p).split(","))
        for p in held
    )
    ends = f"{points[0][1]:.3g} at step {points[0][0]}, {train[-1][1]:.3g} at the end"
    label = html.escape(f"{title}: {ends}" if train else title)
    key = " (grey training, green held out)" if held else ""
    return (
        f"<figure><svg viewBox='0 0 {width} {height}' font-size='11' "
        f"fill='var(--mute)' role='img' aria-label='{label}'>"
        f"{grid}{lines}{dots}"
        f"<text x='{width - 8}' y='{height - 6}' text-anchor='end'>step {last}</text>"
        f"</svg><figcaption><b>{html.escape(title)}</b>: {html.escape(unit)}{key}"
        "</figcaption></figure>"
    )
