"""The sentence segmenter."""

import itertools
import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

from jaxalign.feedback.segmenters import blocks, inline
from jaxalign.feedback.segmenters.ends import sentence_ends
from jaxalign.feedback.segmenters.plain import cut


__all__ = ["MIN_LENGTH", "sentences"]

MIN_LENGTH = 1
"""Enough that a line of dashes or an emoji is no segment of its own."""

_BREAK = re.compile(r"\r\n|\n|\r")
_NARROW, _WIDE = 30, 60
"""Narrower lines were broken by the author; wider ones perhaps by an editor."""
_GOES_ON = re.compile(r"[,，、;；(（\[“‘「『\-–—]\Z")
_STOPPED = re.compile(r"[.!?…。！？｡:：][\"'”’»)\]}）】』」》*_~]*\Z")
_LATIN = re.compile(r"[\"'“‘(\[*_]*[A-Za-z0-9À-ɏ]")


def sentences(
    text: str,
    *,
    min_length: int = MIN_LENGTH,
    ends: Callable[[str], list[int]] = sentence_ends,
) -> list[tuple[int, int]]:
    """Cut a text into sentences; code, maths, headings and table rows stay whole.

    Args:
      text: English, Chinese, or both; plain or Markdown.
      min_length: letters and digits (``str.isalnum``) that a segment has at least,
        unless the whole text has fewer. A shorter piece joins the following one, marks
        without a letter the one before; across the border of a paragraph, and at last
        of code, only where there is no other neighbour. 0 joins nothing.
      ends: finds the offsets at which sentences end in the prose of one paragraph, in
        ascending order, for other languages.
    Returns:
      Half-open code-point offsets, ordered and disjoint. White space is never a
      segment; every other character lies in exactly one.

    >>> text = "Dr. Wu left. See `a. B`.\\n\\n1. 好！走吧。"
    >>> [text[start:end] for start, end in sentences(text)]
    ['Dr. Wu left.', 'See `a. B`.', '1. 好！', '走吧。']
    """
    pieces: list[list[_Piece]] = []
    previous: blocks.TextBlock | None = None
    for block in blocks.parse(text):
        whole = block.kind != "prose"
        spans = [(block.start, block.end)] if whole else _cut_prose(text, block, ends)
        firm = block.kind in ("code", "maths", "row")
        found = [_Piece(s, e, _size(text[s:e]), firm) for s, e in spans]
        if block.kind == "row" and previous is not None and previous.kind == "row":
            pieces[-1].extend(found)
        else:
            pieces.append(found)
        previous = block
    within = itertools.chain.from_iterable(_join(p, min_length) for p in pieces)
    return [(piece.start, piece.end) for piece in _join(within, min_length)]


def _cut_prose(
    text: str, block: blocks.TextBlock, ends: Callable[[str], list[int]]
) -> list[tuple[int, int]]:
    masked = inline.masked(text[block.start : block.end], block)
    found = {block.start + end for end in ends(masked)}
    lines = [0, *(match.end() for match in _BREAK.finditer(masked)), len(masked)]
    for first, here, last in zip(lines, lines[1:], lines[2:], strict=False):
        if _breaks(masked[first:here].strip(), masked[here:last].strip()):
            found.add(block.start + here)
    return cut(text, block.start, block.end, sorted(found))


def _breaks(line: str, following: str) -> bool:
    """Tell whether a line break ends a segment: not if the sentence goes on."""
    if not line or not following:
        return False
    if _STOPPED.search(line[-8:]):
        return line[-1] in ":："  # of the others ``ends`` has judged
    if len(line) < _NARROW:
        return True
    if following[0].islower() or _GOES_ON.search(line[-1:]):
        return False
    return len(line) < _WIDE or not _LATIN.match(following)


class _Piece(NamedTuple):
    start: int
    end: int
    size: int
    """Letters and digits."""
    firm: bool
    """Code, maths or a table row."""


def _size(text: str) -> int:
    return sum(map(str.isalnum, text))


def _join(pieces: Iterable[_Piece], least: int) -> list[_Piece]:
    """Join pieces that are too short with a neighbour, in one pass."""
    found: list[_Piece] = []

    def join_last(piece: _Piece) -> None:
        last = found.pop()
        found.append(
            _Piece(
                last.start, piece.end, last.size + piece.size, last.firm or piece.firm
            )
        )

    for piece in pieces:
        if found and found[-1].size < least:
            back = piece.firm and len(found) > 1 and not found[-2].firm
            if back:
                join_last(found.pop())
                found.append(piece)
            else:
                join_last(piece)
        elif found and not piece.size and least and found[-1].firm <= piece.firm:
            join_last(piece)
        else:
            found.append(piece)
    if len(found) > 1 and found[-1].size < least:
        join_last(found.pop())
    return found
