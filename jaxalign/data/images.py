"""Images in requests: named by their content, loaded when they are sent.

A request holds a reference, ``sha256:`` and the digest of the file's bytes, in place of
an image. So a request's key hashes sixty-four characters, not megabytes, changes when
the picture does, and stays when the file moves. Who sends the request puts the bytes
in with :func:`loaded`.
"""

import base64
import hashlib
import os
import tempfile
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from jaxalign.data.picture import Picture
from jaxalign.errors import UserError


__all__ = ["NamedPictures", "checked", "loaded", "reference", "with_images"]

_SCHEME = "sha256:"
_MEDIA_TYPES = (
    (b"\x89PNG\r\n\x1a\n", "image/png"),
    (b"\xff\xd8\xff", "image/jpeg"),
    (b"GIF87a", "image/gif"),
    (b"GIF89a", "image/gif"),
)


def reference(data: bytes) -> str:
    """Return the reference to an image file with this content.

    >>> reference(b"")[:15]
    'sha256:e3b0c442'
    """
    return _SCHEME + hashlib.sha256(data).hexdigest()


class NamedPictures:
    """The pictures of some data by their references, read again when they are sent.

    It holds where each is and its digest. Encoded bytes that a row brought with it are
    put into one temporary file, so that memory does not grow with the pictures.

    >>> pictures = NamedPictures()
    >>> (name,) = pictures.references([Picture(b"the file", "line 1")])
    >>> pictures.load(name)
    b'the file'
    """

    def __init__(self) -> None:
        self._names: dict[Any, str] = {}
        self._places: dict[str, Picture | tuple[int, int]] = {}
        self._kept: Any = None

    def references(self, pictures: Iterable[Picture]) -> tuple[str, ...]:
        """Return the references of pictures, each of which is read once.

        Raises:
          UserError: one is not there; names the path tried.
        """
        return tuple(self._reference(picture) for picture in pictures)

    def _reference(self, picture: Picture) -> str:
        source = picture.source
        if isinstance(source, bytes):
            name = reference(source)
            if name not in self._places:
                self._places[name] = self._put(source)
            return name
        name = self._names.get(source)
        if name is None:
            name = self._names[source] = _SCHEME + picture.digest()
            self._places.setdefault(name, picture)
        return name

    def _put(self, data: bytes) -> tuple[int, int]:
        if self._kept is None:
            self._kept = tempfile.TemporaryFile(prefix="jaxalign-pictures-")
            weakref.finalize(self, self._kept.close)
        place = self._kept.seek(0, os.SEEK_END), len(data)
        self._kept.write(data)
        self._kept.flush()
        return place

    def picture(self, name: str) -> Picture:
        """Return the picture of a reference, not opened yet.

        Raises:
          UserError: it is none of these.
        """
        place = self._places.get(name)
        return place if isinstance(place, Picture) else Picture(self.load(name), name)

    def load(self, name: str) -> bytes:
        """Return the bytes of a picture as they are now.

        Raises:
          UserError: it is none of these, or is not there any more.
        """
        place = self._places.get(name)
        if place is None:
            raise UserError(
                f"a request shows the image {name}, which is none of the pictures that "
                "were read: make requests and load_image of the same NamedPictures"
            )
        if isinstance(place, Picture):
            return place.read()
        start, length = place
        return os.pread(self._kept.fileno(), length, start)


def with_images(
    message: Mapping[str, Any], references: Sequence[str]
) -> Mapping[str, Any]:
    """Return a message whose text is followed by images, as OpenAI content parts.

    Without images the message stays as it is: its content a plain text.
    """
    if not references:
        return message
    parts: list[Mapping[str, Any]] = [{"type": "text", "text": message["content"]}]
    parts += [{"type": "image_url", "image_url": {"url": r}} for r in references]
    return {**message, "content": parts}


def loaded(
    messages: Sequence[Mapping[str, Any]], load: Callable[[str], bytes] | None
) -> list[dict[str, Any]]:
    """Return messages with every reference replaced by a data URL of its image.

    Args:
      messages: those of a request.
      load: gives the bytes of the image that a reference names.
    Raises:
      UserError: the bytes are not those that the reference names, or no PNG, JPEG,
        GIF or WebP.
    """

    def part(given: Mapping[str, Any]) -> Mapping[str, Any]:
        url = given["image_url"]["url"] if given["type"] == "image_url" else ""
        if not url.startswith(_SCHEME):
            return given
        return {
            "type": "image_url",
            "image_url": {"url": _data_url(url, checked(url, load))},
        }

    return [
        {**m, "content": [part(p) for p in m["content"]]}
        if not isinstance(m["content"], str)
        else dict(m)
        for m in messages
    ]


def checked(name: str, load: Callable[[str], bytes] | None) -> bytes:
    """Return the bytes of the image that a reference names.

    Raises:
      UserError: nothing loads images, or the bytes are others.
    """
    if load is None:
        raise UserError(
            "a request shows images, but the judge was not told where they are: give "
            "make_judge a load_image"
        )
    data = load(name)
    if reference(data) != name:
        raise UserError(
            f"an image is not what it was when its prompt was read: expected {name}, "
            f"got {reference(data)}. Put the file back, or start again"
        )
    return data


def _data_url(name: str, data: bytes) -> str:
    webp = data[:4] == b"RIFF" and data[8:12] == b"WEBP"
    kinds = ["image/webp"] if webp else []
    kinds += [kind for magic, kind in _MEDIA_TYPES if data.startswith(magic)]
    if not kinds:
        raise UserError(
            f"the image {name} is none that a judge reads: expected PNG, JPEG, GIF or "
            f"WebP, got {len(data)} bytes that begin with {data[:8]!r}. Convert it"
        )
    return f"data:{kinds[0]};base64,{base64.b64encode(data).decode('ascii')}"
