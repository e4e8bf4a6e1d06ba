"""Pictures of questions with a few answers: opened when their row is computed."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from jaxalign.data.image_rows import prompt_images
from jaxalign.data.patches import Patcher, PictureLayout
from jaxalign.data.picture import Picture
from jaxalign.types import ImageInputs


__all__ = ["QuestionPictures", "laid_out", "pictures_of"]


class QuestionPictures(NamedTuple):
    """The pictures of a prompt."""

    open: Callable[[], ImageInputs]
    """Gives them as a row of their own; ``features_to`` are places in the prompt."""
    units: int
    """How many units of patches they have."""
    positions: Int[np.ndarray, "n 3"] | None = None
    """Of the prompt's tokens, for multimodal rotary; None: 0, 1, 2, ..."""


def pictures_of(
    pictures: Sequence[Picture],
    layouts: Sequence[PictureLayout],
    feature_places: Int[np.ndarray, " f"],
    positions: Int[np.ndarray, "n 3"] | None,
    patcher: Patcher | None,
) -> QuestionPictures | None:
    """Return the pictures of a prompt, None where it has none.

    Args:
      pictures: of the prompt.
      layouts: what becomes of each.
      feature_places: index in its tokens that each feature is for.
      positions: of its tokens, for multimodal rotary.
      patcher: of the family.
    """
    if patcher is None or not pictures:
        return None
    opened = functools.partial(
        prompt_images, tuple(pictures), tuple(layouts), feature_places, patcher
    )
    return QuestionPictures(opened, sum(map(patcher.units, layouts)), positions)


def laid_out(
    rows: Sequence[Sequence[tuple[QuestionPictures, int]]], units: int
) -> ImageInputs | None:
    """Return the pictures of some rows, None where there are none.

    Args:
      rows: the pictures of each, and where in its tokens their prompt begins.
      units: of patches that a row is to hold, at least those of any of them.
    Raises:
      UserError: a picture cannot be opened, or is another one by now.
    """
    made: Any = None
    for r, row in enumerate(rows):
        place = count = 0
        for pictures, begin in row:
            own: Any = pictures.open()
            unit = own.image_ids.shape[1] // own.features_to.shape[1]
            if made is None:
                made = _empty(own, len(rows), units, unit)
            there = slice(place * unit, (place + pictures.units) * unit)
            ids, to = own.image_ids[0], own.features_to[0]
            made.image_ids[r, there] = np.where(ids > 0, ids + count, 0)
            made.places_in_image[r, there] = own.places_in_image[0]
            made.patches[r, there] = own.patches[0]
            filled = slice(place, place + pictures.units)
            made.features_to[r, filled] = np.where(to < 0, -1, to + begin)
            place, count = place + pictures.units, count + int(ids.max())
    return made


def _empty(like: Any, rows: int, units: int, unit: int) -> ImageInputs:
    """Return arrays for so many rows of units, all padding."""

    def full(value: int, array: np.ndarray, places: int) -> Any:
        return np.full((rows, places, *array.shape[2:]), value, array.dtype)

    return ImageInputs(
        image_ids=full(0, like.image_ids, units * unit),
        places_in_image=full(0, like.places_in_image, units * unit),
        features_to=full(-1, like.features_to, units),
        patches=full(0, like.patches, units * unit),
    )
