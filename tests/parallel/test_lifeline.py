"""The line between processes: broken by a death, not by an end."""

import socket
import subprocess
import sys
import threading

import pytest

from jaxalign.parallel import lifeline


ENDS = """
import os, sys
from jaxalign.parallel import lifeline
lifeline.watch(lifeline.connect(sys.argv[1]), lambda: os._exit(42))
sys.stdin.read(1)
if sys.argv[2] == "dies":
    os._exit(1)
"""


def start(listener: lifeline.Listener, how: str) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-c", ENDS, listener.place, how]
    return subprocess.Popen(command, stdin=subprocess.PIPE)


@pytest.mark.parametrize("how", ["dies", "ends"])
def test_a_death_is_heard_and_an_end_is_none(how: str) -> None:
    listener, lost = lifeline.Listener("127.0.0.1"), threading.Event()
    process = start(listener, how)
    lines = listener.accept(1)
    lifeline.watch(lines, lost.set)
    process.communicate(b"now")
    assert lost.wait(0.5) == (how == "dies")
    lines[0].close()


def test_who_has_no_token_holds_no_line() -> None:
    """A scanner of ports that comes and goes ends no run."""
    listener = lifeline.Listener("127.0.0.1")
    host, port, token = listener.place.split()
    with socket.create_connection((host, int(port))) as stranger:
        stranger.sendall(b"0" * len(token))
        found = lifeline.connect(listener.place)
        accepted = listener.accept(1)
        assert accepted[0].getpeername() == found[0].getsockname()
    for line in (*found, *accepted):
        line.close()


def test_nobody_there_is_no_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    assert lifeline.connect(f"127.0.0.1 {port} {'0' * 32}") == []
