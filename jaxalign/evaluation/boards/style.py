"""How a text is written: its length and its Markdown, for style control.

As Arena-Hard counts them (lmarena/arena-hard-auto, ``add_markdown_info``): headers,
list items and bold parts outside fenced code, and a length, which takes the code in.
"""

import re
from collections.abc import Callable
from typing import Literal, NamedTuple


__all__ = ["Style", "difference", "style_of", "words"]

_FENCED = re.compile(r"```[^`]*```")
_HEADER = re.compile(r"^#{1,6}\s", re.MULTILINE)
_ITEM = re.compile(r"^\s*(?:\d+\.|[-*+])\s", re.MULTILINE)
_BOLD = re.compile(r"\*\*[^*\n]+\*\*|__[^_\n]+__")
_WORD = re.compile(r"\w+|[^\w\s]")


class Style(NamedTuple):
    """Counts of a text."""

    length: int
    headers: int
    items: int
    """Of lists, numbered or not."""
    bold: int


def words(text: str) -> int:
    """Return how many words and signs a text has.

    It stands for the number of tokens, which depends on whose tokenizer it is: style
    control uses ratios of lengths, in which the unit drops out.

    >>> words("It's 4.")
    5
    """
    return len(_WORD.findall(text))


def style_of(text: str, length: Callable[[str], int] = words) -> Style:
    r"""Return the style of a text.

    Args:
      text: of an answer.
      length: what is taken for its length; the authors' is tokens of gpt-4o.
    Example:
      >>> style_of("# A\n- **b**\n```\n# code\n```")
      Style(length=16, headers=1, items=1, bold=1)
    """
    plain = _FENCED.sub("", text)
    counts = (len(each.findall(plain)) for each in (_HEADER, _ITEM, _BOLD))
    return Style(length(text), *counts)


def difference(
    text: Style, other: Style, form: Literal["density", "count"] = "density"
) -> tuple[float, ...]:
    """Return how much more of each style a text has, four numbers within -1 and 1.

    density (Arena-Hard v2): (L - L') / (L + L'), and for the others, with x = count /
    (L + 1), (x - x') / (x + x' + 1). count (v0.1): (n - n') / (n + n' + 1) for all.

    >>> difference(Style(30, 2, 0, 0), Style(10, 0, 0, 0))[0]
    0.5
    >>> difference(Style(1, 2, 0, 0), Style(1, 0, 0, 0), "count")[1].__round__(3)
    0.667
    """
    if form == "count":
        return tuple((a - b) / (a + b + 1) for a, b in zip(text, other, strict=True))
    both = text.length + other.length
    first = (text.length - other.length) / both if both else 0.0
    densities = (
        (a / (text.length + 1), b / (other.length + 1))
        for a, b in zip(text[1:], other[1:], strict=True)
    )
    return (first, *((x - y) / (x + y + 1) for x, y in densities))
