"""Qwen2-VL and Qwen2.5-VL: pictures of any size, nearly as they are."""

import copy
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxalign.data.patchers.grids import places
from jaxalign.data.patchers.processor import (
    describe,
    image_token,
    load_processor,
    needed,
)
from jaxalign.data.patches import Patches, PictureLayout
from jaxalign.data.tokenizer import Tokenizer
from jaxalign.errors import UserError


__all__ = ["AnySize"]

_MOST_ASPECT = 200
_CHANNELS = 3


@dataclasses.dataclass(frozen=True)
class AnySize:
    """Patches of a picture of any size, see :class:`jaxalign.data.patches.Patcher`.

    Both edges are rounded to multiples of a unit's, and shrunk or enlarged together
    where the picture then has too many pixels or too few.

    The text stands between the tokens that the template prints around a picture, in
    the place of the one that it prints for it.
    """

    token: str
    token_id: int
    window: int | None
    """Patches of a window's edge, whose units then lie one behind the other; None where
    the tower has no windows, and the units follow each other row by row."""
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
    ) -> "AnySize":
        """Read a checkpoint's.

        Args:
          directory: the checkpoint.
          config: its config.json.
          tokenizer: its tokenizer.
          max_pixels: how many pixels the resized picture may have, in the place of the
            image processor's own ``max_pixels`` (``longest_edge`` of its ``size``).
        Raises:
          UserError: something of it is missing or does not fit together;
            ``max_pixels`` is below the least that a picture is enlarged to.
        """
        processor = load_processor(directory, ("Qwen2VLImageProcessor",))
        if max_pixels is not None:
            processor = _limited(processor, max_pixels)
        for name, value in (
            ("patch_size", processor.patch_size),
            ("spatial_merge_size", processor.merge_size),
            ("temporal_patch_size", processor.temporal_patch_size),
        ):
            wanted = needed(config, f"vision_config.{name}")
            if value != wanted:
                raise UserError(
                    f"{directory}: vision_config.{name} of config.json is {wanted}, "
                    f"the image processor's {value}. Take both files from the same "
                    "checkpoint"
                )
        window = None
        if needed(config, "model_type").startswith("qwen2_5_vl"):
            unit = processor.patch_size * processor.merge_size
            pixels = needed(config, "vision_config.window_size")
            window = pixels // unit * processor.merge_size
        token, token_id = image_token(config, tokenizer)
        return cls(token=token, token_id=token_id, window=window, processor=processor)

    @property
    def placeholder(self) -> str:
        """Return what a template prints: the same as for one feature."""
        return self.token

    @property
    def merge(self) -> int:
        """Return how many patches a unit's edge has."""
        return self.processor.merge_size

    @property
    def patch_values(self) -> int:
        """Return three channels of a patch's pixels, of one frame."""
        return _CHANNELS * self.processor.patch_size**2

    @property
    def axes(self) -> int:
        """Return 3: time, row and column."""
        return 3

    def layout(self, width: int, height: int) -> PictureLayout:
        """Return what becomes of a picture of a size.

        Raises:
          UserError: one edge is more than 200 times the other.
        """
        from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl as pil

        if max(width, height) > _MOST_ASPECT * min(width, height):
            raise UserError(
                f"a picture of {width} x {height} pixels: this family takes none whose "
                f"one edge is more than {_MOST_ASPECT} times the other. Crop it"
            )
        patch, size = self.processor.patch_size, self.processor.size
        rows, columns = (
            edge // patch
            for edge in pil.smart_resize(
                height,
                width,
                factor=patch * self.merge,
                min_pixels=size.shortest_edge,
                max_pixels=size.longest_edge,
            )
        )
        text = self.token * (rows * columns // self.merge**2)
        return PictureLayout(text, ((rows, columns),))

    def units(self, layout: PictureLayout) -> int:
        """Return how many features such a picture has."""
        return sum(rows * columns for rows, columns in layout.grids) // self.merge**2

    def patches(self, picture: Any) -> Patches:
        """Return the patches of an opened picture (``PIL.Image``, RGB)."""
        ((rows, columns),) = self.layout(*picture.size).grids
        made = self.processor(images=picture, return_tensors="np")
        # Units row by row, of each patch the same frame twice.
        frames = np.asarray(made["pixel_values"], np.float32).reshape(
            -1, self.merge**2, _CHANNELS, self.processor.temporal_patch_size,
            self.processor.patch_size**2,
        )  # fmt: skip
        order = self._order(rows // self.merge, columns // self.merge)
        where = places(rows, columns, self.merge).reshape(-1, self.merge**2, 2)
        return Patches(
            values=frames[order, :, :, 0].reshape(-1, self.patch_values),
            images=np.zeros(rows * columns, int),
            places=where[order].reshape(-1, 2),
            features=order,
        )

    def _order(self, rows: int, columns: int) -> np.ndarray:
        """Return which unit, counted row by row, is the n-th: window by window."""
        row, column = np.indices((rows, columns)).reshape(2, -1)
        if self.window is None:
            return np.arange(rows * columns)
        edge = self.window // self.merge
        # The last key comes first. Windows at the far edges are smaller.
        return np.lexsort((column, row, column // edge, row // edge))


def _limited(processor: Any, max_pixels: int) -> Any:
    """Return the processor with another limit."""
    least = processor.size.shortest_edge
    if max_pixels < least:
        raise UserError(
            f"--max_pixels {max_pixels}: this checkpoint enlarges pictures to {least} "
            "pixels (min_pixels of its image processor). Expected at least that"
        )
    from transformers.image_utils import SizeDict

    limited = copy.copy(processor)
    limited.size = SizeDict(shortest_edge=least, longest_edge=max_pixels)
    return limited
