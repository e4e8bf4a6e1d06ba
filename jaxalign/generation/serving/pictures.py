"""Pictures that messages name: in data URLs, in files of one folder, at URLs."""

import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from jaxalign.data.messages import ImagePart, Message
from jaxalign.data.picture import Picture
from jaxalign.data.record_images import as_picture
from jaxalign.data.records import Prompt
from jaxalign.errors import UserError
from jaxalign.generation.serving.api_error import ApiError


__all__ = ["Sources", "has_pictures", "looked_up"]


class Sources(NamedTuple):
    """Where pictures may be."""

    image_dir: Path | None = None
    """Files below it are read."""
    fetch: Callable[[str], bytes] | None = None
    """Gives what is at a URL; None: nothing is fetched."""


def has_pictures(prompt: Prompt) -> bool:
    """Tell whether a conversation of a request shows pictures."""
    return any(True for _ in _parts(prompt))


def looked_up(prompt: Prompt, sources: Sources, *, sees: bool) -> Prompt:
    """Return a request's conversation with its pictures, which may take a while.

    Args:
      prompt: its image parts name where their pictures are.
      sources: where these may be.
      sees: whether the model does.
    Raises:
      ApiError: 400, the model does not see, or a picture may not be read or cannot.
    """
    pictures = []
    for field, part in _parts(prompt):
        if not sees:
            raise ApiError(
                f"{field}: the model takes texts only: it does not see pictures. Leave "
                "them out, or ask a vision-language model",
                param=field,
            )
        pictures.append(_picture(part.image, field, sources))
    if not pictures:
        return prompt
    assert not isinstance(prompt.text, str)
    turns = tuple(_bare(turn) for turn in prompt.text)
    return prompt._replace(text=turns, images=tuple(pictures))


def _parts(prompt: Prompt) -> Iterator[tuple[str, ImagePart]]:
    """Yield the image parts with the name of their field."""
    if isinstance(prompt.text, str):
        return
    for i, turn in enumerate(prompt.text):
        parts = turn.content if isinstance(turn.content, list) else ()
        for j, part in enumerate(parts):
            if isinstance(part, ImagePart):
                yield f"messages[{i}].content[{j}].image_url.url", part


def _bare(turn: Message) -> Message:
    """Return a turn whose image parts carry nothing."""
    if not isinstance(turn.content, list):
        return turn
    image = ImagePart(type="image")
    parts = [image if isinstance(part, ImagePart) else part for part in turn.content]
    return turn.model_copy(update={"content": parts})


def _picture(url: str, field: str, sources: Sources) -> Picture:
    try:
        scheme = urllib.parse.urlsplit(url).scheme
        if scheme == "data":
            picture = as_picture(url, field, None)
        elif scheme in ("http", "https"):
            picture = Picture(_fetched(url, sources), field)
        else:
            picture = Picture(_file(url, sources), field)
        picture.size()
    except (UserError, ValueError) as error:
        text = str(error)
        shown = text if text.startswith(field) else f"{field}: {text}"
        raise ApiError(shown, param=field, code="invalid_image_url") from None
    return picture


def _fetched(url: str, sources: Sources) -> bytes:
    if sources.fetch is None:
        raise UserError(
            "this server fetches no pictures: send the file as a data URL "
            "(data:image/png;base64,...), or serve with --fetch_images true"
        )
    return sources.fetch(url)


def _file(url: str, sources: Sources) -> Path:
    """Return a file that is below the folder, links followed."""
    folder = sources.image_dir
    if folder is None:
        raise UserError(
            "expected a data URL (data:image/png;base64,...): this server reads no "
            "files, as it was started without --image_dir"
        )
    given = url
    if url.startswith("file://"):
        given = urllib.parse.unquote(urllib.parse.urlsplit(url).path)
    if not given or "\0" in given or "://" in given:
        raise UserError("expected a data URL, or the path of a file")
    folder = folder.resolve()
    path = (folder / given).resolve()
    # Of a file elsewhere it is not even said whether it is there.
    if not path.is_relative_to(folder) or not path.is_file():
        raise UserError("no such file below the folder of pictures (--image_dir)")
    return path
