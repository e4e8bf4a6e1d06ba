"""Pictures of symbols as files: as they are drawn, and a fixed set of other views."""

import io
import random
from collections.abc import Iterable
from pathlib import Path

from PIL import Image

from tiny_vlm import packages
from tiny_vlm.packages import Package
from tiny_vlm.symbols import Symbol
from tiny_vlm.tower import PIXELS


__all__ = ["path_of", "write"]


def path_of(maker: str, symbol: Symbol, view: int) -> str:
    """Return where a view's file lies, relative to the data files."""
    return f"pictures/{maker}/{symbol.key}-{view}.png"


def write(
    package: Package,
    maker: str,
    symbols: Iterable[Symbol],
    views: int,
    folder: Path,
    store: Path,
) -> None:
    """Write a maker's drawings of the symbols that have no file yet.

    View 0 is the drawing on white. The others are smaller, moved, turned by up to 15
    degrees and on some light colour, each drawn from the symbol and the view's number.

    Args:
      folder: beside the data files; the pictures come to lie where ``path_of`` says.
      store: of the packages.
    """
    wanted = {
        f"package/img/{maker}/64/{symbol.picture}": symbol
        for symbol in symbols
        if not all((folder / path_of(maker, symbol, v)).is_file() for v in range(views))
    }
    if not wanted:
        return
    path = packages.fetch(package, store)
    (folder / "pictures" / maker).mkdir(parents=True, exist_ok=True)
    for name, content in packages.members(path, f"package/img/{maker}/64/"):
        symbol = wanted.get(name)
        if symbol is None:
            continue
        drawing = Image.open(io.BytesIO(content)).convert("RGBA")
        for view in range(views):
            _view(drawing, f"{symbol.key} {view}" if view else None).save(
                folder / path_of(maker, symbol, view)
            )


def _view(drawing: Image.Image, seed: str | None) -> Image.Image:
    """Return a drawing on its ground: whole on white, or as the seed says."""
    if seed is None:
        ground, side, angle, at = (255, 255, 255), PIXELS, 0.0, (0, 0)
    else:
        draw = random.Random(seed)
        ground = tuple(draw.randint(200, 255) for _ in range(3))
        side = round(PIXELS * draw.uniform(0.7, 1.0))
        angle = draw.uniform(-15, 15)
        at = draw.randint(0, PIXELS - side), draw.randint(0, PIXELS - side)
    bicubic = Image.Resampling.BICUBIC
    drawing = drawing.resize((side, side), bicubic).rotate(angle, bicubic)
    picture = Image.new("RGB", (PIXELS, PIXELS), ground)
    picture.paste(drawing, at, drawing)
    return picture
