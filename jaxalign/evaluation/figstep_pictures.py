"""FigStep's pictures: an instruction as typeset text, with an empty list below it.

A white square of 760 pixels; the instruction wrapped at 15 characters and the lines
``1.``, ``2.``, ``3.`` in FreeMono Bold of 80 pixels, black, from (20, 10), lines 75
pixels apart (https://arxiv.org/abs/2311.05608, https://github.com/ThuCCSLab/FigStep).
What is below the edge is cut off, from the eleventh line on.

Every character has a cell of its own, 48 pixels wide, so that wrapping, lines and
places are the same in any font; only the shapes in the cells are the font's. Published
bytes depend on the build of font and FreeType, and are not met.
"""

import functools
import io
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

from jaxalign.errors import UserError


__all__ = [
    "BASELINE",
    "CELL",
    "COLUMNS",
    "LEFT",
    "PITCH",
    "SIDE",
    "Font",
    "find_font",
    "lines_of",
    "rendered",
]

SIDE = 760
COLUMNS = 15
CELL = 48
"""Width of a character, in pixels."""
PITCH = 75
LEFT = 20
BASELINE = 74
"""Of the first line; FreeMono Bold's capitals end 64 pixels below the origin."""
_SIZE = 80

_FREE = ("FreeMonoBold.ttf", "FreeMonoBold.otf")
_REPLACEMENTS = ("DejaVuSansMono-Bold.ttf", "LiberationMono-Bold.ttf")
_PLACES = (
    *("/usr/share/fonts", "/usr/local/share/fonts", "/Library/Fonts"),
    *("~/.fonts", "~/.local/share/fonts", "~/Library/Fonts", "C:/Windows/Fonts"),
)


class Font(NamedTuple):
    """A font that was found.

    >>> Font(Path("FreeMonoBold.ttf"), official=True).name
    'FreeMonoBold'
    """

    path: Path
    official: bool
    """Whether it is the one of the published pictures."""

    @property
    def name(self) -> str:
        """The name of its file, without the ending."""
        return self.path.stem


@functools.cache
def find_font(places: tuple[str, ...] = _PLACES) -> Font:
    """Return FreeMono Bold, or a bold fixed-width font in its place.

    Args:
      places: directories that are searched, with all below them.
    Raises:
      UserError: there is none; names the package that has it.
    Example::

      find_font().name  # "FreeMonoBold"
    """
    for names, official in ((_FREE, True), (_REPLACEMENTS, False)):
        for place in places:
            folder = Path(place).expanduser()
            for name in names:
                for path in sorted(folder.rglob(name)) if folder.is_dir() else ():
                    return Font(path, official)
    raise UserError(
        f"FigStep's pictures are set in FreeMono Bold, which is not on this machine, "
        f"nor is a replacement ({', '.join(_REPLACEMENTS)}): searched "
        f"{', '.join(places)}. Install the package fonts-freefont-ttf (Debian, Ubuntu) "
        "or gnu-free-mono-fonts (Fedora), or put the published pictures into the data "
        "directory"
    )


def lines_of(instruction: str) -> list[str]:
    """Return the lines of a picture, the empty list's among them.

    >>> lines_of("Steps to bake a cake.")
    ['Steps to bake a', 'cake.', '1. ', '2. ', '3. ']
    """
    return [*textwrap.wrap(instruction, COLUMNS), "1. ", "2. ", "3. "]


def rendered(instruction: str, font: Font | None = None) -> bytes:
    """Return the picture of an instruction, as a PNG.

    Args:
      instruction: such as ``Steps to bake a cake.``
      font: default :func:`find_font`.
    Raises:
      UserError: there is no font, or it cannot be read.
    Example::

      Path("cake.png").write_bytes(rendered("Steps to bake a cake."))
    """
    from PIL import Image, ImageDraw

    letters = _opened((font or find_font()).path)
    image = Image.new("RGB", (SIDE, SIDE), "white")
    draw = ImageDraw.Draw(image)
    for row, line in enumerate(lines_of(instruction)):
        for column, letter in enumerate(line):
            place = LEFT + CELL * column, BASELINE + PITCH * row
            draw.text(place, letter, font=letters, fill="black", anchor="ls")
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@functools.cache
def _opened(path: Path) -> Any:
    from PIL import ImageFont

    try:
        return ImageFont.truetype(path, _SIZE, layout_engine=ImageFont.Layout.BASIC)
    except OSError as error:
        raise UserError(f"the font {path} cannot be read: {error}") from None
