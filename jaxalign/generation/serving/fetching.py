"""Fetching a picture for a client, and nothing that only this machine can reach.

Whoever may name a URL may otherwise read what lies behind a firewall: a cloud's
metadata, a database's page. So a host's addresses are looked up once, all of them have
to be public, and the connection goes to one that was checked; a redirect begins anew.
"""

import contextlib
import http.client
import ipaddress
import socket
import ssl
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from typing import Any

from jaxalign.errors import UserError


__all__ = ["MOST_BYTES", "SECONDS", "fetch", "is_public"]

MOST_BYTES = 20 * 10**6
"""Of a picture's file."""

SECONDS = 10.0
"""For all of a fetch, redirects included."""

_REDIRECTS = (301, 302, 303, 307, 308)
_MOST_REDIRECTS = 5
_NAT64 = ipaddress.ip_network("64:ff9b::/96"), ipaddress.ip_network("64:ff9b:1::/48")


def is_public(address: str) -> bool:
    """Tell whether an IP address is reached over the public internet alone.

    >>> [is_public(a) for a in ("93.184.216.34", "127.0.0.1", "169.254.169.254")]
    [True, False, False]
    >>> is_public("::ffff:10.0.0.1")
    False
    """
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(found, ipaddress.IPv6Address):
        # Those that hold another address, which a gateway on the way would go to.
        held = found.ipv4_mapped or found.sixtofour or found.teredo
        if held or any(found in network for network in _NAT64):
            return False
    return found.is_global and not found.is_multicast


def fetch(
    url: str,
    *,
    resolve: Callable[..., Any] = socket.getaddrinfo,
    connect: Callable[..., socket.socket] = socket.create_connection,
    most: int = MOST_BYTES,
    seconds: float = SECONDS,
) -> bytes:
    """Return what a GET of a URL gives.

    Args:
      url: ``http`` or ``https``; environment variables' proxies are not used.
      resolve: looks up a host, as ``socket.getaddrinfo``.
      connect: opens a connection to an address, as ``socket.create_connection``.
      most: bytes that are read.
      seconds: for all of it.
    Raises:
      UserError: another scheme, an address that is not public, an answer that is no
        200, too many bytes, or too long.
    """
    end = time.monotonic() + seconds
    for _ in range(_MOST_REDIRECTS + 1):
        try:
            answer = _get(url, resolve, connect, most, end)
            if time.monotonic() >= end:  # what there is may be cut off
                raise TimeoutError
        except UserError:
            raise
        except (OSError, http.client.HTTPException, ValueError) as error:
            if time.monotonic() >= end:
                raise UserError(f"fetching took above {seconds:g} seconds") from None
            raise UserError(f"it cannot be fetched: {type(error).__name__}") from None
        if isinstance(answer, bytes):
            return answer
        url = urllib.parse.urljoin(url, answer)
    raise UserError(f"more than {_MOST_REDIRECTS} redirects")


def _get(
    url: str,
    resolve: Callable[..., Any],
    connect: Callable[..., socket.socket],
    most: int,
    end: float,
) -> bytes | str:
    """Return the body of an answer, or where it redirects to."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError("expected a URL that begins with http:// or https://")
    if parts.username is not None or parts.password is not None:
        raise UserError("a URL with a user's name or password is not fetched")
    secure, host = parts.scheme == "https", parts.hostname
    port = parts.port or (443 if secure else 80)
    found = resolve(host, port, type=socket.SOCK_STREAM)
    addresses = [entry[4][0] for entry in found]
    if not addresses or not all(is_public(address) for address in addresses):
        raise UserError(f"the host {host[:80]!r} has an address that is not public")
    left = end - time.monotonic()
    if left <= 0:
        raise TimeoutError
    with connect((addresses[0], port), timeout=left) as plain, _ended(plain, left):
        line = plain
        if secure:
            line = ssl.create_default_context().wrap_socket(plain, server_hostname=host)
        connection = http.client.HTTPConnection(host, port)
        connection.sock = line  # made already, to the address that was checked
        path = urllib.parse.urlunsplit(("", "", parts.path or "/", parts.query, ""))
        headers = {"Accept": "image/*", "Accept-Encoding": "identity"}
        connection.request("GET", path, headers={**headers, "Connection": "close"})
        with contextlib.closing(connection.getresponse()) as answer:
            return _body(answer, most)


@contextlib.contextmanager
def _ended(line: socket.socket, seconds: float) -> Iterator[None]:
    """Cut a connection after some time, however often a byte of it still comes."""

    def cut() -> None:
        with contextlib.suppress(OSError):
            line.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(seconds, cut)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _body(answer: http.client.HTTPResponse, most: int) -> bytes | str:
    where = answer.getheader("Location")
    if answer.status in _REDIRECTS and where:
        return where
    if answer.status != 200:
        raise UserError(f"its server answered {answer.status}")
    told = answer.getheader("Content-Length") or "0"
    data = b""
    if not told.isdigit() or int(told) <= most:
        data = answer.read(most + 1)
    if not data or len(data) > most:
        raise UserError(f"expected a file of 1 to {most} bytes")
    if told.isdigit() and len(data) < int(told):
        raise http.client.IncompleteRead(data)
    return data
