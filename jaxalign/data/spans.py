"""Which token belongs to which piece of text.

Character offsets of the whole rendering decide, never a second tokenisation of the
pieces, which drifts wherever a token crosses a border.
"""

import itertools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from jaxalign.data.records import Segment


__all__ = ["first_completion_token", "segment_of_tokens", "tile_spans"]

Span = tuple[int, int]
Spans = Int[np.ndarray, "n 2"]
"""The characters (begin, end) of each token."""


def tile_spans(text: str, offsets: Sequence[Span]) -> Spans:
    """Give back to tokens the whitespace that some tokenizers trim off their offsets.

    A gap between one token's end and the next one's start that is all whitespace
    belongs to the later token, where byte-level tokenizers put it.

    >>> tile_spans("a b", [(0, 1), (2, 3)]).tolist()
    [[0, 1], [1, 3]]
    """
    flat = itertools.chain.from_iterable(offsets)
    tiled = np.fromiter(flat, np.int64, 2 * len(offsets)).reshape(-1, 2)
    before = np.maximum.accumulate(np.append(0, tiled[:-1, 1]))[: len(tiled)]
    for token in np.flatnonzero(before < tiled[:, 0]):
        if not text[before[token] : tiled[token, 0]].strip():
            tiled[token, 0] = before[token]
    return tiled


def first_completion_token(spans: Spans | Sequence[Span], start: int) -> int:
    """Return the index of the first token that holds a character at or after start.

    A token that holds any character of the completion belongs to it, also where the
    tokenizer merged the prompt's end into it. Tokens without characters (those that a
    tokenizer adds, such as BOS) hold none.

    >>> first_completion_token([(0, 3), (3, 6), (6, 8)], start=5)
    1
    """
    begins, ends = np.asarray(spans, np.int64).reshape(-1, 2).T
    holding = np.flatnonzero((ends > start) & (ends > begins))
    return int(holding[0]) if len(holding) else len(ends)


def segment_of_tokens(
    text: str,
    spans: Sequence[Span],
    segments: Sequence[Segment],
    *,
    last_is_end: bool,
) -> np.ndarray:
    """Return the segment of each completion token, -1 for none.

    A token belongs to the segment that holds its first non-whitespace character (its
    first character, if it is all whitespace). The end-of-turn token belongs to the
    last listed segment that has scores, or to the last one where none has any.

    Args:
      text: the completion.
      spans: characters of each token, counted from the completion's start; negative
        where a token begins in what the template prints before it.
      segments: ordered, not overlapping.
      last_is_end: whether the last token is the end of turn (or EOS).
    Example:
      >>> segments = [Segment(start=0, end=2, scores={"correctness": 4})]
      >>> spans = [(0, 2), (2, 4), (4, 4)]  # the last is the end of turn
      >>> segment_of_tokens("a b ", spans, segments, last_is_end=True).tolist()
      [0, -1, 0]
    """
    owner = np.full(len(text) + 1, -1, np.int32)
    for index, segment in enumerate(segments):
        owner[segment.start : segment.end] = index
    owners = np.full(len(spans), -1, np.int32)
    for token, (start, end) in enumerate(spans):
        start, end = max(start, 0), min(end, len(text))
        if start >= end:
            continue
        piece = text[start:end]
        lead = len(piece) - len(piece.lstrip())
        owners[token] = owner[start + (lead if lead < len(piece) else 0)]
    if last_is_end and segments and len(spans):
        judged = [i for i, s in enumerate(segments) if getattr(s, "scores", None)]
        owners[-1] = judged[-1] if judged else len(segments) - 1
    return owners
