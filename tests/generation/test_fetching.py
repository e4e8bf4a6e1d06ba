"""Pictures at URLs: from public addresses alone, whoever redirects where."""

import contextlib
import http.server
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from jaxalign.errors import UserError
from jaxalign.generation.serving.fetching import fetch, is_public


PUBLIC, OTHER = "93.184.216.34", "1.1.1.1"


class _Handler(http.server.BaseHTTPRequestHandler):
    """Answers by the path: as many bytes as it says, or a redirect."""

    def do_GET(self) -> None:
        kind, _, value = self.path.strip("/").partition("/")
        self.server.asked.append((self.headers["Host"], self.path))  # pyright: ignore
        if kind == "to":
            self.send_response(302)
            self.send_header("Location", value)
            self.end_headers()
        elif kind == "status":
            self.send_response(int(value))
            self.end_headers()
        elif kind == "drip":
            self.send_response(200)
            self.end_headers()
            with contextlib.suppress(OSError):
                while not self.server.closing.wait(0.02):  # pyright: ignore
                    self.wfile.write(b"x")
        else:
            self.send_response(200)
            if kind == "bytes":
                self.send_header("Content-Length", value)
            self.end_headers()
            with contextlib.suppress(OSError):
                self.wfile.write(b"x" * int(value))

    def log_message(self, format: str, *args: Any) -> None:
        pass


class Web:
    """One real server, which all public addresses lead to, and a resolver of names."""

    def __init__(self, server: Any):
        self.server, self.connected = server, []
        self.names = {"a.test": [PUBLIC], "b.test": [OTHER]}

    def resolve(self, host: str, port: int, **_: Any) -> list[Any]:
        if host not in self.names and not host.replace(".", "").isdigit():
            raise socket.gaierror("unknown")
        kind = socket.SOCK_STREAM
        found = self.names.get(host, [host])
        return [(socket.AF_INET, kind, 6, "", (ip, port)) for ip in found]

    def connect(self, address: tuple[str, int], timeout: float) -> socket.socket:
        self.connected.append(address)
        return socket.create_connection(self.server.server_address, timeout=timeout)

    def get(self, url: str, **options: Any) -> bytes:
        return fetch(url, resolve=self.resolve, connect=self.connect, **options)


@pytest.fixture
def web() -> Iterator[Web]:
    server: Any = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.asked, server.closing = [], threading.Event()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield Web(server)
    server.closing.set()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize(
    ("address", "public"),
    [
        *((ip, True) for ip in (PUBLIC, OTHER, "2606:2800:220:1:248:1893:25c8:1946")),
        *((ip, False) for ip in ("127.0.0.1", "10.1.2.3", "192.168.0.1", "172.16.9.9")),
        *((ip, False) for ip in ("169.254.169.254", "0.0.0.0", "100.64.0.1")),
        *((ip, False) for ip in ("224.0.0.1", "255.255.255.255", "192.0.2.1")),
        *((ip, False) for ip in ("::1", "::", "fe80::1", "fe80::1%eth0", "fc00::1")),
        *((ip, False) for ip in ("::ffff:127.0.0.1", "::ffff:93.184.216.34")),
        *((ip, False) for ip in ("64:ff9b::7f00:1", "2002:7f00:1::", "ff02::1")),
        *((ip, False) for ip in ("2001:0:4136:e378:8000:63bf:3fff:fdd2", "localhost")),
    ],
)
def test_what_is_public(address, public) -> None:
    assert is_public(address) == public


def test_it_connects_to_the_address_that_was_checked(web) -> None:
    assert web.get("http://a.test/bytes/70") == b"x" * 70
    assert web.connected == [(PUBLIC, 80)]
    assert web.server.asked == [("a.test", "/bytes/70")]


def test_redirects_are_followed_and_each_is_checked(web) -> None:
    assert len(web.get("http://a.test:8080/to/http://b.test/bytes/9")) == 9
    assert web.connected == [(PUBLIC, 8080), (OTHER, 80)]
    with pytest.raises(UserError, match="more than 5 redirects"):
        web.get("http://a.test/to/" * 8 + "http://a.test/bytes/9")


@pytest.mark.parametrize(
    ("url", "match", "connections"),
    [
        ("http://127.0.0.1/bytes/9", "'127.0.0.1' has an address that is not pub", 0),
        ("http://local.test/bytes/9", "'local.test' has an address that is not", 0),
        ("http://both.test/bytes/9", "'both.test' has an address that is not", 0),
        ("http://meta.test/latest", "has an address that is not public", 0),
        ("http://a.test/to/http://127.0.0.1/", "has an address that is not public", 1),
        ("http://a.test/to/http://meta.test/", "has an address that is not public", 1),
        ("http://a.test/to/file:///etc/passwd", "begins with http:// or https://", 1),
        ("http://a.test/to/gopher://a.test/", "begins with http:// or https://", 1),
        ("http://me:secret@a.test/bytes/9", "user's name or password", 0),
        ("ftp://a.test/x", "begins with http:// or https://", 0),
        ("http:///x", "begins with http:// or https://", 0),
        ("http://nowhere.test/x", "it cannot be fetched: gaierror", 0),
        ("http://a.test:99999/x", "it cannot be fetched: ValueError", 0),
        ("http://a.test/status/404", "its server answered 404", 1),
        ("http://a.test/bytes/0", "expected a file of 1 to 100 bytes", 1),
        ("http://a.test/bytes/101", "expected a file of 1 to 100 bytes", 1),
        ("http://a.test/untold/101", "expected a file of 1 to 100 bytes", 1),
    ],
)
def test_what_is_refused(web, url, match, connections) -> None:
    web.names |= {
        "local.test": ["::ffff:127.0.0.1"],
        "both.test": [PUBLIC, "10.0.0.1"],
        "meta.test": ["169.254.169.254"],
    }
    with pytest.raises(UserError, match=match):
        web.get(url, most=100)
    assert len(web.connected) == connections


def test_a_name_is_looked_up_once(web) -> None:
    """One that changes its address between check and connection gains nothing."""
    answers = iter([[PUBLIC], ["127.0.0.1"]])

    def resolve(host: str, port: int, **_: Any) -> list[Any]:
        kind = socket.SOCK_STREAM
        return [(socket.AF_INET, kind, 6, "", (ip, port)) for ip in next(answers)]

    assert fetch("http://c.test/bytes/5", resolve=resolve, connect=web.connect)
    assert web.connected == [(PUBLIC, 80)]


def test_a_byte_now_and_then_does_not_go_on_for_ever(web) -> None:
    with pytest.raises(UserError, match=r"took above 0.2 seconds"):
        web.get("http://a.test/drip", seconds=0.2)
