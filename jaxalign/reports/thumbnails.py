"""Pictures on a page: small, few beside each prompt, and part of the file."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxalign.data.messages import Message
from jaxalign.data.picture import Picture
from jaxalign.data.record_images import has_pictures
from jaxalign.data.records import parse_prompt
from jaxalign.data.rows import image_base
from jaxalign.errors import UserError
from jaxalign.reports.page import escape


__all__ = ["STYLE", "beside", "of_row", "words"]

STYLE = """
.pictures { display: flex; flex-wrap: wrap; gap: 8px; margin: 0 0 12px;
            align-items: flex-end; }
.pictures img { display: block; max-width: 100%; border-radius: 4px; }
"""

_MOST = 4
"""Of a prompt; how many more there are is said."""


def beside(pictures: Sequence[Picture]) -> str:
    """Return the first pictures of a prompt as HTML, "" where there are none.

    A picture that cannot be opened any more is said in its place: a report is of a run
    that is over.
    """
    if not pictures:
        return ""
    shown = [_image(n, picture) for n, picture in enumerate(pictures[:_MOST], 1)]
    if (more := len(pictures) - _MOST) > 0:
        shown.append(f"<span class='mute'>and {more} more</span>")
    return f"<div class='pictures'>{''.join(shown)}</div>"


def of_row(
    prompt: Any,
    columns: Mapping[str, Any],
    source: str,
    image_dir: str | Path | None,
) -> str:
    """Return the pictures of a file's prompt as HTML, see :func:`beside`.

    Args:
      prompt: as it stood in the file.
      columns: the row's others.
      source: the file.
      image_dir: where relative paths of pictures start; default beside the file.
    """
    row = {"prompt": prompt, **columns}
    if not has_pictures(row):
        return ""
    try:
        base = image_base(source, image_dir)
        return beside(parse_prompt(row, source, base).images)
    except UserError as error:
        return _missing(str(error))


def words(prompt: Any) -> str:
    """Return what a prompt says, with ``[picture]`` where it shows one.

    >>> words([{"role": "user", "content": [{"type": "image"},
    ...                                     {"type": "text", "text": "What?"}]}])
    'user: [picture] What?'
    """
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{turn.role}: {_said(turn)}" for turn in map(_turn, prompt))


def _turn(given: Message | Mapping[str, Any]) -> Message:
    return given if isinstance(given, Message) else Message(**given)


def _said(turn: Message) -> str:
    if not isinstance(turn.content, list):
        return turn.text
    pieces = [p.text if p.type == "text" else "[picture]" for p in turn.content]
    return " ".join(pieces)


def _image(number: int, picture: Picture) -> str:
    try:
        width, height = picture.size()
        url, *size = picture.thumbnail()
    except UserError as error:
        return _missing(str(error))
    shown = f"width='{size[0]}' height='{size[1]}'"
    told = f"picture {number}, {width} × {height} pixels"
    return f"<img src='{url}' {shown} alt='{told}'>"


def _missing(why: str) -> str:
    return f"<span class='mute'>a picture is not shown: {escape(why)}</span>"
