"""Checkpoints without weights whose options are those published, and odd pictures."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from tests.synthetic import make_tokenizer


CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
CLIP_STD = [0.26862954, 0.26130258, 0.27577711]
HALF = [0.5, 0.5, 0.5]

TILES = (
    *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)),
    "<global-img>",
    "<fake_token_around_image>",
    "<image>",
    "<end_of_utterance>",
)
QWEN = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")


class Files(NamedTuple):
    """What one family's checkpoint says of pictures."""

    image_token: str
    special: tuple[str, ...]
    config: dict[str, Any]
    processor: dict[str, Any]


def _split(kind: str, longest: int, tile: int, patch: int, scale: int) -> Files:
    name = {"smolvlm": "SmolVLM", "idefics3": "Idefics3"}[kind]
    return Files(
        "<image>",
        TILES,
        {
            "model_type": kind,
            "scale_factor": scale,
            "vision_config": {"image_size": tile, "patch_size": patch},
        },
        {
            "image_processor_type": f"{name}ImageProcessor",
            "do_image_splitting": True,
            "size": {"longest_edge": longest},
            "max_image_size": {"longest_edge": tile},
            "image_mean": HALF,
            "image_std": HALF,
            "resample": 1,
        },
    )


def _llava(tower: str, kind: str, side: int) -> Files:
    return Files(
        "<image>",
        ("<image>",),
        {
            "model_type": "llava",
            "vision_feature_select_strategy": "default",
            "vision_config": {
                "model_type": tower,
                "image_size": side,
                "patch_size": 14,
            },
        },
        {
            "image_processor_type": f"{kind}ImageProcessor",
            "crop_size": {"height": side, "width": side},
            "size": {"shortest_edge": side},
            "do_center_crop": True,
            "image_mean": CLIP_MEAN,
            "image_std": CLIP_STD,
            "resample": 3,
        },
    )


def _qwen(kind: str, **vision: Any) -> Files:
    return Files(
        "<|image_pad|>",
        QWEN,
        {
            "model_type": kind,
            "vision_config": {
                "patch_size": 14,
                "spatial_merge_size": 2,
                "temporal_patch_size": 2,
                **vision,
            },
        },
        {
            "image_processor_type": "Qwen2VLImageProcessor",
            "min_pixels": 3136,
            "max_pixels": 12845056,
            "patch_size": 14,
            "temporal_patch_size": 2,
            "merge_size": 2,
            "image_mean": CLIP_MEAN,
            "image_std": CLIP_STD,
        },
    )


FAMILIES = {
    "smolvlm-256m": _split("smolvlm", 2048, 512, 16, 4),
    "smolvlm-2.2b": _split("smolvlm", 1536, 384, 14, 3),
    "idefics3-8b": _split("idefics3", 1456, 364, 14, 2),
    "llava-1.5": _llava("clip_vision_model", "CLIP", 336),
    "llava-dinov2": _llava("dinov2", "Bit", 112),
    "qwen2-vl": _qwen("qwen2_vl"),
    "qwen2.5-vl": _qwen("qwen2_5_vl", window_size=112),
}


class Checkpoint(NamedTuple):
    directory: Path
    config: dict[str, Any]
    tokenizer: Any

    @property
    def arguments(self) -> tuple[Path, dict[str, Any], Any]:
        return self.directory, self.config, self.tokenizer


def write(
    directory: Path,
    family: str,
    *,
    era: int = 4,
    changes: dict[str, Any] | None = None,
    config: dict[str, Any] | None = None,
) -> Checkpoint:
    """Write a checkpoint's files but for the weights.

    Args:
      directory: where to.
      family: of ``FAMILIES``.
      era: of transformers, which says where the image processor's options are.
      changes: to the image processor's options; None takes one away.
      config: changes to config.json.
    """
    files = FAMILIES[family]
    tokenizer = make_tokenizer(directory)
    tokenizer.add_special_tokens({"additional_special_tokens": list(files.special)})
    tokenizer.save_pretrained(directory)
    token_id = tokenizer.convert_tokens_to_ids(files.image_token)
    name = "image_token_index" if files.config["model_type"] == "llava" else (
        "image_token_id"
    )  # fmt: skip
    told = {**files.config, name: token_id, **(config or {})}
    (directory / "config.json").write_text(json.dumps(told))
    options = {**files.processor, **(changes or {})}
    options = {key: value for key, value in options.items() if value is not None}
    if era == 4:
        (directory / "preprocessor_config.json").write_text(json.dumps(options))
        (directory / "processor_config.json").write_text('{"image_seq_len": 64}')
    else:
        text = json.dumps({"image_processor": options})
        (directory / "processor_config.json").write_text(text)
    return Checkpoint(directory, told, tokenizer)


def drawn(width: int, height: int, seed: int = 0) -> Image.Image:
    """Draw a picture with smooth parts, edges and noise."""
    rng = np.random.default_rng(seed)
    row, column = np.mgrid[:height, :width]
    waves = [np.sin(row / a + column / b) for a, b in rng.uniform(3, 60, (3, 2))]
    pixels = 127 + 90 * np.stack(waves, axis=-1) + rng.normal(0, 20, (height, width, 3))
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for _ in range(4):
        x, y = rng.integers(0, (width, height), (2, 2)).T
        box = (min(x), min(y), max(x), max(y))
        draw.rectangle(box, fill=tuple(int(v) for v in rng.integers(0, 256, 3)))
    return image


def opened(image: Image.Image) -> Image.Image:
    """Return a picture in RGB: turned as EXIF says, alpha on white."""
    image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


SIZES = (
    *((1, 1), (1, 1000), (3, 3), (2, 150), (97, 61), (1000, 30), (30, 30), (28, 28)),
    *((640, 480), (480, 640), (512, 512), (513, 511), (760, 760), (2048, 2048)),
    *((1333, 2001), (336, 336), (337, 335), (112, 112), (1, 150), (199, 1)),
)


def odd_pictures() -> Iterator[tuple[str, Image.Image]]:
    """Yield 150 pictures of odd sizes, modes and orientations, not opened yet."""
    for width, height in SIZES:
        yield f"{width}x{height}", drawn(width, height)
    for mode in ("L", "LA", "1", "P", "CMYK", "RGBA", "YCbCr", "HSV"):
        for width, height in ((97, 61), (640, 480)):
            yield f"{mode} {width}x{height}", _in_mode(drawn(width, height), mode)
    for orientation in range(1, 9):
        image = drawn(211, 97, orientation)
        image.getexif()[0x0112] = orientation
        yield f"EXIF {orientation}", image
    for name, color in (("black", 0), ("white", 255), ("grey", 128)):
        for side in (64, 700):
            yield f"{name} {side}", Image.new("RGB", (side, side), (color,) * 3)
    rng = np.random.default_rng(5)
    for seed in range(100):
        width, height = (int(v) for v in np.exp(rng.uniform(1, 7, 2)))
        yield f"seed {seed}: {width}x{height}", drawn(width, height, seed)


def _in_mode(image: Image.Image, mode: str) -> Image.Image:
    if mode in ("RGBA", "LA"):
        alpha = drawn(*image.size, seed=9).convert("L")
        image = image.convert(mode)
        image.putalpha(alpha)
        return image
    return image.convert(mode)
