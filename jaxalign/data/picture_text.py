"""Pictures in a text: each placeholder becomes what a family writes for its picture.

That is done before anything is tokenised, so that characters decide all that follows:
which tokens are learnt, whose segment they are, what the prompts have in common.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from jaxalign.data import picture_sizes
from jaxalign.data.conversation import Rendering, Turn
from jaxalign.data.patches import Patcher, PictureLayout
from jaxalign.data.picture import Picture
from jaxalign.data.records import Record
from jaxalign.errors import UserError


__all__ = [
    "Expanded",
    "check_unsaid",
    "expand",
    "expand_rendering",
    "layouts_of",
    "sizes_of",
]


class Expanded(NamedTuple):
    """A text with what its pictures become."""

    text: str
    layouts: tuple[PictureLayout, ...]
    stretches: tuple[tuple[int, int], ...]
    """Characters (begin, end) of each picture's text."""


def sizes_of(records: Sequence[Record]) -> list[list[tuple[int, int]]]:
    """Return the width and height of every picture of every record.

    Raises:
      UserError: a picture cannot be read, see ``Picture.size``.
    """
    known = iter(picture_sizes.sizes([p for r in records for p in r.images]))
    return [[next(known) for _ in record.images] for record in records]


def layouts_of(
    pictures: Sequence[Picture],
    patcher: Patcher,
    known: dict[PictureLayout, PictureLayout],
    sizes: Sequence[tuple[int, int]] | None = None,
) -> tuple[PictureLayout, ...]:
    """Return what becomes of pictures of their sizes.

    Args:
      pictures: of a record.
      patcher: of the family.
      known: layouts that there are already; equal ones are not kept twice.
      sizes: width and height of each; None: they are read from the pictures' headers.
    Raises:
      UserError: the family takes no picture of such a size.
    """
    if sizes is None:
        sizes = [picture.size() for picture in pictures]
    layouts = []
    for picture, (width, height) in zip(pictures, sizes, strict=True):
        try:
            layout = patcher.layout(width, height)
        except ValueError as error:
            raise UserError(
                f"{picture.where}: a picture of {width} x {height} pixels: {error}. "
                "Crop or pad it, or leave the record out"
            ) from None
        layouts.append(known.setdefault(layout, layout))
    return tuple(layouts)


def check_unsaid(texts: Iterable[str], patcher: Patcher, where: str) -> None:
    """Refuse texts of people that hold what only stands for pictures.

    Raises:
      UserError: one does.
    """
    for text in texts:
        for reserved in (patcher.placeholder, patcher.token):
            if reserved in text:
                raise UserError(
                    f"{where}: a text holds {reserved}, which stands for a picture "
                    'only. Put a part {"type": "image"} where the picture belongs, or '
                    "write the text in another way"
                )


def expand(
    text: str, layouts: Sequence[PictureLayout], patcher: Patcher, where: str
) -> Expanded:
    """Put the k-th picture's text into the place of the k-th placeholder.

    Raises:
      UserError: there are more or fewer placeholders than pictures, or the token that
        stands for a feature is there without one.
    """
    first, *others = text.split(patcher.placeholder)
    if len(others) != len(layouts):
        raise UserError(
            f"{where}: {len(layouts)} picture(s), but the prompt has {len(others)} "
            f"place(s) for one ({patcher.placeholder}). Give the field images one "
            "picture for each place: in a conversation a part "
            '{"type": "image"} of a turn of the prompt, in a plain text the placeholder'
        )
    if any(patcher.token in piece for piece in (first, *others)):
        raise UserError(
            f"{where}: the text holds {patcher.token} where no picture is. Write "
            f"{patcher.placeholder} for a picture, and nothing of it elsewhere"
        )
    pieces, stretches, length = [first], [], len(first)
    for layout, piece in zip(layouts, others, strict=True):
        stretches.append((length, length + len(layout.text)))
        pieces += [layout.text, piece]
        length += len(layout.text) + len(piece)
    return Expanded("".join(pieces), tuple(layouts), tuple(stretches))


def expand_rendering(
    rendering: Rendering,
    layouts: Sequence[PictureLayout],
    patcher: Patcher,
    where: str,
) -> Rendering:
    """Expand the placeholders of a rendering; its turns move on by what was put in.

    Raises:
      UserError: see :func:`expand`; or a completion has a picture.
    """
    expanded = expand(rendering.text, layouts, patcher, where)
    grown = len(expanded.text) - len(rendering.text)
    turns = tuple(_moved(turn, grown) for turn in rendering.turns)
    begin = min(turns[0].start, turns[0].place.begin)
    if any(end > begin for _, end in expanded.stretches):
        raise UserError(
            f"{where}: a completion has a picture, but pictures are of the prompt, "
            "which nothing is learnt of. Put the turns up to the last picture into "
            "the prompt"
        )
    return rendering._replace(turns=turns, **expanded._asdict())


def _moved(turn: Turn, by: int) -> Turn:
    place = turn.place._replace(begin=turn.place.begin + by)
    return Turn(turn.start + by, place, turn.stop + by)
