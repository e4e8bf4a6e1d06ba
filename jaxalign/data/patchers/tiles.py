"""SmolVLM and Idefics3: a picture as square tiles, and the whole of it in one more."""

import copy
import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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


__all__ = ["SplitTiles"]

_MOST = 4096  # pixels of an edge, whatever the options say


@dataclasses.dataclass(frozen=True)
class SplitTiles:
    """Patches of tiles, see :class:`jaxalign.data.patches.Patcher`.

    The picture is resized, also up, until its longest edge is the processor's; then
    both edges to multiples of a tile's. The tiles follow each other row by row, and
    after them comes the whole picture, as large as a tile. One that is no larger than
    a tile is that alone.
    """

    token: str
    token_id: int
    patch: int
    """Pixels of a patch's edge."""
    merge: int
    processor: Any = dataclasses.field(repr=False, compare=False)
    around: str = "<fake_token_around_image>"
    """What stands before every tile and after the last."""
    whole: str = "<global-img>"
    """What names the one that holds the whole picture."""
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
    ) -> "SplitTiles":
        """Read a checkpoint's.

        Args:
          directory: the checkpoint.
          config: its config.json.
          tokenizer: its tokenizer.
          max_pixels: how many pixels the resized picture may have, the whole in one
            tile not counted: the longest edge becomes the largest multiple of a tile's
            whose square is no larger, so that pictures of all proportions stay below.
        Raises:
          UserError: something of it is missing or does not fit together;
            ``max_pixels`` is below one tile, or above what the checkpoint allows.
        """
        known = ("Idefics3ImageProcessor", "SmolVLMImageProcessor")
        processor = load_processor(directory, known)
        if not processor.size.longest_edge:
            raise UserError(
                f"{directory}: its image processor's size is {dict(processor.size)}. "
                "Expected longest_edge"
            )
        if max_pixels is not None:
            processor = _limited(processor, max_pixels)
        token, token_id = image_token(config, tokenizer)
        patch = needed(config, "vision_config.patch_size")
        merge = needed(config, "scale_factor")
        tile = processor.max_image_size["longest_edge"]
        if tile // patch % merge:
            raise UserError(
                f"{directory}: a tile of {tile} pixels has {tile // patch} patches of "
                f"{patch} an edge, which scale_factor {merge} does not divide. Expected"
                " max_image_size of preprocessor_config.json to fit config.json"
            )
        return cls(
            token=token,
            token_id=token_id,
            patch=patch,
            merge=merge,
            processor=processor,
            around=getattr(tokenizer, "fake_image_token", cls.around),
            whole=getattr(tokenizer, "global_image_token", cls.whole),
        )

    @property
    def placeholder(self) -> str:
        """Return what a template prints: the same as for one feature."""
        return self.token

    @property
    def patch_values(self) -> int:
        """Return three channels of a patch's pixels."""
        return 3 * self.patch**2

    @property
    def axes(self) -> int:
        """Return 1: positions are plain."""
        return 1

    @property
    def tile(self) -> int:
        """Return the pixels of a tile's edge."""
        return self.processor.max_image_size["longest_edge"]

    def layout(self, width: int, height: int) -> PictureLayout:
        """Return what becomes of a picture of a size; any will do."""
        rows, columns = self._split(width, height)
        edge = self.tile // self.patch
        features = self.token * (edge // self.merge) ** 2
        lines = [
            "".join(
                f"{self.around}<row_{row}_col_{column}>{features}"
                for column in range(1, columns + 1)
            )
            + "\n"
            for row in range(1, rows + 1)
        ]
        apart = "\n" if lines else ""
        last = f"{apart}{self.around}{self.whole}{features}{self.around}"
        return PictureLayout(
            "".join(lines) + last, ((edge, edge),) * (rows * columns + 1)
        )

    def _split(self, width: int, height: int) -> tuple[int, int]:
        """Return rows and columns of tiles, 0 and 0 where there is but the whole."""
        if not self.processor.do_image_splitting:
            return 0, 0
        width, height = _resized(width, height, self.processor.size.longest_edge)
        tile = self.tile
        longest = math.ceil(max(width, height) / tile) * tile
        width, height = _scaled(width, height, longest)
        rows, columns = math.ceil(height / tile), math.ceil(width / tile)
        return (0, 0) if rows == columns == 1 else (rows, columns)

    def units(self, layout: PictureLayout) -> int:
        """Return how many features such a picture has."""
        return sum(rows * columns for rows, columns in layout.grids) // self.merge**2

    def patches(self, picture: Any) -> Patches:
        """Return the patches of an opened picture (``PIL.Image``, RGB)."""
        made = self.processor(images=[[picture]], return_tensors="np")
        # Of one picture: none of these was put in to fill up.
        tiles = np.asarray(made["pixel_values"][0], np.float32)
        values = [cut(tile, self.patch, self.merge) for tile in tiles]
        edge = self.tile // self.patch
        return Patches(
            values=np.concatenate(values),
            images=np.repeat(np.arange(len(tiles)), edge**2),
            places=np.tile(places(edge, edge, self.merge), (len(tiles), 1)),
            features=np.arange(len(tiles) * (edge // self.merge) ** 2),
        )


def _limited(processor: Any, max_pixels: int) -> Any:
    """Return the processor with a smaller longest edge."""
    tile = processor.max_image_size["longest_edge"]
    longest = processor.size.longest_edge
    if not processor.do_image_splitting:
        raise UserError(
            f"--max_pixels {max_pixels} has no effect: this checkpoint does not split "
            f"pictures, each becomes {tile} x {tile} pixels. Leave it away"
        )
    edge = math.isqrt(max_pixels) // tile * tile if max_pixels > 0 else 0
    most = math.ceil(min(longest, _MOST) / tile) * tile
    if not tile <= edge <= most:
        raise UserError(
            f"--max_pixels {max_pixels}: expected {tile**2} (one tile of {tile} x "
            f"{tile} pixels) to {most**2} (as many tiles as the checkpoint was trained "
            "on). Leave it away for the most"
        )
    from transformers.image_utils import SizeDict

    limited = copy.copy(processor)
    limited.size = SizeDict(longest_edge=min(edge, longest))
    return limited


def _resized(width: int, height: int, longest: int) -> tuple[int, int]:
    """Return width and height before they become multiples of a tile's edge.

    Rounds as transformers does, in floats and to an even shorter edge, of which
    ``get_number_of_image_patches`` takes no notice where ``longest`` is no multiple.
    """
    wide = width >= height
    width, height = _scaled(width, height, longest)
    if wide:
        height += height % 2
    else:
        width += width % 2
    width, height = max(width, 1), max(height, 1)
    if max(width, height) > _MOST:
        width, height = _scaled(width, height, _MOST)
    return max(width, 1), max(height, 1)


def _scaled(width: int, height: int, longest: int) -> tuple[int, int]:
    aspect = width / height
    if width >= height:
        return longest, int(longest / aspect)
    return int(longest * aspect), longest
