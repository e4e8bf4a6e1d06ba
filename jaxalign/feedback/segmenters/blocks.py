"""The blocks of a text in Markdown: code, maths, headings, table rows, prose.

Not a whole Markdown parser: it finds what must not be cut, and where a paragraph or
list item begins. A text that is no Markdown comes out as prose. The time is linear in
the text: every search for an end is a look-up in a list made once.
"""

import bisect
import re
from typing import Literal, NamedTuple


__all__ = ["TextBlock", "parse"]


class TextBlock(NamedTuple):
    """A part of a text that no segment crosses."""

    kind: Literal["prose", "heading", "row", "code", "maths"]
    start: int
    end: int
    markers: tuple[tuple[int, int], ...] = ()
    """List and quotation marks of Markdown in it, which are no words."""


_LINE = re.compile(r"[^\r\n]*(?:\r\n|\n|\r|\Z)")
_BLANK = re.compile(r"(?:\r\n|\n|\r)[ \t]*(?:\r\n|\n|\r)")
_QUOTE = re.compile(r"(?:[ \t]*>)+")
_FENCE = re.compile(r"(`{3,})[^`]*\Z|(~{3,})")
_HEADING = re.compile(r"#{1,6}(?:[ \t]|\Z)")
_MARKER = re.compile(
    r"(?:[-*+–][ \t]|[•‣◦·▪●○■□►➢✓✔✗✘①-⑳❶-❿]"
    r"|(?:\*\*)?(?:\d{1,3}|[A-Ha-h])[.)][ \t](?![A-Z]\.)"
    r"|\((?:\d{1,3}|[A-Za-z]|[ivx]{1,4})\)[ \t]"
    r"|\d{1,3}[、．](?!\d)|[一二三四五六七八九十]{1,3}[、．.]"
    r"|[（(](?:\d{1,3}|[一二三四五六七八九十]{1,3})[）)])"
)
_MATHS = re.compile(r"\$\$|\\\[|\\begin\{([A-Za-z]+\*?)\}")
_MATHS_END = re.compile(r"\$\$|\\\]|\\end\{([A-Za-z]+\*?)\}")
_ENDS = tuple(".!?:。！？：")


class _Line(NamedTuple):
    start: int
    content: int
    """Where its text begins, after the marks of a quotation."""
    end: int
    """Where it ends but for white space."""
    next: int
    words: str
    quoted: bool


def parse(text: str) -> list[TextBlock]:
    """Return the blocks in order; what lies between them is white space.

    >>> text = "# A\\nb\\nc\\n- d"
    >>> [(block.kind, text[block.start : block.end]) for block in parse(text)]
    [('heading', '# A'), ('prose', 'b\\nc'), ('prose', '- d')]
    """
    ends = _MathsEnds(text)
    found: list[TextBlock] = []
    paragraph: list[_Line] = []
    in_table = False
    position = 0
    while position < len(text):
        line = _line_at(text, position)
        block, position = None, line.next
        if line.words:
            block = _code(text, line) or ends.block(line)
            if block is None:
                block = _one_line(text, line, bool(paragraph), in_table)
        in_table = block is not None and block.kind == "row"
        begins = (
            _MARKER.match(line.words)
            or paragraph
            and line.quoted != paragraph[-1].quoted
        )
        if paragraph and (block is not None or not line.words or begins):
            found.append(_prose(paragraph))
            paragraph = []
        if block is not None:
            found.append(block)
            position = max(position, block.end) if block.kind != "maths" else block.end
        elif line.words:
            paragraph.append(line)
        elif line.quoted:
            found.append(TextBlock("prose", line.start, line.end))  # a mark alone: >
    if paragraph:
        found.append(_prose(paragraph))
    return found


def _line_at(text: str, position: int) -> _Line:
    found = _LINE.match(text, position)
    assert found is not None  # it matches the empty string
    raw = found[0]
    quote = _QUOTE.match(raw)
    rest = raw[quote.end() :] if quote else raw
    words = rest.strip()
    content = found.end() - len(rest.lstrip())
    return _Line(
        start=found.end() - len(raw.lstrip()),
        content=content,
        end=position + len(raw.rstrip()),
        next=found.end(),
        words=words,
        quoted=quote is not None,
    )


def _prose(lines: list[_Line]) -> TextBlock:
    markers = [(line.start, line.content) for line in lines if line.quoted]
    if mark := _MARKER.match(lines[0].words):
        begin = lines[0].content
        markers.append((begin, begin + mark.end()))
    return TextBlock("prose", lines[0].start, lines[-1].end, tuple(sorted(markers)))


def _code(text: str, line: _Line) -> TextBlock | None:
    """Return the fenced code that begins in a line; unclosed, it goes to the end."""
    words = line.words
    if mark := _MARKER.match(words):
        words = words[mark.end() :].lstrip()
    opening = _FENCE.match(words)
    if opening is None:
        return None
    fence = opening[1] or opening[2]
    position = line.next
    end = line.end
    while position < len(text):
        inner = _line_at(text, position)
        position = inner.next
        if inner.start < inner.end:  # not blank
            end = inner.end
        closes = len(inner.words) >= len(fence) and set(inner.words) == {fence[0]}
        if closes:
            break
    return TextBlock("code", line.start, end)


class _MathsEnds:
    """Where display maths of a text ends."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._blanks = [found.end() for found in _BLANK.finditer(text)]
        self._ends: dict[str, list[int]] = {}
        for found in _MATHS_END.finditer(text):
            self._ends.setdefault(found[1] or found[0], []).append(found.end())

    def block(self, line: _Line) -> TextBlock | None:
        """Return the maths that begins in a line and is closed."""
        opening = _MATHS.match(line.words)
        if opening is None:
            return None
        inside = line.content + opening.end()
        closing = opening[1] or opening[0].replace("[", "]")
        end = _first_from(self._ends.get(closing, []), inside + 2)
        # TeX allows no blank line in displayed formulas, but in environments.
        if end is None or (
            opening[1] is None
            and (blank := _first_from(self._blanks, inside)) is not None
            and blank <= end
        ):
            return None
        while end < len(self._text) and self._text[end] in ".,;:。，；：":
            end += 1
        if end < line.end:
            return None  # one of several formulas in a line of prose
        return TextBlock("maths", line.start, end)


def _first_from(offsets: list[int], least: int) -> int | None:
    index = bisect.bisect_left(offsets, least)
    return offsets[index] if index < len(offsets) else None


def _one_line(
    text: str, line: _Line, in_paragraph: bool, in_table: bool
) -> TextBlock | None:
    """Return a heading or table row: a line, or two with the one drawn below it."""
    words = line.words
    if _HEADING.match(words):
        return TextBlock("heading", line.start, line.end)
    below = _line_at(text, line.next)
    if "|" in words and _separates(below.words):
        return TextBlock("row", line.start, below.end)
    if "|" in words and (in_table or len(words) > 1 and words[0] == words[-1] == "|"):
        return TextBlock("row", line.start, line.end)
    if in_paragraph or _MARKER.match(words):
        return None
    # After a full stop a line of dashes parts two paragraphs.
    drawn = set(below.words)
    if drawn == {"="} or (
        drawn == {"-"} and len(below.words) > 1 and not words.endswith(_ENDS)
    ):
        return TextBlock("heading", line.start, below.end)
    return None


def _separates(words: str) -> bool:
    """Tell whether a line is the one below the header of a table."""
    if "|" not in words or not set(words) <= set("|:- \t"):
        return False
    cells = words.strip("|").split("|")
    return all("-" in cell for cell in cells)
