"""What a picture becomes: a text in its placeholder's place, and patches of numbers.

A family says both by a :class:`Patcher`. The text depends on the picture's size alone,
so that lengths, packing and segments are known before any picture is decoded.
"""

from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int


__all__ = ["Patcher", "Patches", "PictureLayout"]


class PictureLayout(NamedTuple):
    """What becomes of a picture of some size."""

    text: str
    """In the place of the placeholder; holds :attr:`Patcher.token` once a feature."""
    grids: tuple[tuple[int, int], ...]
    """Rows and columns of patches of each of its images (tiles), in the order of their
    features in the text."""


class Patches(NamedTuple):
    """A picture's images as patches, in units that become one feature each."""

    values: Float[np.ndarray, "m patch"]
    """Channel, row, column, the last fastest; 0 for a class token and what fills up its
    unit."""
    images: Int[np.ndarray, " m"]
    """Which of the layout's grids a patch is of, from 0; -1 fills up a unit."""
    places: Int[np.ndarray, "m 2"]
    """Row and column on that grid; (-1, -1) is the class token, last of its unit."""
    features: Int[np.ndarray, " u"]
    """Which of the picture's features, in the order of the text, a unit becomes; -1 is
    none (a class token)."""


@runtime_checkable
class Patcher(Protocol):
    """How a family makes patches of pictures."""

    @property
    def placeholder(self) -> str:
        """Return what a chat template prints for a picture, and a plain text holds."""
        ...

    @property
    def token(self) -> str:
        """Return what stands for one feature in :attr:`PictureLayout.text`."""
        ...

    @property
    def token_id(self) -> int:
        """Return its token."""
        ...

    @property
    def merge(self) -> int:
        """Return the edge of a unit: ``merge * merge`` patches."""
        ...

    @property
    def patch_values(self) -> int:
        """Return how many numbers a patch has."""
        ...

    @property
    def axes(self) -> int:
        """Return 3 where positions are those of multimodal rotary, else 1."""
        ...

    @property
    def settings(self) -> str:
        """Return all that decides the numbers: the options and Pillow's version.

        It is part of every key that features are kept under.
        """
        ...

    def layout(self, width: int, height: int) -> PictureLayout:
        """Return what becomes of a picture of a size.

        Raises:
          ValueError: the family takes no picture of these proportions; says why.
        """
        ...

    def units(self, layout: PictureLayout) -> int:
        """Return how many units such a picture has, class tokens included."""
        ...

    def patches(self, picture: Any) -> Patches:
        """Return the patches of an opened picture (``PIL.Image``, RGB)."""
        ...
