"""What stands inside of prose and is not prose: inline code, inline maths, markers."""

import re

from jaxalign.feedback.segmenters.blocks import TextBlock


__all__ = ["masked"]

_TICKS = re.compile(r"`+")
_DOLLAR = re.compile(r"(?<![\\$])\$(?!\$)")
_DISPLAY = re.compile(r"(?<!\\)\$\$")
_TEX = re.compile(r"\\[()\[\]]")


def masked(text: str, block: TextBlock) -> str:
    """Return the prose of a block with all else blanked out, of the same length.

    Code and maths become a word of capital X, which can open a sentence as they can;
    markers become spaces.

    Args:
      text: the text of the block.
      block: where it stands, with its markers.
    """
    characters = list(text)
    for start, end in (*_code(text), *_maths(text)):
        characters[start:end] = "X" * (end - start)
    for start, end in block.markers:
        left, right = start - block.start, end - block.start
        characters[left:right] = " " * (right - left)
    return "".join(characters)


def _code(text: str) -> list[tuple[int, int]]:
    """Return the code between runs of equally many backticks."""
    runs = [match.span() for match in _TICKS.finditer(text)]
    places: dict[int, list[int]] = {}
    for number in reversed(range(len(runs))):
        start, end = runs[number]
        places.setdefault(end - start, []).append(number)
    found = []
    done = -1
    for number, (start, end) in enumerate(runs):
        same = places[end - start]
        same.pop()
        if number > done and same:
            done = same[-1]
            found.append((start, runs[done][1]))
    return found


def _maths(text: str) -> list[tuple[int, int]]:
    """Return the maths between single or double dollars and after ``\\(``, ``\\[``."""
    found = []
    displays = [match.start() for match in _DISPLAY.finditer(text)]
    found += [(a, b + 2) for a, b in zip(displays[::2], displays[1::2], strict=False)]
    opening: int | None = None
    for match in _DOLLAR.finditer(text):
        at = match.start()
        # As in Pandoc, so that prices are none: $5 and $6.
        closes = not text[at - 1].isspace() and not text[at + 1 : at + 2].isdigit()
        if opening is not None and closes:
            found.append((opening, at + 1))
            opening = None
        else:
            opens = at + 1 < len(text) and not text[at + 1].isspace()
            opening = at if opens else None
    begun: re.Match[str] | None = None
    for match in _TEX.finditer(text):
        if match[0] in ("\\(", "\\["):
            begun = begun or match
        elif begun is not None:
            if "([".index(begun[0][1]) == ")]".index(match[0][1]):
                found.append((begun.start(), match.end()))
            begun = None
    return found
