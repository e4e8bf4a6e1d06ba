"""Texts and pixels of our patchers beside transformers' own processors.

Their composite processors want a video part, and with it torchvision: here they do
without, by a subclass that does not look.
"""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import (
    AutoImageProcessor,
    Idefics3Processor,
    LlavaProcessor,
    Qwen2_5_VLProcessor,
    Qwen2VLProcessor,
    SmolVLMProcessor,
)
from transformers.models.smolvlm import processing_smolvlm

from jaxalign.data.patchers import AnySize, FixedSquare, SplitTiles
from jaxalign.data.patches import Patcher, Patches
from tests.data.patchers import published


PATCHERS = {
    "smolvlm": SplitTiles,
    "idefics3": SplitTiles,
    "llava": FixedSquare,
    "qwen2_vl": AnySize,
    "qwen2_5_vl": AnySize,
}
PROCESSORS: dict[str, Any] = {
    "smolvlm": SmolVLMProcessor,
    "idefics3": Idefics3Processor,
    "llava": LlavaProcessor,
    "qwen2_vl": Qwen2VLProcessor,
    "qwen2_5_vl": Qwen2_5_VLProcessor,
}


def reference(checkpoint: published.Checkpoint, **options: Any) -> Any:
    """Return transformers' processor of a checkpoint, without a part for videos."""
    kind = PROCESSORS[checkpoint.config["model_type"]]

    class Hatched(kind):
        def check_argument_for_proper_class(self, argument_name, argument):
            return kind

    images = AutoImageProcessor.from_pretrained(checkpoint.directory, backend="pil")
    video = {} if kind in (LlavaProcessor, Idefics3Processor) else {"video": None}
    return Hatched(
        image_processor=images,
        tokenizer=checkpoint.tokenizer,
        **{f"{name}_processor": value for name, value in video.items()},
        **options,
    )


def options_of(patcher: Any, config: dict[str, Any]) -> dict[str, Any]:
    """Return what the processor is told of the model in its own file."""
    if isinstance(patcher, SplitTiles):
        edge = patcher.tile // patcher.patch // patcher.merge
        return {"image_seq_len": edge**2}
    if isinstance(patcher, FixedSquare):
        return {
            "patch_size": patcher.patch,
            "vision_feature_select_strategy": patcher.strategy,
            "num_additional_image_tokens": int(patcher.class_token),
        }
    return {}


def images_of(patcher: Any, patches: Patches, images: int) -> np.ndarray:
    """Put patches back on their images: [images, c, h, w]."""
    edge = round((patcher.patch_values // 3) ** 0.5)
    rows, columns = patches.places.max(0) + 1
    whole = np.full((images, 3, rows, edge, columns, edge), np.nan)
    real = patches.places[:, 0] >= 0
    row, column = patches.places[real].T
    values = patches.values[real].reshape(-1, 3, edge, edge)
    whole[patches.images[real], :, row, :, column] = values
    return whole.reshape(images, 3, rows * edge, columns * edge)


def their_images(patcher: Any, made: Any) -> np.ndarray:
    """Return transformers' pixels likewise, to the last whole patch."""
    pixels = np.asarray(made["pixel_values"])
    if not isinstance(patcher, AnySize):
        pixels = pixels.reshape(-1, *pixels.shape[-3:])
        rows, columns = (
            size // patcher.patch * patcher.patch for size in pixels.shape[2:]
        )
        return pixels[:, :, :rows, :columns]
    ((_, rows, columns),) = made["image_grid_thw"]
    # Blocks of 2 x 2 patches row by row, of two equal frames.
    blocks = pixels.reshape(rows // 2, columns // 2, 2, 2, 3, 2, 14, 14)
    np.testing.assert_array_equal(blocks[:, :, :, :, :, 0], blocks[:, :, :, :, :, 1])
    frame = blocks[:, :, :, :, :, 0].transpose(4, 0, 2, 5, 1, 3, 6)
    return frame.reshape(1, 3, rows * 14, columns * 14)


def check(patcher: Any, processor: Any, tokenizer: Any, image: Image.Image) -> float:
    """Compare one picture; return the largest difference of a value."""
    picture = published.opened(image)
    # Transparency is theirs to lay on white; turning is not done to opened pictures.
    given = image if image.has_transparency_data else picture
    prompt = f"the {patcher.placeholder} river"
    made = processor(images=[given], text=[prompt], return_tensors="np")
    layout = patcher.layout(*picture.size)
    ours = tokenizer(prompt.replace(patcher.placeholder, layout.text))["input_ids"]
    assert ours == made["input_ids"][0].tolist()

    patches = patcher.patches(picture)
    units, merge = patcher.units(layout), patcher.merge
    features = ours.count(patcher.token_id)
    assert len(patches.values) == units * merge**2 == len(patches.places)
    assert sorted(patches.features[patches.features >= 0]) == list(range(features))
    grids = [
        tuple(patches.places[patches.images == image].max(0) + 1)
        for image in range(len(layout.grids))
    ]
    assert tuple(grids) == layout.grids
    assert patches.values.dtype == np.float32
    pixels = images_of(patcher, patches, len(grids))
    theirs = their_images(patcher, made)
    assert pixels.shape == theirs.shape
    return float(np.abs(pixels - theirs).max())


@pytest.fixture
def sides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[Patcher, Any, Any]]:
    """Return ``sides(family)``: our patcher, transformers' processor, the tokenizer."""
    # It is not installed, and spells the number of a video's frames.
    monkeypatch.setattr(processing_smolvlm, "num2words", str)

    def made(family: str, **options: Any) -> tuple[Patcher, Any, Any]:
        checkpoint = published.write(tmp_path, family, **options)
        kind = PATCHERS[checkpoint.config["model_type"]]
        patcher = kind.from_files(*checkpoint.arguments)
        processor = reference(checkpoint, **options_of(patcher, checkpoint.config))
        return patcher, processor, checkpoint.tokenizer

    return made


def pictures(shared: Path | None) -> Iterator[tuple[str, Image.Image]]:
    yield from published.odd_pictures()
    if shared is not None:
        for path in sorted((shared / "dream/FigStep-Benign/images").glob("*.png")):
            with Image.open(path) as image:
                yield path.name, image.copy()


HANDFUL = ((97, 61), (30, 1000), (30, 30), (1, 1), (640, 480))


@pytest.mark.parametrize("family", published.FAMILIES)
def test_a_handful_of_sizes(family: str, sides) -> None:
    patcher, processor, tokenizer = sides(family)
    # Of those that are enlarged to 16 tiles two do.
    for size in HANDFUL[: 2 if isinstance(patcher, SplitTiles) else None]:
        picture = published.drawn(*size)
        assert check(patcher, processor, tokenizer, picture) == 0, size


@pytest.mark.parity
@pytest.mark.data
@pytest.mark.parametrize("family", ["smolvlm-256m", "llava-1.5", "qwen2.5-vl"])
def test_two_hundred_pictures(family: str, sides, shared_data, capsys) -> None:
    patcher, processor, tokenizer = sides(family)
    worst, count, refused = 0.0, 0, []
    # Each becomes 16 tiles: all 200 take minutes (no difference, Pillow 13.0).
    step = 4 if isinstance(patcher, SplitTiles) else 1
    for name, image in itertools.islice(pictures(shared_data), 0, None, step):
        width, height = image.size
        if isinstance(patcher, AnySize) and max(width, height) > 200 * min(
            width, height
        ):
            with pytest.raises(ValueError, match="200"):
                patcher.patches(published.opened(image))
            with pytest.raises(ValueError, match="200"):
                processor(images=[image], text=[patcher.placeholder])
            refused.append(name)
            continue
        worst = max(worst, check(patcher, processor, tokenizer, image))
        count += 1
    with capsys.disabled():
        print(f"\n{family}: {count} pictures, {len(refused)} refused, {worst}")
    assert count + len(refused) == 200 // step
    assert worst == 0
