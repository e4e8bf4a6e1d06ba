"""Patches of an image in the order of units, and where they lie on its grid."""

import numpy as np
from jaxtyping import Num


__all__ = ["cut", "places"]


def cut(pixels: Num[np.ndarray, "c h w"], patch: int, merge: int) -> np.ndarray:
    """Cut an image into patches, the ``merge * merge`` of a unit one behind the other.

    Units follow each other row by row, and so do the patches of one. Pixels beyond the
    last whole patch are left out, as by a convolution.

    Returns:
      [patches, c * patch * patch], channel, row, column, the last fastest.

    >>> cut(np.arange(16).reshape(1, 4, 4), 1, 2)[:6, 0].tolist()
    [0, 1, 4, 5, 2, 3]
    """
    channels, height, width = pixels.shape
    rows, columns = height // patch, width // patch
    pixels = pixels[:, : rows * patch, : columns * patch]
    split = pixels.reshape(
        channels, rows // merge, merge, patch, columns // merge, merge, patch
    )
    return split.transpose(1, 4, 2, 5, 0, 3, 6).reshape(
        rows * columns, channels * patch * patch
    )


def places(rows: int, columns: int, merge: int) -> np.ndarray:
    """Return row and column of each patch, in the order of :func:`cut`.

    >>> places(2, 4, 2).tolist()[:5]
    [[0, 0], [0, 1], [1, 0], [1, 1], [0, 2]]
    """
    grid = np.indices((rows, columns))
    split = grid.reshape(2, rows // merge, merge, columns // merge, merge)
    return split.transpose(1, 3, 2, 4, 0).reshape(rows * columns, 2)
