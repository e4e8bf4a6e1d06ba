"""RLAIF-V: questions about images with a trusted and a less trusted answer.

https://huggingface.co/datasets/openbmb/RLAIF-V-Dataset. Columns: ``image`` ({bytes,
path}), ``question, chosen, rejected``, and ``origin_dataset, origin_split, idx,
image_path``, which say where a row is from.
"""

import io
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from jaxalign.data.layouts.foreign import (
    Converted,
    Dropped,
    Row,
    text,
    user_turn,
)
from jaxalign.data.picture import Stretch
from jaxalign.errors import UserError


__all__ = ["ORIGIN", "convert", "record"]

ORIGIN = ("ds_name", "origin_dataset", "origin_split", "idx", "image_path")
"""Columns that are kept, as texts."""


def record(row: Mapping[str, Any], where: str = "row") -> dict[str, Any] | Dropped:
    """Make a feedback record of a row.

    ``images`` holds one image as it is in the row: encoded bytes, or else its path.
    There are no segments: the data set scores whole answers.

    Returns:
      The record, or why there is none: equal answers.
    Raises:
      UserError: a column is missing or not of its kind, or the bytes are no image.
    """
    chosen, rejected = text(row, "chosen", where), text(row, "rejected", where)
    made: dict[str, Any] = {
        "prompt": [user_turn(text(row, "question", where))],
        "images": [_image(row, where)],
        "chosen": chosen,
        "rejected": rejected,
    }
    for name in ORIGIN:
        if row.get(name) is not None:
            made[name] = str(row[name])
    return Dropped("equal responses") if chosen == rejected else made


def convert(rows: Iterable[Row]) -> Iterator[Converted]:
    """Convert row by row."""
    for row, where in rows:
        yield Converted(record(row, where), where)


def _image(row: Mapping[str, Any], where: str) -> bytes | str | Stretch:
    image = row.get("image")
    if isinstance(image, Mapping):
        image = image.get("bytes") or image.get("path")
    if image is None:
        image = row.get("image_path")
    if isinstance(image, bytes):
        _check_image(image, where)
    elif not isinstance(image, str | Stretch) or not image:
        raise UserError(
            f"{where}: field image: expected {{bytes, path}}, bytes or a path, or a "
            f"path in image_path: got {type(image).__name__}"
        )
    return image


def _check_image(image: bytes, where: str) -> None:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(image)):
            pass  # reads the header alone
    except OSError:
        raise UserError(
            f"{where}: field image: {len(image)} bytes that Pillow does not know as an "
            "image. Expected an encoded image, such as PNG or JPEG"
        ) from None
