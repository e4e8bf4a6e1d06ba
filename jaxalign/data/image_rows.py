"""Pictures in packed rows: each pair's patches behind those of the pairs before it.

Or in their place what is kept of a frozen tower's work on them.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int

from jaxalign.data.kept_features import KeptFeatures
from jaxalign.data.patches import Patcher, Patches, PictureLayout
from jaxalign.data.picture import Picture
from jaxalign.errors import UserError
from jaxalign.types import ImageInputs


__all__ = [
    "Seeing",
    "lay_patches",
    "no_images",
    "open_patches",
    "place_pictures",
    "prompt_images",
]


class Seeing(NamedTuple):
    """What makes the pictures of pairs into arrays."""

    patcher: Patcher
    kept: KeptFeatures | None = None
    """None: every picture is opened, and its patches are laid into the row."""


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


def no_images(
    rows: int, places: int, patcher: Patcher, kept: KeptFeatures | None = None
) -> ImageInputs:
    """Return arrays of numpy for rows of so many patches, all padding.

    With ``kept`` the rows hold that, and of patches nothing.
    """
    unit = patcher.merge * patcher.merge
    units = places // unit
    patches = places if kept is None else 0
    arrays: Any = {
        "image_ids": np.zeros((rows, patches), np.int32),
        "places_in_image": np.zeros((rows, patches, 2), np.int32),
        "features_to": np.full((rows, units), -1, np.int32),
    }
    if kept is None:
        shape = rows, places, patcher.patch_values
        arrays["patches"] = np.zeros(shape, np.float32)
    elif kept.kind == "states":
        shape = rows, places, kept.width // unit
        arrays["states"] = np.zeros(shape, kept.numbers)
    else:
        arrays["features"] = np.zeros((rows, units, kept.width), kept.numbers)
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
    to = images.features_to[row]
    feature = 0
    for picture, layout in zip(pair.images, pair.layouts, strict=True):
        own = begin + pair.feature_places[feature:]
        if seeing.kept is None:
            patches = open_patches(picture, layout, seeing.patcher)
            lay_patches(images, row, patches, units=units, count=count)
            filled = np.flatnonzero(patches.features >= 0)
            to[units + filled] = own[patches.features[filled]]
            size, known = len(patches.features), len(filled)
        else:
            # In the order of the text, without what becomes no feature.
            values = seeing.kept.of(picture)
            size, known = seeing.patcher.units(layout), len(values)
            to[units : units + known] = own[:known]
            _lay_kept(images, row, values, units)
        units += size
        feature += known
        count += len(layout.grids)


def lay_patches(
    images: Any, row: int, patches: Patches, *, units: int, count: int
) -> None:
    """Lay a picture's patches into a row, behind so many units and images."""
    unit = len(patches.images) // len(patches.features)
    begin = units * unit
    laid = row, slice(begin, begin + len(patches.images))
    ids = patches.images
    images.image_ids[laid] = np.where(ids < 0, 0, count + 1 + ids)
    images.places_in_image[laid] = patches.places
    images.patches[laid] = patches.values


def _lay_kept(images: Any, row: int, values: np.ndarray, units: int) -> None:
    if images.features is not None:
        images.features[row, units : units + len(values)] = values
        return
    states, width = images.states, images.states.shape[2]
    unit = values.shape[1] // width
    laid = slice(units * unit, (units + len(values)) * unit)
    states[row, laid] = values.reshape(-1, width)
