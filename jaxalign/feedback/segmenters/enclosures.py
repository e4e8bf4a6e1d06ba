"""Short quotations and asides in brackets, which are not cut inside."""

import re


__all__ = ["LONGEST", "enclosures"]

LONGEST = 300
"""Characters of a quotation or aside that is kept whole."""

_PAIRS = {
    **{"“": "”", "‘": "’", "「": "」", "『": "』", "«": "»", "《": "》", "〈": "〉"},
    **{"(": ")", "（": "）", "[": "]", "【": "】", "{": "}"},
}
_OPENERS = {closer: opener for opener, closer in _PAIRS.items()}
_MARK = re.compile(r"[\"'" + re.escape("".join([*_PAIRS, *_OPENERS])) + "]")
_DEEPEST = 8


def enclosures(text: str) -> list[tuple[int, int]]:
    """Return the outermost quotations and brackets, marks included, in order.

    Pairs longer than :data:`LONGEST` characters do not count, nor do marks without a
    partner.

    >>> enclosures('He said "No. Not (yet)." (Why?)')
    [(8, 24), (25, 31)]
    """
    waiting: list[tuple[str, int]] = []
    outermost: list[tuple[int, int]] = []
    for match in _MARK.finditer(text):
        mark, at = match[0], match.start()
        if mark in "\"'" and not _closes_straight(text, at, waiting):
            if _opens_straight(text, at):
                # An opening mark while the same is open: the first had no partner.
                waiting = [w for w in waiting if w[0] != mark]
                waiting.append((mark, at))
        elif mark in _PAIRS:
            waiting.append((mark, at))
        elif mark == "’" and _is_apostrophe(text, at):
            continue
        elif (place := _partner(mark, waiting)) is not None:
            start = waiting[place][1]
            waiting = waiting[:place]
            if at + 1 - start <= LONGEST:
                _enclose(outermost, (start, at + 1))
        waiting = waiting[-_DEEPEST:]
    return outermost


def _partner(mark: str, waiting: list[tuple[str, int]]) -> int | None:
    """Return which of the open marks a closing one closes: the last of its kind."""
    opener = _OPENERS.get(mark, mark)
    places = [i for i, (open_mark, _) in enumerate(waiting) if open_mark == opener]
    return places[-1] if places else None


def _enclose(outermost: list[tuple[int, int]], pair: tuple[int, int]) -> None:
    """Put a pair in the place of those inside it."""
    while outermost and outermost[-1][0] > pair[0]:
        outermost.pop()
    outermost.append(pair)


def _opens_straight(text: str, at: int) -> bool:
    before, after = text[at - 1 : at], text[at + 1 : at + 2]
    return bool(after) and not after.isspace() and not (before and before.isalnum())


def _closes_straight(text: str, at: int, waiting: list[tuple[str, int]]) -> bool:
    mark, before, after = text[at], text[at - 1 : at], text[at + 1 : at + 2]
    if not any(opener == mark for opener, _ in waiting) or before.isspace():
        return False
    # Most single marks after letters are apostrophes: the boys' shoes.
    return mark == '"' or (before in ".,!?…" and not after.isalnum())


def _is_apostrophe(text: str, at: int) -> bool:
    after = text[at + 1 : at + 2]
    return text[at - 1 : at].isalnum() and (not after or after.isalnum())
