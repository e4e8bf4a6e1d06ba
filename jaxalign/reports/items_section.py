"""The items of a task: what was asked, what was said, how it was graded; filtered.

The filter is CSS (``:has``), for a page runs no script. Items that are not on the
screen are not laid out (``content-visibility``), so that a thousand scroll like ten.
"""

import base64
import binascii
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxalign.data.picture import Picture
from jaxalign.evaluation.results import Results
from jaxalign.reports import charts, page, thumbnails
from jaxalign.reports.page import escape


__all__ = ["STYLE", "items"]

STYLE = """
.item { border-top: 1px solid var(--line); padding: 14px 0; content-visibility: auto;
        contain-intrinsic-size: auto 220px; }
.item p { margin: 0 0 8px; } .item .mute { font-size: 14px; }
.filter { border: 1px solid var(--line); border-radius: 6px; margin: 0 0 12px;
          padding: 6px 12px 10px; font-size: 14px; }
.filter label { white-space: nowrap; margin-right: 14px; cursor: pointer;
                display: inline-block; }
.filter input { margin: 0 4px 0 0; }
.said { border-left: 3px solid var(--line); padding-left: 10px; margin: 6px 0; }
.chip { border: 1px solid var(--line); border-radius: 10px; padding: 1px 9px;
        font-size: 13px; margin-right: 6px; display: inline-block; }
.chip.failed { border-color: rgb(var(--bad)); }
details.raw { display: inline-block; font-size: 13px; vertical-align: top; }
details.raw[open] { display: block; } details.raw pre { white-space: pre-wrap; }
"""

_MOST_VALUES = 12
"""Of a grade that can be filtered by; more are texts or a scale."""
_MOST_TOPICS = 40
_THUMBNAIL = "data:image/jpeg;base64,"


class _Item(NamedTuple):
    """All that the files say of one item."""

    place: int
    """Its index."""
    about: Mapping[str, Any]
    answers: Sequence[Mapping[str, Any]]
    grades: Sequence[Mapping[str, Any]]


class _Choice(NamedTuple):
    """What items can be filtered by: a radio button."""

    name: str
    """Of the class of the items."""
    label: str
    number: int
    """Of items."""


def items(task: Results, number: int) -> str:
    """Return all items of a task, with what they can be filtered by.

    Args:
      task: with its files.
      number: of the task on the page.
    Example::

      page.write(path, "items", [items(read_task(Path("out/xstest")), 0)], STYLE)
    """
    every = _items(task)
    if not every:
        return ""
    tokens = {item.place: _tokens(item) for item in every}
    scores = {name for name, n in _values(tokens.values()).items() if n > _MOST_VALUES}
    counts: Counter[tuple[str, str]] = Counter()
    topics: Counter[str] = Counter()
    for item in every:
        counts.update(t for t in tokens[item.place] if t[0] not in scores)
        topics.update([str(t)] if (t := item.about.get("topic")) is not None else [])
    grades = {
        token: _Choice(f"s{number}-{i}", " · ".join(token), n)
        for i, (token, n) in enumerate(sorted(counts.items()))
    }
    by_topic = {
        topic: _Choice(f"t{number}-{i}", topic, n)
        for i, (topic, n) in enumerate(sorted(topics.items()))
        if len(topics) <= _MOST_TOPICS
    }
    parts = [
        _filter("graded", f"g{number}", number, list(grades.values()), len(every)),
        _filter("topic", f"u{number}", number, list(by_topic.values()), len(every)),
    ]
    for item in every:
        # A set's order is another in every process; the page is to be the same.
        mine = sorted(tokens[item.place])
        classes = [grades[t].name for t in mine if t in grades]
        topic = by_topic.get(str(item.about.get("topic")))
        classes += [] if topic is None else [topic.name]
        parts.append(_item(item, classes, task.path))
    return f"<div id='items-{number}'>{''.join(parts)}</div>"


def _items(task: Results) -> list[_Item]:
    answers, grades = defaultdict(list), defaultdict(list)
    for rows, by_index in ((task.answers, answers), (task.grades, grades)):
        for row in rows:
            by_index[row["index"]].append(row)
    indices = sorted({*task.items, *answers, *grades})
    return [_Item(i, task.items.get(i, {}), answers[i], grades[i]) for i in indices]


def _tokens(item: _Item) -> set[tuple[str, str]]:
    """Return what an item can be found by: a grade's name and what it is."""
    found = set()
    for row in item.grades:
        grade = row.get("grade") if row["status"] == "ok" else row["status"]
        if isinstance(grade, str | int | float):
            found.add((str(row["question"]), _value(grade)))
    for row in item.answers:
        if row["status"] != "ok":
            found.add((f"answer to {row['question']}", str(row["status"])))
    return found


def _value(grade: Any) -> str:
    if isinstance(grade, bool):
        return "true" if grade else "false"
    if isinstance(grade, float | int):
        return f"{grade:g}"
    return str(grade).replace("_", " ")


def _values(tokens: Iterable[set[tuple[str, str]]]) -> Counter[str]:
    return Counter(name for name, _ in {t for some in tokens for t in some})


def _filter(
    label: str, name: str, number: int, choices: Sequence[_Choice], every: int
) -> str:
    if len(choices) < 2:
        return ""
    buttons = [
        f"<label><input type='radio' name='{name}' checked>all "
        f"<span class='mute'>{every:,}</span></label>"
    ]
    rules = []
    for choice in choices:
        buttons.append(
            f"<label><input type='radio' name='{name}' id='{choice.name}'>"
            f"{escape(choice.label)} <span class='mute'>{choice.number:,}</span>"
            "</label>"
        )
        rules.append(
            f"#items-{number}:has(#{choice.name}:checked) .item:not(.{choice.name})"
            "{display:none}"
        )
    return (
        f"<style>{''.join(rules)}</style><fieldset class='filter'><legend>{label}"
        f"</legend>{''.join(buttons)}</fieldset>"
    )


def _item(item: _Item, classes: Sequence[str], folder: Path) -> str:
    about = item.about
    topic = about.get("topic")
    told = f"#{item.place}" + ("" if topic is None else f" · {escape(str(topic))}")
    asked = about.get("asked") or {}
    names = list(dict.fromkeys([*asked, *(row["question"] for row in item.answers)]))
    parts = [f"<p class='mute'>{told}</p>", _pictures(about.get("images"), folder)]
    for name in names:
        if name in asked:
            text = str(asked[name])
            parts.append(page.folded(text, escape(text), "prompt"))
        parts += [_answer(row) for row in item.answers if row["question"] == name]
    references = about.get("references")
    if references:
        shown = [references] if isinstance(references, str) else references
        parts.append(
            "<p class='mute'>accepted: "
            f"{' · '.join(escape(str(one)) for one in shown)}</p>"
        )
    parts += [_grade(row) for row in item.grades]
    return f"<section class='item {' '.join(classes)}'>{''.join(parts)}</section>"


def _answer(row: Mapping[str, Any]) -> str:
    text, status = str(row.get("answer") or ""), str(row["status"])
    sample = (
        f"<span class='mute'>sample {row['sample']}</span> " if row["sample"] else ""
    )
    if status != "ok":
        reason = f": {escape(str(row['reason']))}" if row.get("reason") else ""
        sample += f"<span class='chip failed'>{escape(status)}</span>{reason}"
    if not text.strip():
        return f"<div class='said'>{sample}<span class='mute'>no text</span></div>"
    return f"<div class='said'>{sample}{page.folded(text, escape(text), 'text')}</div>"


def _grade(row: Mapping[str, Any]) -> str:
    ok = row["status"] == "ok"
    grade = row.get("grade") if ok else row["status"]
    shown = charts.number(grade) if page.is_number(grade) else escape(_value(grade))
    sample = f" <span class='mute'>({row['sample']})</span>" if row["sample"] else ""
    chip = (
        f"<span class='chip{'' if ok else ' failed'}'>{escape(str(row['question']))}"
        f"{sample}: <b>{shown}</b></span>"
    )
    raw = row.get("raw")
    if not raw:
        return chip
    return (
        f"<details class='raw'><summary>{chip}</summary><pre>{escape(str(raw))}</pre>"
        "</details>"
    )


def _pictures(given: Any, folder: Path) -> str:
    """Return thumbnails as they were kept; of a file one is made."""
    if not given:
        return ""
    kept, files = [], []
    for n, source in enumerate(map(str, given), 1):
        if _is_thumbnail(source):
            kept.append(
                f"<img src='{source}' alt='picture {n}' loading='lazy' "
                "decoding='async'>"
            )
        else:
            files.append(Picture(folder / source, f"picture {n}"))
    shown = f"<div class='pictures'>{''.join(kept)}</div>" if kept else ""
    return shown + thumbnails.beside(files)


def _is_thumbnail(source: str) -> bool:
    if not source.startswith(_THUMBNAIL):
        return False
    try:
        base64.b64decode(source.removeprefix(_THUMBNAIL), validate=True)
    except (binascii.Error, ValueError):
        return False
    return True
