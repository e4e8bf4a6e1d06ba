"""A family of pictures for tests: patches of one colour each, all odd cases at will."""

import dataclasses
from typing import Any

import numpy as np

from jaxalign.data.patches import Patches, PictureLayout


EXTRA = ("<image>", "<frame>", "<pad>", "<see>", "</see>", "<end_of_utterance>")


@dataclasses.dataclass(frozen=True)
class Mosaic:
    """Squares of 4 x 4 pixels are a patch, and 2 x 2 of these become a feature.

    A picture above twice as wide as high is cut into two tiles, side by side.
    """

    token_id: int
    token: str = "<image>"
    placeholder: str = "<image>"
    axes: int = 1
    class_token: bool = False
    merge: int = 2
    patch_values: int = 3
    settings: str = "mosaic"

    def layout(self, width: int, height: int) -> PictureLayout:
        if width > 20 * height:
            raise ValueError("wider than 20 times its height")
        rows = 2 * max(1, height // 8)
        columns = 2 * max(1, width // 8)
        grids = ((rows, columns),)
        if self.axes == 1 and width > 2 * height:
            grids = ((rows, 2 * max(1, width // 16)),) * 2
        pieces = [self.token * (r * c // 4) for r, c in grids]
        if self.axes == 3:
            return PictureLayout(f"<see>{''.join(pieces)}</see>", grids)
        framed = "\n".join(f"<frame>{piece}" for piece in pieces)
        return PictureLayout(f"{framed}<frame>", grids)

    def units(self, layout: PictureLayout) -> int:
        return sum(r * c // 4 + self.class_token for r, c in layout.grids)

    def patches(self, picture: Any) -> Patches:
        grids = self.layout(*picture.size).grids
        wide = sum(columns for _, columns in grids)
        pixels = np.asarray(picture.resize((wide, grids[0][0])), np.float32) / 255
        values, images, places, features = [], [], [], []
        for number, (rows, columns) in enumerate(grids):
            if self.class_token:
                values += [np.zeros(3, np.float32)] * 4
                images += [number, -1, -1, -1]
                places += [(-1, -1)] + [(0, 0)] * 3
                features.append(-1)
            for up in range(0, rows, 2):
                for left in range(0, columns, 2):
                    for place in ((0, 0), (0, 1), (1, 0), (1, 1)):
                        row, column = up + place[0], left + place[1]
                        values.append(pixels[row, number * columns + column])
                        images.append(number)
                        places.append((row, column))
                    features.append(sum(f >= 0 for f in features))
        ints = (np.array(x, np.int32) for x in (images, places, features))
        return Patches(np.stack(values), *ints)


def seeing(tokenizer: Any, **options: Any) -> tuple[Any, Mosaic]:
    """Return a copy of a tokenizer that knows pictures, and the patcher.

    ``axes=3`` has a frame in its placeholder, as Qwen's has.
    """
    import copy

    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": list(EXTRA)})
    if options.get("axes") == 3:
        options = {"token": "<pad>", "placeholder": "<see><pad></see>", **options}
    token = options.get("token", "<image>")
    return tokenizer, Mosaic(tokenizer.convert_tokens_to_ids(token), **options)
