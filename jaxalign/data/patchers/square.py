"""LLaVA-1.5: every picture at one size, which its tower's table of positions is for."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np

from jaxalign.data.patchers.grids import cut, places
from jaxalign.data.patchers.processor import (
    describe,
    image_token,
    load_processor,
    needed,
)
from jaxalign.data.patches import Patches, PictureLayout
from jaxalign.data.tokenizer import Tokenizer
from jaxalign.errors import UserError


__all__ = ["FixedSquare"]

_CLASS_TOKENS = {
    "clip_vision_model": True,
    "dinov2": True,
    "siglip_vision_model": False,
}
"""Towers, and whether a class token stands before the patches."""

_MOST_RESIZED = 2**27
"""Pixels of a picture whose shortest edge was resized, before the crop: 0.4 GB. At 336
pixels it is a picture of 1 x 1188."""


@dataclasses.dataclass(frozen=True)
class FixedSquare:
    """Patches of a square, see :class:`jaxalign.data.patches.Patcher`.

    CLIP's processor resizes the shortest edge and crops the middle; LLaVA's, where it
    says ``do_pad``, first fills the picture up to a square with its mean colour.
    """

    token: str
    token_id: int
    patch: int
    """Pixels of a patch's edge."""
    side: int
    """Pixels of the square's edge."""
    class_token: bool
    """Whether the tower has one; it is a unit of its own, before the patches."""
    strategy: Literal["default", "full"]
    """``default``: what the tower puts out first becomes no feature. That is the class
    token; of a tower without one the first patch, as in transformers."""
    processor: Any = dataclasses.field(repr=False, compare=False)
    settings: str = dataclasses.field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "settings", describe(self))

    @classmethod
    def from_files(
        cls,
        directory: str | Path,
        config: Mapping[str, Any],
        tokenizer: Tokenizer,
        *,
        max_pixels: int | None = None,
    ) -> "FixedSquare":
        """Read a checkpoint's.

        Args:
          directory: the checkpoint.
          config: its config.json.
          tokenizer: its tokenizer.
          max_pixels: refused, since every picture becomes as large as any other.
        Raises:
          UserError: ``max_pixels`` is given; something of the checkpoint is missing or
            does not fit together.
        """
        known = (
            "LlavaImageProcessor",
            "CLIPImageProcessor",
            "BitImageProcessor",
            "SiglipImageProcessor",
        )
        processor = load_processor(directory, known)
        side = needed(config, "vision_config.image_size")
        if max_pixels is not None:
            raise UserError(
                f"--max_pixels {max_pixels} has no effect: in this family each picture "
                f"becomes {side} x {side} pixels. Leave it away"
            )
        tower = needed(config, "vision_config.model_type")
        strategy = config.get("vision_feature_select_strategy") or "default"
        for name, value, choices in (
            ("vision_config.model_type", tower, tuple(_CLASS_TOKENS)),
            ("vision_feature_select_strategy", strategy, ("default", "full")),
        ):
            if value not in choices:
                raise UserError(
                    f"{name} of config.json is {value!r}. Expected "
                    f"{' or '.join(choices)}"
                )
        if (made := _size(processor)) != (side, side):
            raise UserError(
                f"{directory}: its image processor makes pictures of {made} pixels "
                f"(rows, columns), its tower takes {(side, side)}. Set crop_size or "
                "size of preprocessor_config.json to vision_config.image_size"
            )
        token, token_id = image_token(config, tokenizer)
        return cls(
            token=token,
            token_id=token_id,
            patch=needed(config, "vision_config.patch_size"),
            side=side,
            class_token=_CLASS_TOKENS[tower],
            strategy=cast(Literal["default", "full"], strategy),
            processor=processor,
        )

    @property
    def placeholder(self) -> str:
        """Return what a template prints: the same as for one feature."""
        return self.token

    @property
    def merge(self) -> int:
        """Return 1: each patch becomes a feature."""
        return 1

    @property
    def patch_values(self) -> int:
        """Return three channels of a patch's pixels."""
        return 3 * self.patch**2

    @property
    def axes(self) -> int:
        """Return 1: positions are plain."""
        return 1

    def layout(self, width: int, height: int) -> PictureLayout:
        """Return what becomes of a picture of a size.

        Raises:
          UserError: it is so long that resizing its shortest edge makes it huge.
        """
        shortest = self.processor.size.shortest_edge
        if shortest and not _pads(self.processor):
            long, short = max(width, height), min(width, height)
            resized = shortest * int(shortest * long / short)
            if resized > _MOST_RESIZED:
                raise UserError(
                    f"a picture of {width} x {height} pixels would have {resized} with "
                    f"its shortest edge resized to {shortest}, of which all but the "
                    f"middle is cut off. Expected at most {_MOST_RESIZED}; crop it"
                )
        edge = self.side // self.patch
        features = edge**2 + self.class_token - (self.strategy == "default")
        return PictureLayout(self.token * features, ((edge, edge),))

    def units(self, layout: PictureLayout) -> int:
        """Return how many patches such a picture has, and the class token."""
        return self.class_token + sum(rows * columns for rows, columns in layout.grids)

    def patches(self, picture: Any) -> Patches:
        """Return the patches of an opened picture (``PIL.Image``, RGB)."""
        self.layout(*picture.size)
        made = self.processor(images=picture, return_tensors="np")
        pixels = np.asarray(made["pixel_values"][0], np.float32)
        edge = self.side // self.patch
        first = int(self.class_token)
        values = cut(pixels, self.patch, 1)
        count = first + len(values)
        return Patches(
            values=np.pad(values, ((first, 0), (0, 0))),
            images=np.zeros(count, int),
            places=np.pad(
                places(edge, edge, 1), ((first, 0), (0, 0)), constant_values=-1
            ),
            features=np.arange(count) - (self.strategy == "default"),
        )


def _pads(processor: Any) -> bool:
    """Return whether pictures become squares before they are resized."""
    return bool(hasattr(processor, "pad_to_square") and processor.do_pad)


def _size(processor: Any) -> tuple[int | None, int | None]:
    """Return rows and columns of every picture's pixels, None where they differ."""
    if processor.do_center_crop:
        return processor.crop_size.height, processor.crop_size.width
    if processor.size.shortest_edge and _pads(processor):
        return (processor.size.shortest_edge,) * 2
    return processor.size.height, processor.size.width
