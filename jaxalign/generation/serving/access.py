"""Who may ask: whoever has the key, which never is on the command line or in a log."""

import hmac
import json
import os
from pathlib import Path
from typing import Any

from jaxalign.errors import UserError
from jaxalign.generation.serving.api_error import ApiError


__all__ = ["KEY_VARIABLE", "KeyRequired", "check_origins", "read_key"]

KEY_VARIABLE = "JAXALIGN_API_KEY"
"""The environment variable that holds the key where no file does."""

_OPEN = "/health"


def read_key(path: str | None) -> str | None:
    """Return the key that requests must have, None where they need none.

    Args:
      path: file that holds it; default it is in the environment variable
        JAXALIGN_API_KEY, if that is there.
    Raises:
      UserError: the file cannot be read, or the key is empty or cannot be sent.
    """
    if path is None:
        key, where = os.environ.get(KEY_VARIABLE), KEY_VARIABLE
        if key is None:
            return None
        cure = "unset it to serve without a key"
    else:
        where, cure = f"--api_key_file {path}", "leave it out to serve without a key"
        try:
            key = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is no text"
            raise UserError(f"{where} cannot be read: {reason}") from None
    key = key.strip()
    if not key:
        raise UserError(f"{where} is empty: expected a key, or {cure}")
    if not all("!" <= character <= "~" for character in key):
        raise UserError(
            f"{where} holds no key that can be sent: expected one line of printable "
            "ASCII characters without spaces"
        )
    return key


def check_origins(origins: tuple[str, ...]) -> None:
    """Refuse origins that no browser would ever send.

    Raises:
      UserError: one is neither ``scheme://host[:port]`` nor ``*``.
    """
    for origin in origins:
        scheme, mark, host = origin.partition("://")
        if origin != "*" and not (scheme and mark and host and "/" not in host):
            raise UserError(
                "allowed_origins must hold origins as browsers send them, "
                f"'https://host' or 'https://host:port', or '*': got {origin!r}"
            )


class KeyRequired:
    """An ASGI application in front of another: 401 without the key.

    Args:
      app: what is behind it.
      key: what ``Authorization: Bearer`` must give; ``/health`` is open to all.
    """

    def __init__(self, app: Any, key: str):
        self._app, self._key = app, key.encode()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass a request on, or answer it."""
        if scope["type"] != "http" or scope["path"] == _OPEN:
            await self._app(scope, receive, send)
            return
        found = [value for name, value in scope["headers"] if name == b"authorization"]
        scheme, _, given = (found[0] if len(found) == 1 else b"").partition(b" ")
        is_right = hmac.compare_digest(given.strip(), self._key)
        if scheme.lower() == b"bearer" and is_right:
            await self._app(scope, receive, send)
            return
        told = "no API key was given" if not found else "the API key is not right"
        error = ApiError(
            f"{told}: expected the header Authorization: Bearer KEY",
            status=401,
            code="invalid_api_key",
        )
        body = json.dumps(error.body).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"www-authenticate", b"Bearer"),
        ]
        start = {"type": "http.response.start", "status": 401, "headers": headers}
        await send(start)
        await send({"type": "http.response.body", "body": body})
