"""Segmenters that look at no words: lines, paragraphs and fixed sizes."""

import re
from collections.abc import Iterable

from jaxalign.feedback.segmenters import blocks


__all__ = ["cut", "fixed", "lines", "paragraphs"]

_BREAK = re.compile(r"\r\n|\n|\r")


def lines(text: str) -> list[tuple[int, int]]:
    """Return the lines that are not blank.

    A line ends at a line feed, a carriage return, or both.

    >>> lines("one \\n\\n  two")
    [(0, 3), (8, 11)]
    """
    return cut(text, 0, len(text), (found.end() for found in _BREAK.finditer(text)))


def paragraphs(text: str) -> list[tuple[int, int]]:
    """Return the paragraphs: what blank lines part, outside of code and maths.

    >>> paragraphs("one\\ntwo\\n\\nthree")
    [(0, 7), (9, 14)]
    """
    found: list[tuple[int, int]] = []
    for block in blocks.parse(text):
        if found:
            breaks = _BREAK.findall(text, found[-1][1], block.start)
            if len(breaks) < 2:
                found[-1] = (found[-1][0], block.end)
                continue
        found.append((block.start, block.end))
    return found


def fixed(text: str, size: int) -> list[tuple[int, int]]:
    """Return pieces of ``size`` characters, the last one shorter, less white space.

    Args:
      text: what to cut.
      size: code points, 1 or more.
    Raises:
      ValueError: the size is below 1.

    >>> fixed("one two", 4)
    [(0, 3), (4, 7)]
    """
    return cut(text, 0, len(text), range(size, len(text), size))


def cut(text: str, start: int, end: int, at: Iterable[int]) -> list[tuple[int, int]]:
    """Cut a part of a text at ascending offsets; trim the pieces, drop empty ones."""
    found = []
    for stop in (*at, end):
        piece = text[start:stop]
        left = len(piece) - len(piece.lstrip())
        right = len(piece.rstrip())
        if right:
            found.append((start + left, start + right))
        start = stop
    return found
