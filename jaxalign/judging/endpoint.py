"""Where an endpoint is, and the key that goes there and nowhere else."""

import ipaddress
import json
import os
import urllib.parse
import urllib.request
from typing import Any, NamedTuple

from jaxalign.errors import UserError


__all__ = [
    "OPENAI",
    "Key",
    "check_base_url",
    "holds_key",
    "is_own",
    "proxy_for",
    "read_key",
    "without_key",
    "without_secrets",
]

OPENAI = "https://api.openai.com/v1"
_NO_KEY = "none"  # the client insists on one
_SHORTEST_SECRET = 7
_SECRETS = ("KEY", "TOKEN", "SECRET", "PASSWORD")
"""How variables are named that hold what nobody is to see."""


class Key(NamedTuple):
    """What an endpoint asks for, and where it came from."""

    value: str
    variable: str
    """Of the environment; it stands for the key in what is shown and kept."""

    def __repr__(self) -> str:
        """Show the variable, never the key."""
        return f"Key({self.variable})"


def check_base_url(url: str) -> str:
    """Return the URL without a slash at its end.

    Raises:
      UserError: it is no http(s) URL, names a route, or holds a secret.
    """
    expected = "expected one such as http://localhost:8000/v1"
    try:
        parts = urllib.parse.urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise UserError(f"judge.base_url is no URL ({error}): {expected}") from None
    if parts.username is not None or parts.password is not None or "@" in parts.netloc:
        raise UserError(
            "judge.base_url holds a user name or password, which would end up in files "
            "and logs: take it out. A key goes into the variable that "
            "judge.key_variable names"
        )
    if parts.query or parts.fragment:
        raise UserError(
            "judge.base_url has a query or fragment (?... or #...), which may hold a "
            f"secret and is not passed on: {expected}"
        )
    if parts.scheme not in ("http", "https") or not host:
        raise UserError(f"judge.base_url is no http(s) URL: got {url!r}; {expected}")
    try:
        host.encode("idna")
    except UnicodeError as error:
        raise UserError(f"judge.base_url has no host's name: {error}") from None
    path = parts.path.rstrip("/")
    if path.endswith(("/completions", "/responses", "/models")):
        raise UserError(
            f"judge.base_url names a route: got {url!r}; give it up to and with /v1"
        )
    if any(c.isspace() or not c.isprintable() for c in url):
        raise UserError(f"judge.base_url holds blanks: got {url!r}; {expected}")
    return f"{parts.scheme}://{parts.netloc}{path}"


def is_own(url: str) -> bool:
    """Tell whether a URL is of this machine or a private network.

    That is: a loopback or private address, ``localhost``, or a name without a dot.

    >>> [is_own(f"http://{h}:80/v1") for h in ("127.0.0.1", "[::1]", "gpu7", "a.com")]
    [True, True, True, False]
    """
    host = urllib.parse.urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_private
    except ValueError:
        return "." not in host or host.endswith((".localhost", ".local", ".internal"))


def read_key(url: str, variable: str) -> Key:
    """Return the key from the environment; a placeholder for a server of one's own.

    Args:
      url: of the endpoint.
      variable: that holds the key.
    Raises:
      UserError: it is missing, cannot be sent, or would travel in the clear.
    """
    value = os.environ.get(variable, "").strip()
    if not value:
        if is_own(url):
            return Key(_NO_KEY, variable)
        raise UserError(
            f"the environment variable {variable} is not set: the judge at {url} "
            "needs a key (judge.key_variable names the variable)"
        )
    if not all(33 <= ord(c) <= 126 for c in value):
        raise UserError(
            f"{variable} holds blanks or characters that no key has: set it again"
        )
    if url.startswith("http://") and not is_own(url):
        raise UserError(
            f"judge.base_url {url} would send the key unencrypted over the internet: "
            "use https"
        )
    return Key(value, variable)


def without_key(text: str, key: Key) -> str:
    """Return a text from the endpoint without the key, should it hold it.

    What servers of one's own are given for a key (EMPTY, token, x) is no secret, and
    may be a word of the reply.
    """
    if len(key.value) < _SHORTEST_SECRET:
        return text
    return text.replace(key.value, f"[{key.variable}]")


def without_secrets(text: str) -> str:
    """Return a text without what variables of the environment hold for keys.

    For what programs say that know keys of their own: an error may quote the request.
    """
    for name, value in os.environ.items():
        if name.upper().endswith(_SECRETS):
            text = without_key(text, Key(value.strip(), name))
    return text


def holds_key(value: Any, key: Key) -> bool:
    """Tell whether a JSON value has the key in one of its texts."""
    shown = json.dumps(value, ensure_ascii=False)
    return without_key(shown, key) != shown


def proxy_for(url: str) -> str | None:
    """Return the proxy that the environment sets for a URL; none for this machine.

    Raises:
      UserError: it is of a kind that is not supported.

    >>> proxy_for("http://127.0.0.1:8000/v1") is None
    True
    """
    parts = urllib.parse.urlsplit(url)
    host = parts.hostname or ""
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = host == "localhost"
    if loopback or urllib.request.proxy_bypass(host):
        return None
    proxy = urllib.request.getproxies().get(parts.scheme)
    if proxy is None:
        return None
    kind, found, _ = proxy.partition("://")
    if found and kind not in ("http", "https"):
        raise UserError(
            f"the environment's {parts.scheme}_proxy is of the kind {kind}: only http "
            f"and https are supported. Unset it, or put {host} into no_proxy"
        )
    return proxy if found else f"http://{proxy}"
