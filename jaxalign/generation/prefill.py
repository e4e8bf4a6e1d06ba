"""A prompt's way into the slots: read piece by piece, then copied."""

import dataclasses
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from jaxalign.generation.completions import Request
from jaxalign.generation.sampling import Controls
from jaxalign.generation.steps import Start
from jaxalign.types import ImageInputs


__all__ = ["PIECE", "PromptPiece", "WaitingPrompt", "extent_of", "padded"]

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
    which: Int[np.ndarray, "1 c"] | None = None
    """Of a prompt with pictures: which of their features stands for each; -1: none."""
    turned: Int[np.ndarray, "1 c *axes"] | None = None
    """Rotary positions, where they are not the tokens' places."""


@dataclasses.dataclass(eq=False)
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
    features: Any = None
    """Of its pictures, once these are encoded."""
    which: Int[np.ndarray, " n"] | None = None
    """Which of them stands for each token; -1: none."""

    @property
    def is_read(self) -> bool:
        """Whether all its tokens are in its row."""
        return self.begin == len(self.request.tokens)

    def open_images(self) -> ImageInputs:
        """Return the pictures to be encoded, and remember what they stand for.

        Raises:
          UserError: of what makes them, where a picture cannot be opened.
          ValueError: a feature is for a token that is not there.
        """
        request = self.request
        images: Any = request.images
        images = images() if callable(images) else images
        to = np.asarray(images.features_to[0])
        count = len(request.tokens)
        if to.max(initial=-1) >= count:
            raise ValueError(f"a feature is for token {to.max()} of {count}")
        self.which = np.full(count, -1, np.int32)
        units = np.flatnonzero(to >= 0)
        self.which[to[units]] = units
        return padded(images)

    def piece(self) -> PromptPiece:
        """Return the next tokens to be read."""
        request, begin = self.request, self.begin
        tokens = request.tokens
        count = min(len(tokens) - begin, PIECE)
        mine = slice(begin, begin + count)
        piece = PromptPiece(_filled(tokens[mine], 0)[None], begin, count, None, 0)
        if request.judged:
            behind = tokens[begin + 1 : begin + count + 1]
            piece = piece._replace(following=_filled(behind, 0), told=len(behind))
        if self.which is not None:
            piece = piece._replace(which=_filled(self.which[mine], -1)[None])
        if request.positions is not None:
            turned = _filled(request.positions[mine], 0)
            piece = piece._replace(turned=turned[None])
        return piece

    def start(self, slot: int, vocab: int, *, sees: bool = False) -> Start:
        """Return what the slot of the next sample begins with.

        Args:
          slot: its number.
          vocab: tokens of the model.
          sees: whether slots know by how much rotary positions differ from places.
        """
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
            "offset": np.int32(self._offset) if sees else None,
        }
        return Start(controls=Controls(**numbers), **fields)

    @property
    def _offset(self) -> int:
        """The rotary position of what follows, less its place."""
        if self.request.positions is None:
            return 0
        return int(self.request.positions.max()) + 1 - len(self.request.tokens)


def _filled(values: Any, fill: int) -> Int[np.ndarray, " c *axes"]:
    """Return numbers of a piece's tokens, filled up."""
    values = np.asarray(values, np.int32)
    out = np.full((PIECE, *values.shape[1:]), fill, np.int32)
    out[: len(values)] = values
    return out


def padded(images: ImageInputs) -> ImageInputs:
    """Fill a row of pictures up, so that few programs encode all.

    Units become 64, 80, 96, 112, 128, 160 ...: at most a quarter of them is padding.

    >>> zeros = np.zeros((1, 66), np.int32)
    >>> images = ImageInputs(zeros, np.zeros((1, 66, 2), np.int32), zeros)
    >>> padded(images).features_to.shape, padded(images).image_ids.shape
    ((1, 80), (1, 80))
    """
    units = images.features_to.shape[1]
    step = 2 ** max((units - 1).bit_length() - 3, 4)
    size = max(-(-units // step) * step, 4 * step)

    def fill(values: Any, value: int) -> Any:
        if values is None:
            return None
        more = values.shape[1] * size // units - values.shape[1]
        widths = [(0, 0), (0, more), *[(0, 0)] * (values.ndim - 2)]
        return np.pad(np.asarray(values), widths, constant_values=value)

    filled = {name: fill(value, 0) for name, value in images._asdict().items()}
    return ImageInputs(**{**filled, "features_to": fill(images.features_to, -1)})


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
