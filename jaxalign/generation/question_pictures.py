"""Pictures of questions with a few answers: opened when their row is computed."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from jaxalign.data import image_rows
from jaxalign.data.patches import Patcher, PictureLayout
from jaxalign.data.picture import Picture
from jaxalign.types import ImageInputs


__all__ = ["QuestionPictures", "laid_out", "pictures_of"]


class QuestionPictures(NamedTuple):
    """The pictures of a prompt."""

    images: Sequence[Picture]
    layouts: Sequence[PictureLayout]
    """What becomes of each."""
    feature_places: Int[np.ndarray, " f"]
    """Index in the prompt's tokens that each feature is for."""
    patcher: Patcher
    positions: Int[np.ndarray, "n 3"] | None = None
    """Of the prompt's tokens, for multimodal rotary; None: 0, 1, 2, ..."""

    @property
    def units(self) -> int:
        """Return how many units of patches they have."""
        return sum(map(self.patcher.units, self.layouts))


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
    return QuestionPictures(pictures, layouts, feature_places, patcher, positions)


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
    patcher = next((pictures.patcher for row in rows for pictures, _ in row), None)
    if patcher is None:
        return None
    made = image_rows.no_images(len(rows), units * patcher.merge**2, patcher)
    seeing = image_rows.Seeing(patcher)
    for number, row in enumerate(rows):
        place = count = 0
        for pictures, begin in row:
            image_rows.place_pictures(
                made, number, pictures, seeing, begin=begin, units=place, count=count
            )
            place += pictures.units
            count += sum(len(layout.grids) for layout in pictures.layouts)
    return made
