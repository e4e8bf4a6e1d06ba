"""What is known of a picture from its size alone, and the order of its patches."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers.image_processing_backends import PilBackend
from transformers.models.idefics3.modeling_idefics3 import Idefics3Connector
from transformers.vision_utils import get_vision_window_index

from jaxalign.data.patchers import AnySize, FixedSquare, SplitTiles
from tests.data.patchers import published


@pytest.fixture
def sizes_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have transformers' processors resize to the right size, without the pixels."""

    def resize(self, image: np.ndarray, size: Any, **_: Any) -> np.ndarray:
        empty = np.zeros((1, 1, 1), np.uint8)
        return np.broadcast_to(empty, (3, size.height, size.width))

    monkeypatch.setattr(PilBackend, "resize", resize)


def random_sizes(count: int, most: int, aspect: float) -> list[tuple[int, int]]:
    rng = np.random.default_rng(0)
    sizes = []
    while len(sizes) < count:
        width, height = (int(v) for v in np.exp(rng.uniform(0, np.log(most), 2)))
        if max(width, height) <= aspect * min(width, height):
            sizes.append((width, height))
    return sizes


@pytest.mark.parametrize(
    "longest, tile", [(2048, 512), (1536, 384), (1456, 364), (1500, 364), (8000, 378)]
)
def test_tiles_are_as_many_as_transformers_makes(
    tmp_path, sizes_only, longest: int, tile: int
) -> None:
    """Where the longest edge is no multiple of a tile's, and above their limit too."""
    sizes = {
        "size": {"longest_edge": longest},
        "max_image_size": {"longest_edge": tile},
    }
    checkpoint = published.write(
        tmp_path, "idefics3-8b", changes=sizes, config={"scale_factor": 1}
    )
    patcher = SplitTiles.from_files(*checkpoint.arguments)
    processor = patcher.processor
    near = [
        (w, h) for w in range(tile - 3, tile + 4) for h in range(tile - 3, tile + 4)
    ]
    for width, height in [*near, *random_sizes(1000, 9000, np.inf)]:
        image = np.broadcast_to(np.zeros((1, 1, 1), np.uint8), (3, height, width))
        image = processor.resize(image, processor.size, resample=1)
        image = processor.resize_for_vision_encoder(image, tile, resample=1)
        tiles, rows, columns = processor.split_images(image, {"longest_edge": tile})
        layout = patcher.layout(width, height)
        assert patcher._split(width, height) == (rows, columns), (width, height)
        assert len(layout.grids) == len(tiles)


def test_pixels_of_any_size_are_those_of_the_published_formula(tmp_path) -> None:
    """See the report on Qwen2-VL and its repository: half to even, within limits."""
    checkpoint = published.write(
        tmp_path, "qwen2.5-vl", changes={"max_pixels": 1280 * 784}
    )
    patcher = AnySize.from_files(*checkpoint.arguments)
    least, most, unit = 3136, 1280 * 784, 28
    for width, height in random_sizes(2000, 6000, 200):
        layout = patcher.layout(width, height)
        ((rows, columns),) = layout.grids
        assert layout.text == patcher.token * (rows * columns // 4)
        area = rows * columns * 14**2
        if least <= area <= most:
            nearest = [round(edge / unit) * unit for edge in (height, width)]
            if least <= nearest[0] * nearest[1] <= most:
                assert [rows * 14, columns * 14] == nearest
        assert area >= least
        # A unit's edge is the least that a long picture's shorter edge may have.
        assert area <= most or min(rows, columns) == 2


@pytest.mark.parametrize(
    "size, grid",
    [
        ((97, 61), (56, 84)),
        ((30, 30), (56, 56)),
        ((1, 1), (56, 56)),
        ((640, 480), (476, 644)),
        ((2048, 2048), (2044, 2044)),
    ],
)
def test_worked_examples_of_any_size(tmp_path, size, grid) -> None:
    checkpoint = published.write(tmp_path, "qwen2-vl")
    patcher = AnySize.from_files(*checkpoint.arguments)
    layout = patcher.layout(*size)
    assert layout.grids == ((grid[0] // 14, grid[1] // 14),)
    assert layout.text == "<|image_pad|>" * (grid[0] * grid[1] // 784)
    assert patcher.axes == 3 and patcher.window is None


@pytest.mark.parametrize(
    "size, tokens", [((97, 61), 832), ((640, 480), 832), ((30, 30), 1088)]
)
def test_worked_examples_of_tiles(tmp_path, size, tokens: int) -> None:
    checkpoint = published.write(tmp_path, "smolvlm-256m")
    patcher = SplitTiles.from_files(*checkpoint.arguments)
    layout = patcher.layout(*size)
    assert layout.text.count("<image>") == tokens == patcher.units(layout)
    rows = 3 if tokens == 832 else 4
    assert layout.text.startswith("<fake_token_around_image><row_1_col_1><image>")
    end = "<image>\n\n<fake_token_around_image><global-img>" + "<image>" * 64
    assert layout.text.endswith(end + "<fake_token_around_image>")
    assert layout.text.count("\n") == rows + 1
    assert layout.grids == ((32, 32),) * (rows * 4 + 1)


def test_a_picture_no_larger_than_a_tile_is_that_alone(tmp_path) -> None:
    small = {"size": {"longest_edge": 512}}
    checkpoint = published.write(tmp_path, "smolvlm-256m", changes=small)
    patcher = SplitTiles.from_files(*checkpoint.arguments)
    text = "<fake_token_around_image><global-img>" + "<image>" * 64
    assert patcher.layout(640, 480) == (text + "<fake_token_around_image>", ((32, 32),))
    assert patcher.patches(published.drawn(64, 48)).values.shape == (1024, 768)


@pytest.mark.parametrize("family", ["smolvlm-2.2b", "idefics3-8b"])
def test_units_are_what_the_pixel_shuffle_joins(tmp_path, family: str) -> None:
    small = {"size": {"longest_edge": 400}}
    checkpoint = published.write(tmp_path, family, changes=small)
    patcher = SplitTiles.from_files(*checkpoint.arguments)
    patches = patcher.patches(published.drawn(90, 61))
    edge = patcher.tile // patcher.patch
    ids = torch.arange(edge**2).reshape(1, -1, 1)
    joined = Idefics3Connector.pixel_shuffle(None, ids, patcher.merge)[0].numpy()  # type: ignore
    images = patches.images.max() + 1
    units = (patches.places @ (edge, 1)).reshape(-1, patcher.merge**2)
    np.testing.assert_array_equal(units, np.tile(joined, (images, 1)))
    np.testing.assert_array_equal(patches.features, np.arange(len(units)))


@pytest.mark.parametrize("size", [(640, 480), (300, 900), (28, 56), (449, 449)])
@pytest.mark.parametrize("window", [112, 84, 120])
def test_windows_follow_each_other(tmp_path, size, window: int) -> None:
    vision = {**published.FAMILIES["qwen2.5-vl"].config["vision_config"]}
    vision["window_size"] = window
    checkpoint = published.write(
        tmp_path, "qwen2.5-vl", config={"vision_config": vision}
    )
    patcher = AnySize.from_files(*checkpoint.arguments)
    ((rows, columns),) = patcher.layout(*size).grids
    index, ends = get_vision_window_index(
        torch.tensor([[1, rows, columns]]), 2, window, 14
    )
    patches = patcher.patches(published.drawn(*size))
    np.testing.assert_array_equal(patches.features, index.numpy())
    assert patcher.window is not None
    ids = patches.places // patcher.window @ (1000, 1)
    assert [0, *(np.flatnonzero(np.diff(ids)) + 1), len(ids)] == ends.tolist()
    # A unit's patches are the square of its feature.
    corners = patches.places.reshape(-1, 4, 2)
    square = np.array([[0, 0], [0, 1], [1, 0], [1, 1]])
    np.testing.assert_array_equal(corners, corners[:, :1] + square)
    np.testing.assert_array_equal(
        corners[:, 0] // 2 @ (columns // 2, 1), patches.features
    )


@pytest.mark.parametrize("family, strategy", [
    ("llava-1.5", "default"), ("llava-1.5", "full"), ("llava-dinov2", "default"),
])  # fmt: skip
def test_the_class_token_has_a_unit_of_its_own(tmp_path, family, strategy) -> None:
    chosen = {"vision_feature_select_strategy": strategy}
    checkpoint = published.write(tmp_path, family, config=chosen)
    patcher = FixedSquare.from_files(*checkpoint.arguments)
    layout = patcher.layout(50, 70)
    edge = patcher.side // 14
    features = edge**2 + (strategy == "full")
    assert layout == ("<image>" * features, ((edge, edge),))
    assert patcher.units(layout) == edge**2 + 1
    patches = patcher.patches(published.drawn(50, 70))
    assert patches.places[:2].tolist() == [[-1, -1], [0, 0]]
    assert patches.places[-1].tolist() == [edge - 1, edge - 1]
    assert not patches.values[0].any() and patches.values[1].any()
    assert not patches.images.any()
    first = 0 if strategy == "full" else -1
    np.testing.assert_array_equal(patches.features, first + np.arange(edge**2 + 1))


def test_a_tower_without_class_token_has_only_patches(tmp_path) -> None:
    vision = {"model_type": "siglip_vision_model", "image_size": 112, "patch_size": 14}
    checkpoint = published.write(
        tmp_path,
        "llava-dinov2",
        changes={
            "image_processor_type": "SiglipImageProcessor",
            "size": {"height": 112, "width": 112},
            "do_center_crop": None,
        },
        config={"vision_config": vision, "vision_feature_select_strategy": "full"},
    )
    patcher = FixedSquare.from_files(*checkpoint.arguments)
    patches = patcher.patches(published.drawn(50, 70))
    assert patcher.layout(50, 70).text == "<image>" * 64
    assert patches.places[0].tolist() == [0, 0] and len(patches.features) == 64
    np.testing.assert_array_equal(patches.features, np.arange(64))


def test_padding_to_a_square_is_the_processors(tmp_path) -> None:
    checkpoint = published.write(
        tmp_path,
        "llava-1.5",
        changes={"image_processor_type": "LlavaImageProcessor", "do_pad": True},
    )
    patcher = FixedSquare.from_files(*checkpoint.arguments)
    patches = patcher.patches(published.drawn(300, 30))
    mean, std = (np.array(v) for v in (published.CLIP_MEAN, published.CLIP_STD))
    color = ((mean * 255).astype(int) / 255 - mean) / std
    corner = patches.values[1].reshape(3, -1)
    np.testing.assert_allclose(corner, np.repeat(color[:, None], 196, 1), atol=1e-6)
    # A long picture is not cropped, so that it is not too long either.
    assert patcher.layout(1, 9999).text == "<image>" * 576


def test_black_tiles_stay(tmp_path) -> None:
    """Transformers' model leaves out tiles whose every number is 0."""
    plain = {"do_normalize": False, "size": {"longest_edge": 1024}}
    checkpoint = published.write(tmp_path, "smolvlm-256m", changes=plain)
    patcher = SplitTiles.from_files(*checkpoint.arguments)
    picture = published.Image.new("RGB", (100, 100))
    patches = patcher.patches(picture)
    assert not patches.values.any()
    assert len(patches.features) == patcher.units(patcher.layout(100, 100)) == 5 * 64
