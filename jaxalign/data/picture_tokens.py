"""Pictures in a prompt's tokens: which ones their features fill, and the positions."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int

from jaxalign.data import spans as spans_lib
from jaxalign.data.patches import Patcher, PictureLayout
from jaxalign.data.positions import multimodal_positions
from jaxalign.errors import UserError


__all__ = ["NO_PLACES", "PictureTokens", "picture_tokens", "positions_of"]

NO_PLACES = np.zeros(0, np.int32)
"""Of a prompt without pictures."""


@runtime_checkable
class PictureTexts(Protocol):
    """A text that pictures' texts have been put into."""

    @property
    def layouts(self) -> tuple[PictureLayout, ...]: ...

    @property
    def stretches(self) -> tuple[tuple[int, int], ...]: ...


class PictureTokens(NamedTuple):
    """Where the pictures of a prompt are in its tokens."""

    layouts: tuple[PictureLayout, ...]
    feature_places: Int[np.ndarray, " f"]
    """Index in the prompt of the token of every feature, in order."""
    stretches: tuple[tuple[int, int], ...]
    """Tokens (begin, end) of each picture's text, its frame included."""
    units: int
    """How many units of patches they have."""
    feature_grids: tuple[tuple[int, int], ...] | None
    """Rows and columns of features of each image, which decide the positions of
    multimodal rotary; None: tokens are counted."""


def picture_tokens(
    tokens: Sequence[int] | np.ndarray,
    spans: spans_lib.Spans,
    pictures: PictureTexts,
    patcher: Patcher,
    where: str,
    *,
    branches: Sequence[np.ndarray] = (),
) -> PictureTokens:
    """Find the pictures of a prompt.

    Args:
      tokens: of the prompt.
      spans: characters of each, also of tokens behind.
      pictures: a rendering, or another text with pictures.
      patcher: of the family.
      where: the record's place, for messages.
      branches: tokens that stand behind the prompt, of each completion.
    Raises:
      UserError: a picture is not all in the prompt.
      ValueError: the tokenizer does not read a family's text as its tokens.
    """
    if any((tokens == patcher.token_id).any() for tokens in branches):
        raise UserError(
            f"{where}: a picture's tokens are not all in the prompt that the "
            "completions share. Give the prompt a text behind its last picture"
        )
    layouts = pictures.layouts
    places = np.flatnonzero(np.asarray(tokens) == patcher.token_id).astype(np.int32)
    wanted = sum(layout.text.count(patcher.token) for layout in layouts)
    if len(places) != wanted:
        raise ValueError(
            f"{where}: {len(places)} tokens {patcher.token_id} ({patcher.token}) for "
            f"{wanted} features: the tokenizer does not read the text of the pictures "
            "as the family writes it"
        )
    return PictureTokens(
        layouts=layouts,
        feature_places=places,
        stretches=_stretches(spans[: len(tokens)], pictures.stretches),
        units=sum(patcher.units(layout) for layout in layouts),
        feature_grids=_feature_grids(layouts, patcher),
    )


def _stretches(
    spans: spans_lib.Spans, stretches: Sequence[tuple[int, int]]
) -> tuple[tuple[int, int], ...]:
    """Return the tokens that hold a character of each stretch."""
    if not stretches:
        return ()
    found = []
    for begin, end in stretches:
        inside = np.flatnonzero((spans[:, 1] > begin) & (spans[:, 0] < end))
        found.append((int(inside[0]), int(inside[-1]) + 1))
    return tuple(found)


def _feature_grids(
    layouts: Sequence[PictureLayout], patcher: Patcher
) -> tuple[tuple[int, int], ...] | None:
    if patcher.axes == 1:
        return None
    grids = (grid for layout in layouts for grid in layout.grids)
    return tuple((r // patcher.merge, c // patcher.merge) for r, c in grids)


def positions_of(
    count: int,
    feature_places: Int[np.ndarray, " f"],
    feature_grids: Sequence[tuple[int, int]] | None,
) -> Int[np.ndarray, "n 3"] | None:
    """Return the positions of a prompt of ``count`` tokens, see ``PictureTokens``."""
    if feature_grids is None:
        return None
    is_feature = np.zeros(count, np.int32)
    is_feature[feature_places] = 1
    return multimodal_positions(is_feature, 1, feature_grids, 3)[0]
