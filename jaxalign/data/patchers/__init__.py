"""How each family makes patches of pictures (:class:`jaxalign.data.patches.Patcher`).

Resizing, tiling and normalising is that of transformers' image processors, those that
work by Pillow and need no torch. What stands in the text is written here.
"""

from jaxalign.data.patchers.any_size import AnySize
from jaxalign.data.patchers.square import FixedSquare
from jaxalign.data.patchers.tiles import SplitTiles


__all__ = ["AnySize", "FixedSquare", "SplitTiles"]
