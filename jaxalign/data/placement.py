"""Where a chat template has put a text, whatever whitespace it took off or put in."""

from typing import NamedTuple

import numpy as np


__all__ = ["Placement", "align", "place_at_end"]


class Placement(NamedTuple):
    """Where a text stands in what was printed."""

    begin: int
    """Where it begins there."""
    origins: np.ndarray
    """[n + 1] which character of the text each printed one from ``begin`` on is, and
    where the text is at their end; it never falls. What the template put in (and what
    stands for whitespace that it took off) is where the text goes on."""

    @property
    def end(self) -> int:
        """Return where the text ends in what was printed."""
        return self.begin + len(self.origins) - 1


def align(printed: str, text: str) -> np.ndarray | None:
    """Return ``origins`` (see :class:`Placement`) of all that was printed.

    Returns:
      [len(printed) + 1], or None where the two differ in more than whitespace.

    >>> align("a b", "a  b ").tolist(), align("a b", "ab")
    ([0, 1, 3, 4], array([0, 1, 1, 2]))
    >>> align("a c", "a b") is None
    True
    """
    count = len(printed) + 1
    if printed == text:
        return np.arange(count)
    places, characters = _solid(printed)
    wanted, same = _solid(text)
    if not np.array_equal(characters, same):
        return None
    if not len(places):
        return np.minimum(np.arange(count), len(text))
    index = np.arange(count)
    last = np.searchsorted(places, index, side="right") - 1
    # After a character that is no space, one by one up to the next such character;
    # before the first, one by one back from it.
    following = np.append(wanted, len(text))[last + 1]
    after = np.minimum(wanted[last] + index - places[last], following)
    before = np.maximum(wanted[0] - (places[0] - index), 0)
    return np.where(last < 0, before, after)


def place_at_end(printed: str, text: str) -> Placement | None:
    """Find a text that ends where ``printed`` does, but for whitespace.

    Returns:
      Where it is; None where it is not printed as given.

    >>> place_at_end("assistant: <t> a </t> b", "<t>a</t> b").begin
    11
    """
    places, characters = _solid(printed)
    wanted, same = _solid(text)
    count = len(wanted)
    if len(places) < count or not np.array_equal(
        characters[len(places) - count :], same
    ):
        return None
    begin = int(places[len(places) - count]) if count else len(printed)
    lead = text[: int(wanted[0])] if count else ""
    if lead and printed[:begin].endswith(lead):
        begin -= len(lead)
    origins = align(printed[begin:], text)
    return None if origins is None else Placement(begin, origins)


def _solid(text: str) -> tuple[np.ndarray, np.ndarray]:
    """Return where a text has characters that are no whitespace, and which."""
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    spaces = [code for code in np.unique(codes) if chr(code).isspace()]
    places = np.flatnonzero(~np.isin(codes, spaces))
    return places, codes[places]
