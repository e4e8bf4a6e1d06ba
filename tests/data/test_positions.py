"""Positions of multimodal rotary beside transformers' walk."""

import functools
import types

import numpy as np
import pytest
import torch
from transformers import Qwen2_5_VLModel

from jaxalign.data.positions import multimodal_positions


PICTURE = 9


def walked(tokens: np.ndarray, grids: list[tuple[int, int]]) -> tuple[np.ndarray, int]:
    """Return the positions that transformers gives, and where it goes on."""
    kind = Qwen2_5_VLModel
    vision = types.SimpleNamespace(spatial_merge_size=2, tokens_per_second=4)
    model = types.SimpleNamespace(config=types.SimpleNamespace(vision_config=vision))
    model.get_vision_position_ids = functools.partial(
        kind.get_vision_position_ids, model
    )
    ids = torch.from_numpy(tokens)[None]
    grid = torch.tensor([[1, 2 * rows, 2 * columns] for rows, columns in grids])
    kinds = (ids == PICTURE).int()
    found, delta = kind.get_rope_index(model, ids, kinds, image_grid_thw=grid)  # type: ignore
    return found[:, 0].numpy().T, len(tokens) + int(delta.flatten()[0])


def test_the_worked_example() -> None:
    tokens = np.array([1, 2, *[PICTURE] * 6, 3, 4, 5])
    positions, start = multimodal_positions(tokens, PICTURE, [(2, 3)], 3)
    np.testing.assert_array_equal(
        positions.T,
        [
            [0, 1, 2, 2, 2, 2, 2, 2, 5, 6, 7],
            [0, 1, 2, 2, 2, 3, 3, 3, 5, 6, 7],
            [0, 1, 2, 3, 4, 2, 3, 4, 5, 6, 7],
        ],
    )
    assert start == 8


@pytest.mark.parametrize("seed", range(20))
def test_transformers_walks_likewise(seed: int) -> None:
    rng = np.random.default_rng(seed)
    grids = [(int(a), int(b)) for a, b in rng.integers(1, 9, (rng.integers(1, 5), 2))]
    tokens: list[int] = []
    for rows, columns in grids:
        tokens += [1] * int(rng.integers(1, 6)) + [PICTURE] * (rows * columns)
    tokens += [2] * int(rng.integers(0, 5))
    row = np.array(tokens)
    positions, start = multimodal_positions(row, PICTURE, grids, 3)
    theirs, on = walked(row, grids)
    np.testing.assert_array_equal(positions, theirs)
    assert start == on == positions.max() + 1


def test_pictures_may_touch() -> None:
    """Transformers takes two that do for one, and fails."""
    tokens = np.array([PICTURE] * 5)
    positions, start = multimodal_positions(tokens, PICTURE, [(1, 2), (3, 1)], 3)
    expected = [[0, 0, 0], [0, 0, 1], [2, 2, 2], [2, 3, 2], [2, 4, 2]]
    assert positions.tolist() == expected and start == 5


def test_without_pictures_and_with_one_axis() -> None:
    tokens = np.array([4, PICTURE, 4])
    positions, start = multimodal_positions(tokens, PICTURE, [(1, 1)], 1)
    assert positions.tolist() == [0, 1, 2] and start == 3
    positions, start = multimodal_positions(np.array([4, 4]), PICTURE, [], 3)
    assert positions.tolist() == [[0, 0, 0], [1, 1, 1]] and start == 2
    positions, start = multimodal_positions(np.array([], int), PICTURE, [], 3)
    assert positions.shape == (0, 3) and start == 0


def test_tokens_of_other_pictures_are_refused() -> None:
    tokens = np.array([PICTURE, PICTURE, 4, PICTURE, PICTURE])
    with pytest.raises(ValueError, match=r"4 tokens are 9, for pictures of \[2\]"):
        multimodal_positions(tokens, PICTURE, [(1, 2)], 3)
    with pytest.raises(ValueError, match="the 4 tokens of a picture do not follow"):
        multimodal_positions(tokens, PICTURE, [(2, 2)], 3)
