"""Pictures in packed rows: each pair's patches behind those of the pairs before it."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int

from jaxalign.data.patches import Patcher, Patches, PictureLayout
from jaxalign.data.picture import Picture
from jaxalign.errors import UserError
from jaxalign.types import ImageInputs


__all__ = [
    "Pixels",
    "Seeing",
    "no_images",
    "open_patches",
    "place_pictures",
    "prompt_images",
]

Pixels = Callable[[Picture, PictureLayout], Patches]
"""Gives the patches of a picture."""


class Seeing(NamedTuple):
    """What makes the pictures of pairs into arrays."""

    patcher: Patcher
    pixels: Pixels | None = None
    """None: every picture is opened."""

    def patches_of(self, picture: Picture, layout: PictureLayout) -> Patches:
        """Return a picture's patches."""
        if self.pixels is None:
            return open_patches(picture, layout, self.patcher)
        return self.pixels(picture, layout)


def open_patches(picture: Picture, layout: PictureLayout, patcher: Patcher) -> Patches:
    """Open a picture and return its patches.

    Raises:
      UserError: see ``Picture.open``; or it is not of the size that it had when its
        layout was made.
    """
    patches = patcher.patches(picture.open())
    if len(patches.features) != patcher.units(layout):
        raise UserError(
            f"{picture.where}: the picture has become another one since its size was "
            f"read: {len(patches.features)} units of patches, expected "
            f"{patcher.units(layout)}. Put the file back, or start again"
        )
    return patches


def no_images(rows: int, places: int, patcher: Patcher) -> ImageInputs:
    """Return arrays of numpy for rows of so many patches, all padding."""
    unit = patcher.merge * patcher.merge
    arrays: Any = {
        "image_ids": np.zeros((rows, places), np.int32),
        "places_in_image": np.zeros((rows, places, 2), np.int32),
        "features_to": np.full((rows, places // unit), -1, np.int32),
        "patches": np.zeros((rows, places, patcher.patch_values), np.float32),
    }
    return ImageInputs(**arrays)


@runtime_checkable
class Pictured(Protocol):
    """A pair or a prompt with pictures."""

    @property
    def images(self) -> Sequence[Picture]: ...

    @property
    def layouts(self) -> Sequence[PictureLayout]: ...

    @property
    def feature_places(self) -> Int[np.ndarray, " f"]: ...


class _Prompt(NamedTuple):
    images: Sequence[Picture]
    layouts: Sequence[PictureLayout]
    feature_places: Int[np.ndarray, " f"]


def prompt_images(
    pictures: Sequence[Picture],
    layouts: Sequence[PictureLayout],
    feature_places: Int[np.ndarray, " f"],
    patcher: Patcher,
) -> ImageInputs:
    """Open a prompt's pictures and return them as a row of their own.

    Args:
      pictures: of the prompt.
      layouts: what becomes of each.
      feature_places: index in its tokens that each feature is for.
      patcher: of the family.
    Raises:
      UserError: see :func:`open_patches`.
    """
    units = sum(patcher.units(layout) for layout in layouts)
    images = no_images(1, units * patcher.merge * patcher.merge, patcher)
    prompt, seeing = _Prompt(pictures, layouts, feature_places), Seeing(patcher)
    place_pictures(images, 0, prompt, seeing, begin=0, units=0, count=0)
    return images


def place_pictures(
    images: Any,
    row: int,
    pair: Pictured,
    seeing: Seeing,
    *,
    begin: int,
    units: int,
    count: int,
) -> None:
    """Lay a pair's pictures into a row.

    Args:
      images: the arrays, written to.
      row: which of their rows.
      pair: the pair.
      seeing: what gives its patches.
      begin: where in the row's tokens its prompt begins.
      units: units of patches that the row has already.
      count: images (tiles) that it has already.
    """
    unit = seeing.patcher.merge * seeing.patcher.merge
    feature = 0
    for picture, layout in zip(pair.images, pair.layouts, strict=True):
        patches = seeing.patches_of(picture, layout)
        size = len(patches.features)
        laid = row, slice(units * unit, (units + size) * unit)
        ids = patches.images
        images.image_ids[laid] = np.where(ids < 0, 0, count + 1 + ids)
        images.places_in_image[laid] = patches.places
        images.patches[laid] = patches.values
        own = pair.feature_places[feature:]
        filled = patches.features >= 0
        to = np.full(size, -1, np.int32)
        to[filled] = begin + own[patches.features[filled]]
        images.features_to[row, units : units + size] = to
        units += size
        feature += int(filled.sum())
        count += len(layout.grids)
