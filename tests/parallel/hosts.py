"""Several processes of one run on this machine, each with devices of its own."""

import os
import re
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


__all__ = ["end", "log_of", "run", "start"]

LIMIT = 400
"""Seconds after which a process that has not ended is a failure."""


def start(
    arguments: Sequence[str], logs: Path, *, processes: int, devices: int
) -> list[subprocess.Popen[bytes]]:
    """Start a command of jaxalign in several processes that find each other.

    Args:
      arguments: of the command, its name first.
      logs: a directory, for what each prints.
      processes: how many.
      devices: of each.
    """
    logs.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = re.sub(
        r"device_count=\d+", f"device_count={devices}", os.environ["XLA_FLAGS"]
    )
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    started = []
    for number in range(processes):
        place = f"127.0.0.1:{port},{processes},{number}" if processes > 1 else "off"
        command = [sys.executable, "-m", "jaxalign.cli.main", *arguments]
        with (logs / f"{number}.log").open("wb") as log:
            started.append(
                subprocess.Popen(
                    [*command, f"--distributed={place}"],
                    env=environment,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            )
    return started


def end(started: Sequence[subprocess.Popen[bytes]]) -> list[int]:
    """Wait for processes and return how each ended."""
    try:
        return [process.wait(LIMIT) for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()


def run(
    arguments: Sequence[str], logs: Path, *, processes: int, devices: int
) -> list[int]:
    """Run a command in several processes to its end; return how each ended."""
    started = start(arguments, logs, processes=processes, devices=devices)
    return end(started)


def log_of(logs: Path, number: int = 0) -> str:
    """Return what a process printed."""
    return (logs / f"{number}.log").read_text(encoding="utf-8", errors="replace")
