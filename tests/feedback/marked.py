"""The sentences marked by hand, and how well a segmenter agrees with them."""

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple


FILE = Path(__file__).with_name("sentences_marked.txt")
MARK = "‖"

Spans = list[tuple[int, int]]


class Marked(NamedTuple):
    """A text and its segments."""

    language: str
    part: str
    name: str
    text: str
    spans: Spans


class Agreement(NamedTuple):
    """Boundaries found, against those marked; a text's first segment has none."""

    precision: float
    recall: float
    f1: float
    exact: float
    """Share of the texts with all boundaries right and no others."""


def read() -> list[Marked]:
    """Read the file of marked sentences."""
    found = []
    for part in re.split(r"^@@ ", FILE.read_text(encoding="utf-8"), flags=re.M)[1:]:
        heading, _, body = part.partition("\n")
        language, kind, name = heading.split(" ", 2)
        pieces = body.rstrip("\n").split(MARK)
        spans, at = [], 0
        for piece in pieces:
            left = len(piece) - len(piece.lstrip())
            spans.append((at + left, at + len(piece.rstrip())))
            at += len(piece)
        found.append(Marked(language, kind, name, "".join(pieces), spans))
    return found


def agreement(segmenter: Callable[[str], Spans], marked: Iterable[Marked]) -> Agreement:
    """Compare the boundaries of a segmenter with those marked."""
    right = found = wanted = exact = texts = 0
    for entry in marked:
        got = {start for start, _ in segmenter(entry.text)[1:]}
        gold = {start for start, _ in entry.spans[1:]}
        right, found, wanted = (
            right + len(got & gold),
            found + len(got),
            wanted + len(gold),
        )
        exact, texts = exact + (got == gold), texts + 1
    return Agreement(
        right / found, right / wanted, 2 * right / (found + wanted), exact / texts
    )
