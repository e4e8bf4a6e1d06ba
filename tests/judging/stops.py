"""Commands that are stopped while they ask a judge: by a kill, by a full disk."""

import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


__all__ = ["kill_when", "program", "replies_in", "start"]


def program(*arguments: str, file_bytes: int | None = None) -> list[str]:
    """Return a command of jaxalign as a program, whose files may not grow beyond this.

    The limit is set by the program itself: ``preexec_fn`` would fork this process, and
    JAX, which has threads, warns of that.
    """
    limit = f"resource.setrlimit(resource.RLIMIT_FSIZE, ({file_bytes},) * 2); "
    first = "" if file_bytes is None else f"import resource; {limit}"
    code = f"{first}from jaxalign.cli.main import main; main()"
    return [sys.executable, "-c", code, *arguments]


def start(*arguments: str, file_bytes: int | None = None) -> subprocess.Popen[str]:
    """Start a command; what it prints can be read when it has ended."""
    return subprocess.Popen(
        program(*arguments, file_bytes=file_bytes),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def kill_when(
    process: "subprocess.Popen[Any]", enough: Callable[[], bool], seconds: float = 120
) -> None:
    """Kill a process as soon as it has done enough; it must not have ended before."""
    deadline = time.monotonic() + seconds
    while not enough():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.002)  # waiting for another process, not for a result
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL


def replies_in(store: Path) -> int:
    """Return how many replies a store has."""
    connection = sqlite3.connect(store)
    query = "SELECT count(*) FROM verdicts WHERE state = 'judged'"
    (found,) = connection.execute(query).fetchone()
    connection.close()
    return int(found)
