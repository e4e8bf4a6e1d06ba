"""Which layouts there are, which one a row is of, and reading a source in it."""

import collections
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from jaxalign import progress
from jaxalign.data.columns import is_slip
from jaxalign.data.given import name_of
from jaxalign.data.layouts import (
    helpsteer2,
    helpsteer2d,
    helpsteer3,
    hh,
    implicit,
    llamafactory,
    qa_feedback,
    rlaif_v,
    ultrafeedback,
)
from jaxalign.data.layouts.foreign import Converted, Dropped, Row
from jaxalign.data.rows import read_rows
from jaxalign.errors import UserError, did_you_mean


__all__ = ["LAYOUTS", "Layout", "check_name", "objects", "read", "recognise"]


class Layout(NamedTuple):
    """How rows of a kind are recognised, and what makes records of them."""

    convert: Callable[[Iterable[Row]], Iterator[Converted]]
    fits: Callable[[Mapping[str, Any]], bool]
    """Whether a row without its nulls is of this layout."""


def feedback(rows: Iterable[Row]) -> Iterator[Converted]:
    """Take rows that are feedback records already."""
    for row, where in rows:
        yield Converted(dict(row), where)


def _has(*names: str) -> Callable[[Mapping[str, Any]], bool]:
    return lambda row: all(name in row for name in names)


def _is_implicit(row: Mapping[str, Any]) -> bool:
    lacks = not any(name == "prompt" or is_slip(str(name), "prompt") for name in row)
    return lacks and _has("chosen", "rejected")(row)


def _is_hh(row: Mapping[str, Any]) -> bool:
    chosen = row.get("chosen")
    return (
        _is_implicit(row)
        and isinstance(chosen, str)
        and chosen.lstrip().startswith("Human:")
    )


def _is_binarized(row: Mapping[str, Any]) -> bool:
    sides = [row.get("chosen"), row.get("rejected")]
    return isinstance(row.get("prompt"), str) and all(
        isinstance(side, list) for side in sides
    )


def _is_helpsteer2d(row: Mapping[str, Any]) -> bool:
    return _has("instruction", "chosen", "rejected")(row) and any(
        name in row for name in ("chosen segment scores", "chosen_segment_scores")
    )


def _is_alpaca(row: Mapping[str, Any]) -> bool:
    pair = _has("instruction", "chosen", "rejected")(row)
    return pair or _has("instruction", "output")(row)


def _is_sharegpt(row: Mapping[str, Any]) -> bool:
    turns = isinstance(row.get("messages"), list) and "prompt" not in row
    return "conversations" in row or (turns and not _is_implicit(row))


# In this order: the first that a row fits is taken.
LAYOUTS: Mapping[str, Layout] = {
    "ultrafeedback_binarized": Layout(ultrafeedback.convert_binarized, _is_binarized),
    "helpsteer2": Layout(helpsteer2.convert, _has("prompt", "response", "helpfulness")),
    "feedback": Layout(feedback, _has("prompt")),
    "qa_feedback": Layout(qa_feedback.convert, _has("question", "prediction 1")),
    "rlaif_v": Layout(rlaif_v.convert, _has("question", "chosen", "rejected")),
    "ultrafeedback": Layout(ultrafeedback.convert, _has("instruction", "completions")),
    "helpsteer2d": Layout(helpsteer2d.convert, _is_helpsteer2d),
    "helpsteer3": Layout(helpsteer3.convert, _has("context", "response1", "response2")),
    "sharegpt": Layout(llamafactory.convert_sharegpt, _is_sharegpt),
    "llamafactory": Layout(llamafactory.convert, _is_alpaca),
    "hh": Layout(hh.convert, _is_hh),
    "implicit": Layout(implicit.convert, _is_implicit),
}
"""Layouts by name."""


def recognise(row: Any) -> str:
    """Return the layout that a row is of; ``feedback`` where it is of none.

    >>> recognise({"prompt": "Q", "chosen": "a", "rejected": "b"})
    'feedback'
    >>> recognise({"chosen": "Q a", "rejected": "Q b"})
    'implicit'
    """
    if isinstance(row, Mapping):
        given = {name: value for name, value in row.items() if value is not None}
        for name, layout in LAYOUTS.items():
            if layout.fits(given):
                return name
    return "feedback"


def check_name(layout: str | None) -> None:
    """Refuse a name that is no layout; None leaves it to the columns.

    Raises:
      UserError: with the names that there are.
    """
    if layout is not None and layout not in LAYOUTS:
        raise UserError(
            f"--layout {layout}: no such layout. {did_you_mean(layout, LAYOUTS)} "
            f"Expected one of {', '.join(LAYOUTS)}"
        )


def read(source: Any, layout: str | None = None) -> Iterator[tuple[Any, str]]:
    """Yield the rows of a source as the columns of feedback records, with their places.

    What was understood of another layout is said at the end, with what was dropped.

    Args:
      source: rows or their source, see :func:`jaxalign.data.rows.read_rows`.
      layout: a key of :data:`LAYOUTS`; default what the first row is of.
    Raises:
      UserError: the source cannot be read, or a row is not of the layout.
    """
    check_name(layout)
    rows = iter(read_rows(source))
    first = list(itertools.islice(rows, 1))
    rows = itertools.chain(first, rows)
    known = layout or (recognise(first[0][0]) if first else "feedback")
    if known == "feedback":
        yield from rows
        return
    kept, dropped = 0, collections.Counter[str]()
    for made, where in LAYOUTS[known].convert(objects(rows)):
        if isinstance(made, Dropped):
            dropped[made.reason] += 1
        else:
            kept += 1
            yield made, where
    counts = ", ".join([f"{kept} records", *_reasons(dropped)])
    progress.say(f"{name_of(source)}: read as layout {known}: {counts}")


def _reasons(dropped: Mapping[str, int]) -> Iterator[str]:
    for reason, count in dropped.items():
        yield f"{count} dropped ({reason})"


def objects(rows: Iterable[tuple[Any, str]]) -> Iterator[Row]:
    """Yield rows that are objects.

    Raises:
      UserError: one is none.
    """
    for row, where in rows:
        if not isinstance(row, Mapping):
            raise UserError(f"{where}: expected an object: got {type(row).__name__}")
        yield row, where
