"""Positions of a prompt's tokens, of which those of a picture lie on a grid."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int


__all__ = ["multimodal_positions"]


def multimodal_positions(
    tokens: Int[np.ndarray, " n"],
    token_id: int,
    grids: Sequence[tuple[int, int]],
    axes: int,
) -> tuple[Int[np.ndarray, " n *axes"], int]:
    """Return rotary positions of a prompt, and where what follows begins.

    With one axis they are 0, 1, 2 ... Those of multimodal rotary (Qwen2-VL, section
    2.1) are time, row and column: of a text's token the same number three times; of a
    picture that begins at ``p`` the feature in row ``r`` and column ``c`` has ``p``,
    ``p + r``, ``p + c``, and the text behind it goes on at ``p + max(rows, columns)``.

    Args:
      tokens: of the prompt.
      token_id: the one that stands for a feature of a picture.
      grids: rows and columns of each picture's features, in order.
      axes: 1, or 3 for multimodal rotary.
    Returns:
      ``[n]`` or ``[n 3]``, and one more than the largest of them.
    Raises:
      ValueError: the tokens are not those of these pictures, one run for each.

    >>> tokens = np.array([7, 9, 9, 9, 9, 9, 9, 8])
    >>> positions, start = multimodal_positions(tokens, 9, [(2, 3)], 3)
    >>> positions[:, 0].tolist(), start
    ([0, 1, 1, 1, 1, 1, 1, 4], 5)
    >>> positions[:, 1].tolist(), positions[:, 2].tolist()
    ([0, 1, 1, 1, 2, 2, 2, 4], [0, 1, 2, 3, 1, 2, 3, 4])
    """
    if axes == 1:
        return np.arange(len(tokens)), len(tokens)
    places = np.flatnonzero(tokens == token_id)
    sizes = [rows * columns for rows, columns in grids]
    if len(places) != sum(sizes):
        raise ValueError(
            f"{len(places)} tokens are {token_id}, for pictures of {sizes} features"
        )
    positions = np.zeros((len(tokens), 3), int)
    done = start = seen = 0
    for size, (rows, columns) in zip(sizes, grids, strict=True):
        begin = int(places[seen])
        seen += size
        if places[seen - 1] != begin + size - 1:
            raise ValueError(
                f"the {size} tokens of a picture do not follow each other at {begin}"
            )
        text = np.arange(start, start + begin - done)
        positions[done:begin] = text[:, None]
        start += len(text)
        done = begin + size
        row, column = np.indices((rows, columns)).reshape(2, -1)
        positions[begin:done] = start + np.stack([0 * row, row, column], axis=1)
        start += max(rows, columns)
    rest = np.arange(start, start + len(tokens) - done)
    positions[done:] = rest[:, None]
    return positions, start + len(rest)
