"""A page to look at: figures, pictures with answers, pairs with coloured segments."""

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxalign.reports import page
from jaxalign.reports.page import escape
from tiny_vlm.files import Data
from tiny_vlm.measuring import FIGURES, Answer, lines
from tiny_vlm.scoring import Share, is_right


__all__ = ["table", "write"]

_STYLE = """
.grid { display: grid; gap: 18px;
        grid-template-columns: repeat(auto-fill, minmax(230px, 1fr)); }
.grid img, .pair img { width: 112px; height: 112px; border: 1px solid var(--line); }
.right { color: rgb(var(--good)); } .wrong { color: rgb(var(--bad)); }
"""

_SHOWN = 24


def table(measured: Mapping[str, Mapping[str, Share]]) -> str:
    """Return the figures in Markdown: a row for each, a column for each policy."""
    head = f"| | {' | '.join(measured)} |\n|---|{'---|' * len(measured)}"
    cells = {x: [_cell(found[x]) for found in measured.values()] for x in FIGURES}
    rows = [f"| {name} | {' | '.join(found)} |" for name, found in cells.items()]
    return "\n".join([head, *rows])


def write(
    data: Data,
    measured: Mapping[str, Mapping[str, Share]],
    beside: Sequence[tuple[str, Share]],
    answers: Mapping[str, Sequence[Answer]],
    pairs: Path,
) -> Path:
    """Write DIR/report.html.

    Args:
      measured: the figures of each policy, by its name.
      beside: what else was counted, for comparison.
      answers: what each policy said, to the same questions in the same order.
    """
    figures = [
        (f"{escape(figure)}<br><span class='mute'>{escape(what)}</span>",)
        + tuple(_cell(found[figure]) for found in measured.values())
        for figure, what in FIGURES.items()
    ]
    others = [(escape(name), _cell(found)) for name, found in beside]
    parts = [
        "<h1>A small model that sees</h1>",
        f"<p>{len(data.symbols)} drawn symbols; shares with 95 % intervals.</p>",
        page.table("figures", ["", *map(escape, measured)], figures),
        "<h2>Beside it</h2>",
        page.table("beside", ["", "right"], others),
        "<h2>Held-out drawings</h2>",
        f"<div class='grid'>{''.join(_asked(data, answers))}</div>",
        "<h2>Pairs of its own mistakes</h2>",
        *(_pair(data, row) for row in lines(pairs)[:_SHOWN]),
    ]
    title = "A small model that sees"
    return page.write(data.folder / "report.html", title, parts, _STYLE)


def _cell(found: Share) -> str:
    low, high = found.interval
    return f"{found.value:.3f} ({low:.3f}–{high:.3f}; {found.of})" if found.of else "–"


def _asked(data: Data, answers: Mapping[str, Sequence[Answer]]) -> list[str]:
    """Return every so manyth question with what each policy said."""
    columns = list(zip(*answers.values(), strict=True))
    shown = columns[:: max(1, len(columns) // _SHOWN)][:_SHOWN]
    boxes = []
    for said in shown:
        asked = said[0].asked
        rows = "".join(
            f"<li>{escape(name)}: <b class='{_colour(one)}'>{escape(one.text)}</b>"
            for name, one in zip(answers, said, strict=True)
        )
        question = asked["prompt"][0]["content"][1]["text"]
        boxes.append(
            f"<div>{_image(data, asked)}<p>{escape(question)}<br>"
            f"<b>{escape(asked['references'][0])}</b></p><ul>{rows}</ul></div>"
        )
    return boxes


def _colour(answer: Answer) -> str:
    right = is_right(answer.text, answer.asked["references"])
    return "right" if right else "wrong"


def _pair(data: Data, row: Mapping[str, Any]) -> str:
    sides = "".join(
        f"<div><p class='mute'>{side}</p>{_segments(row, side)}</div>"
        for side in ("chosen", "rejected")
    )
    return (
        f"<div class='pair'>{_image(data, row)}<div class='sides'>{sides}</div></div>"
    )


def _segments(row: Mapping[str, Any], side: str) -> str:
    text = row[side][0]["content"]
    spans = []
    for segment in row[f"{side}_segments"]:
        (aspect, score), *_ = segment["scores"].items()
        colour = "--good" if score else "--bad"
        spans.append(
            f"<span class='segment' style='background: rgba(var({colour}), .35)' "
            f"title='{escape(aspect)} {score}'>"
            f"{escape(text[segment['start'] : segment['end']])}</span> "
        )
    return "".join(spans)


def _image(data: Data, row: Mapping[str, Any]) -> str:
    content = (data.folder / row["images"][0]).read_bytes()
    return (
        f"<img alt='' src='data:image/png;base64,{base64.b64encode(content).decode()}'>"
    )
