"""Images in requests: named by their content, loaded when they are sent.

A request holds a reference, ``sha256:`` and the digest of the file's bytes, in place of
an image. So a request's key hashes sixty-four characters, not megabytes, changes when
the picture does, and stays when the file moves. Who sends the request puts the bytes
in with :func:`loaded`.
"""

import base64
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxalign.errors import UserError


__all__ = ["loaded", "reference", "with_images"]

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
    messages: Sequence[Mapping[str, Any]], load: Callable[[str], bytes]
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
        return {"type": "image_url", "image_url": {"url": _data_url(url, load(url))}}

    return [
        {**m, "content": [part(p) for p in m["content"]]}
        if not isinstance(m["content"], str)
        else dict(m)
        for m in messages
    ]


def _data_url(name: str, data: bytes) -> str:
    if reference(data) != name:
        raise UserError(
            f"an image is not what it was when its prompt was read: expected {name}, "
            f"got {reference(data)}. Put the file back, or start again"
        )
    webp = data[:4] == b"RIFF" and data[8:12] == b"WEBP"
    kinds = ["image/webp"] if webp else []
    kinds += [kind for magic, kind in _MEDIA_TYPES if data.startswith(magic)]
    if not kinds:
        raise UserError(
            f"the image {name} is none that a judge reads: expected PNG, JPEG, GIF or "
            f"WebP, got {len(data)} bytes that begin with {data[:8]!r}. Convert it"
        )
    return f"data:{kinds[0]};base64,{base64.b64encode(data).decode('ascii')}"
