"""Rows of equal feature tokens in a text: tokenised as one token, and put back.

A picture of a thousand features is the same special token a thousand times. Tokenizers
cut such tokens out before they look at anything else, so what stands around them
becomes the same tokens whether there is one of them or a thousand, and to read one
takes a thousandth of the time.
"""

import functools
import re
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from jaxalign.data.spans import Spans
from jaxalign.data.tokenizer import Tokenizer


__all__ = ["FeatureRows", "find", "restored", "shortened", "stands_alone"]


class FeatureRows(NamedTuple):
    """Where a text has the feature's token, however often in a row."""

    begins: Int[np.ndarray, " k"]
    counts: Int[np.ndarray, " k"]
    """How often it stands there, at least once."""
    size: int
    """Characters of the token."""


def stands_alone(tokenizer: Tokenizer, token: str, token_id: int) -> bool:
    """Tell whether a tokenizer cuts a token out, and nothing of what is beside it."""
    added = tokenizer.added_tokens_decoder.get(token_id)
    return (
        getattr(added, "content", None) == token
        and getattr(added, "special", False)
        and not any(
            getattr(added, option, True)
            for option in ("lstrip", "rstrip", "single_word", "normalized")
        )
    )


@functools.lru_cache(maxsize=16)
def _pattern(token: str) -> re.Pattern[str]:
    return re.compile(f"(?:{re.escape(token)})+")


def find(text: str, token: str) -> FeatureRows:
    """Return the rows of a feature's token in a text.

    >>> rows = find("A <i><i><i> and <i>.", "<i>")
    >>> rows.begins.tolist(), rows.counts.tolist()
    ([2, 16], [3, 1])
    """
    spans = [match.span() for match in _pattern(token).finditer(text)]
    edges, size = np.array(spans, np.int64).reshape(-1, 2), len(token)
    return FeatureRows(edges[:, 0], (edges[:, 1] - edges[:, 0]) // size, size)


def shortened(text: str, rows: FeatureRows) -> str:
    """Return a text with one token in the place of each row.

    >>> shortened("A <i><i><i> and <i>.", find("A <i><i><i> and <i>.", "<i>"))
    'A <i> and <i>.'
    """
    pieces, done = [], 0
    ends = rows.begins + rows.counts * rows.size
    for begin, end in zip(rows.begins.tolist(), ends.tolist(), strict=True):
        pieces.append(text[done : begin + rows.size])
        done = end
    return "".join([*pieces, text[done:]])


def restored(
    tokens: Int[np.ndarray, " n"], spans: Spans, rows: FeatureRows, token_id: int
) -> tuple[Int[np.ndarray, " m"], Int[np.ndarray, "m 2"]] | None:
    """Return the tokens of a whole text, given those of the shortened one.

    Args:
      tokens: of the shortened text.
      spans: their characters there.
      rows: of the whole text.
      token_id: the feature's.
    Returns:
      Tokens and their characters in the whole text; None where there is not one token
      of the feature for each row.
    Example:
      >>> text = "A <i><i>."
      >>> tokens, spans = np.array([5, 9, 6]), np.array([[0, 2], [2, 5], [5, 6]])
      >>> whole, places = restored(tokens, spans, find(text, "<i>"), token_id=9)
      >>> whole.tolist(), places.tolist()
      ([5, 9, 9, 6], [[0, 2], [2, 5], [5, 8], [8, 9]])
    """
    features = np.flatnonzero(tokens == token_id)
    if len(features) != len(rows.counts):
        return None
    grown = np.append(0, np.cumsum((rows.counts - 1) * rows.size))
    ends = rows.begins - grown[:-1] + rows.size  # of the rows' tokens, shortened
    whole = spans + grown[np.searchsorted(ends, spans, side="right")]
    times = np.ones(len(tokens), np.int64)
    times[features] = rows.counts
    kept = np.repeat(whole, times, axis=0)
    for place, count, begin in zip(
        features + grown[:-1] // rows.size, rows.counts, rows.begins, strict=True
    ):
        # The first may have been given whitespace that stands before it.
        edges = begin + rows.size * np.arange(1, count + 1)
        kept[place : place + count, 1] = edges
        kept[place + 1 : place + count, 0] = edges[:-1]
    return np.repeat(tokens, times), kept
