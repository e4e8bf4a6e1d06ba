"""A prompt's way into the slots: read piece by piece, then copied."""

import dataclasses
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from jaxalign.generation.completions import Request
from jaxalign.generation.sampling import Controls
from jaxalign.generation.steps import Start


__all__ = ["PIECE", "PromptPiece", "WaitingPrompt", "extent_of"]

PIECE = 128
"""Tokens of a prompt that are read at once.

One size for all: a second, smaller one would save a short prompt a twentieth of a
second, and take seconds to compile.
"""


class PromptPiece(NamedTuple):
    """Tokens that are read at once, as the prefill takes them."""

    tokens: Int[np.ndarray, "1 c"]
    begin: int
    """Place of the first."""
    length: int
    """How many of them count; the rest fills up the array."""
    following: Int[np.ndarray, " c"] | None
    """The token behind each, if they are to be told."""
    told: int
    """How many tokens that is."""


@dataclasses.dataclass
class WaitingPrompt:
    """A request whose samples have not all got a slot yet."""

    number: int
    request: Request
    begin: int = 0
    """Tokens that have been read."""
    next_sample: int = 0
    row: Any = None
    """The cache of one row that it is read into."""
    logits: Any = None
    """That it ended with."""

    @property
    def is_read(self) -> bool:
        """Whether all its tokens are in its row."""
        return self.begin == len(self.request.tokens)

    def piece(self) -> PromptPiece:
        """Return the next tokens to be read."""
        tokens, begin = self.request.tokens, self.begin
        count = min(len(tokens) - begin, PIECE)
        piece = np.zeros((1, PIECE), np.int32)
        piece[0, :count] = tokens[begin : begin + count]
        if not self.request.judged:
            return PromptPiece(piece, begin, count, None, 0)
        behind = tokens[begin + 1 : begin + count + 1]
        following = np.zeros(PIECE, np.int32)
        following[: len(behind)] = behind
        return PromptPiece(piece, begin, count, following, len(behind))

    def start(self, slot: int, vocab: int) -> Start:
        """Return what the slot of the next sample begins with."""
        options = self.request.sampling
        seen = np.zeros(vocab, bool)
        if options.repetition_penalty != 1:
            seen[np.asarray(self.request.tokens)] = True
        # Of numpy's kinds; on the device they are JAX's.
        numbers: dict[str, Any] = {
            "temperature": np.float32(options.temperature),
            "top_k": np.int32(options.top_k),
            "top_p": np.float32(options.top_p),
            "min_p": np.float32(options.min_p),
            "repetition_penalty": np.float32(options.repetition_penalty),
        }
        fields: dict[str, Any] = {
            "slot": np.int32(slot),
            "position": np.int32(len(self.request.tokens)),
            "seed": np.uint32(options.seed),
            "sample": np.int32(self.next_sample),
            "seen": seen,
        }
        return Start(controls=Controls(**numbers), **fields)


def extent_of(length: int, most: int) -> int:
    """Return how many places of a prompt's row are copied to its slots.

    All of the prompt's, and a few more so that few programs will do.

    Args:
      length: tokens of the prompt.
      most: places of a row.
    """
    extent = PIECE
    while extent < length:
        extent *= 2
    return min(extent, most)
