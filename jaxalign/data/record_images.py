"""The pictures of a row: what may stand for one, and which part of a turn shows it.

``images`` is a list, ``image`` one alone. A picture is a path, encoded bytes, a data
URL, ``{"bytes": ..., "path": ...}`` as ``datasets`` has an Image column, a
``PIL.Image`` or an array of uint8 (rows, columns, channels). Relative paths start at
``image_dir``.

In a conversation each picture has a part ``{"type": "image"}`` of some turn's content,
the k-th picture the k-th part. Where no part is an image, all stand before the text of
the first user turn, as TRL has it. In place of the column, parts may carry their own:
``{"type": "image", "image": ...}``, or OpenAI's
``{"type": "image_url", "image_url": {"url": ...}}``. A plain text holds placeholders
of the checkpoint's family, which are counted where the text is rendered.
"""

import base64
import binascii
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxalign.data.columns import Rendered, shown
from jaxalign.data.messages import ImagePart, Message, TextPart
from jaxalign.data.picture import Picture, Stretch
from jaxalign.errors import UserError


__all__ = [
    "COLUMNS",
    "as_json",
    "as_picture",
    "has_pictures",
    "placed",
    "refuse_image_parts",
]

COLUMNS = ("images", "image")
"""Columns that have a row's pictures."""

Turns = tuple[Message, ...]


def placed(
    columns: Rendered, where: str, image_dir: Path | None
) -> tuple[str | Turns, tuple[Picture, ...]]:
    """Return a row's prompt with an image part for each picture, and the pictures.

    Args:
      columns: the row's.
      where: its file and line, for messages.
      image_dir: where relative paths start; None where there is no such directory.
    Raises:
      UserError: a picture is none of what may stand for one, or parts and pictures
        are not equally many.
    """
    listed = _listed(columns, where)
    prompt = columns.prompt
    if isinstance(prompt, str):
        return prompt, _pictures(listed, where, image_dir)
    parts = _image_parts(prompt)
    own = {place: part.image for place, part in parts.items() if part.image is not None}
    if own:
        if listed:
            raise UserError(
                f"{where}: field prompt{next(iter(own))} has a picture of its own, and "
                "so has the field images: which comes first cannot be told. Put all "
                'into images and leave {"type": "image"} in their places, or all into '
                "parts"
            )
        if len(own) < len(parts):
            bare = next(place for place in parts if place not in own)
            raise UserError(
                f"{where}: field prompt{bare}: an image part without its picture, "
                "where others have theirs. Give all parts their picture, or none"
            )
        listed = {f"prompt{place}": image for place, image in own.items()}
    elif not parts and listed:
        return _before_text(prompt, len(listed), where), _pictures(
            listed, where, image_dir
        )
    elif len(parts) != len(listed):
        raise UserError(
            f"{where}: field images: expected one picture for each of the prompt's "
            f"{len(parts)} image part(s): got {len(listed)}. Give as many, or take "
            "the parts out: the pictures then stand before the first user turn's text"
        )
    pictures = _pictures(listed, where, image_dir)
    return tuple(_bare(turn) for turn in prompt), pictures


def has_pictures(row: Mapping[str, Any]) -> bool:
    """Tell whether a row that was read before shows a picture.

    >>> has_pictures({"prompt": "?", "images": []}), has_pictures({"image": "a.png"})
    (False, True)
    """
    if row.get("image") is not None or len(row.get("images") or ()):
        return True
    prompt = row.get("prompt") or ""
    contents = () if isinstance(prompt, str) else (t.get("content") for t in prompt)
    return any(
        part.get("type") in ("image", "image_url")
        for content in contents
        if isinstance(content, list)
        for part in content
    )


def refuse_image_parts(turns: Sequence[Message], field: str, where: str) -> None:
    """Refuse pictures in a completion.

    Raises:
      UserError: with the part.
    """
    for place in _image_parts(turns):
        raise UserError(
            f"{where}: field {field}{place}: a completion shows no pictures: a model "
            "that sees is taught to write text, and what it looks at is the prompt's. "
            "Put the picture into prompt, or leave the record out"
        )


def as_picture(value: Any, where: str, image_dir: Path | None) -> Picture:
    """Return what stands for a picture as one, without opening it.

    Args:
      value: see the module's text.
      where: file, line and field, for messages.
      image_dir: see :func:`placed`.
    Raises:
      UserError: it is nothing that stands for one.
    Example:
      >>> as_picture("cat.png", "f.jsonl:1: field images[0]", Path("data")).source.name
      'cat.png'
    """
    match value:
        case Picture():
            return value
        case Mapping() if value.get("bytes") is not None:
            return as_picture(value["bytes"], where, image_dir)
        case Mapping() if value.get("path") is not None:
            return as_picture(value["path"], where, image_dir)
        case bytes() | bytearray() | memoryview():
            return Picture(bytes(value), where)
        case Stretch():
            return Picture(value, where)
        case str() if value[:5].lower() == "data:":
            return Picture(_from_data_url(value, where), where)
        case str() | Path():
            return Picture(_path(str(value), where, image_dir), where)
        case _ if hasattr(value, "getexif"):
            return Picture(_encoded(value, where), where)
        case _ if hasattr(value, "__array__"):
            return Picture(_encoded(_of_array(np.asarray(value), where), where), where)
    raise UserError(f"{where}: expected {_PICTURE}: got {shown(value)}")


def as_json(value: Any) -> str:
    """Return a picture that JSON cannot hold as a data URL, for ``json.dumps``.

    Raises:
      TypeError: it is none, as ``json.dumps`` says of what it cannot write.
    """
    try:
        picture = as_picture(value, "a picture", Path())
        if isinstance(picture.source, Path):
            return str(value)
        return picture.data_url()
    except UserError as error:
        raise TypeError(str(error)) from None


_PICTURE = (
    "a path, encoded bytes (PNG, JPEG ...), a data URL, {bytes, path}, a PIL.Image or "
    "an array of uint8 (rows, columns, 1, 3 or 4 channels)"
)


def _listed(columns: Rendered, where: str) -> dict[str, Any]:
    """Return what the columns list, by the name of its field."""
    images, image = columns.images, columns.image
    if image is not None and images is not None and len(images):
        raise UserError(
            f"{where}: fields image and images: expected one of them. Put all pictures "
            "into images"
        )
    if image is not None:
        return {"image": image}
    if images is None:
        return {}
    if isinstance(images, np.ndarray) and (images.ndim == 4 or images.dtype.hasobject):
        images = list(images)
    if not isinstance(images, list | tuple):
        raise UserError(
            f"{where}: field images: expected a list of pictures: got {shown(images)}. "
            "One picture alone is given as [picture], or in the field image"
        )
    return {f"images[{i}]": value for i, value in enumerate(images)}


def _pictures(
    listed: Mapping[str, Any], where: str, image_dir: Path | None
) -> tuple[Picture, ...]:
    return tuple(
        as_picture(value, f"{where}: field {name}", image_dir)
        for name, value in listed.items()
    )


def _image_parts(turns: Sequence[Message]) -> dict[str, ImagePart]:
    return {
        f"[{i}].content[{j}]": part
        for i, turn in enumerate(turns)
        if isinstance(turn.content, list)
        for j, part in enumerate(turn.content)
        if isinstance(part, ImagePart)
    }


def _bare(turn: Message) -> Message:
    """Return a turn whose image parts carry nothing."""
    if not any(place for place in _image_parts([turn])):
        return turn
    assert isinstance(turn.content, list)
    parts = [IMAGE if isinstance(part, ImagePart) else part for part in turn.content]
    return turn.model_copy(update={"content": parts})


IMAGE = ImagePart(type="image")


def _before_text(prompt: Sequence[Message], count: int, where: str) -> Turns:
    """Put image parts before the text of the first user turn."""
    for i, turn in enumerate(prompt):
        if turn.role == "user":
            text = turn.content
            if not isinstance(text, list):
                text = [TextPart(type="text", text=text)] if text else []
            content = [*[IMAGE] * count, *text]
            shows = turn.model_copy(update={"content": content})
            return (*prompt[:i], shows, *prompt[i + 1 :])
    raise UserError(
        f"{where}: field images: {count} picture(s), but the prompt has no user turn "
        'to show them. Add one, or put {"type": "image"} into another turn\'s content'
    )


def _path(given: str, where: str, image_dir: Path | None) -> Path:
    if not given or "\0" in given:
        raise UserError(f"{where}: not a path: {given[:80]!r}. Expected {_PICTURE}")
    scheme = given.partition("://")[0]
    if scheme != given and scheme.isalnum():
        raise UserError(
            f"{where}: {given[:80]!r} is not read: pictures are not fetched from "
            f"elsewhere. Save the picture and give its path. Expected {_PICTURE}"
        )
    path = Path(given)
    if not path.is_absolute() and image_dir is None:
        raise UserError(
            f"{where}: {given[:200]!r} is a relative path, and there is no data file "
            "beside which it could lie. Say where pictures are with --image_dir DIR"
        )
    return path if image_dir is None else image_dir.absolute() / path


def _from_data_url(url: str, where: str) -> bytes:
    head, comma, data = url.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise UserError(
            f"{where}: a data URL that begins with {head[:40]!r}: expected "
            "data:image/png;base64,..."
        )
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise UserError(
            f"{where}: a data URL that is no base64: {error}. Encode the file's bytes "
            "with base64.b64encode"
        ) from None


def _of_array(array: np.ndarray, where: str) -> Any:
    from PIL import Image

    flat = array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array
    channels = flat.shape[2] if flat.ndim == 3 else 1
    if (
        array.dtype != np.uint8
        or flat.ndim not in (2, 3)
        or channels not in (1, 3, 4)
        or not array.size
    ):
        raise UserError(
            f"{where}: expected an array of uint8 (rows, columns, 1, 3 or 4 channels): "
            f"got {array.dtype} {array.shape}. Scale the values to 0..255, and put "
            "the channels last"
        )
    return Image.fromarray(np.ascontiguousarray(flat))


def _encoded(image: Any, where: str) -> bytes:
    """Return an opened picture as PNG, which loses nothing of it."""
    file = io.BytesIO()
    if image.mode in ("F", "I"):
        raise UserError(
            f"{where}: an image of mode {image.mode}, whose range is not known. Scale "
            "the values to 0..255 and convert it to mode L"
        )
    try:
        if image.mode not in _PNG_MODES:
            image = image.convert("RGBA" if image.has_transparency_data else "RGB")
        image.save(file, "PNG", compress_level=1, exif=image.getexif())
    except Exception as error:  # the file that it is read from may be broken
        raise UserError(
            f"{where}: {image!r:.80} cannot be read: {type(error).__name__}: {error}. "
            "Give its file"
        ) from None
    return file.getvalue()


_PNG_MODES = {"1", "L", "LA", "P", "RGB", "RGBA", "I;16"}
