"""What TensorBoard shows of a directory: its files read as TensorFlow writes them."""

import struct
from collections.abc import Iterator
from pathlib import Path

from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore


def shown(directory: Path) -> dict[str, list[tuple[int, float]]]:
    """Return the (step, value) pairs of every tag, in the order of the files.

    A START forgets what earlier events say of its step and of later ones.
    """
    found: dict[str, list[tuple[int, float]]] = {}
    for path in sorted(directory.iterdir()):
        for event in _events(path.read_bytes()):
            if event.session_log.status == SessionLog.START:
                for tag, points in found.items():
                    found[tag] = [point for point in points if point[0] < event.step]
            for value in event.summary.value:
                found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return found


def _events(content: bytes) -> Iterator[Event]:
    """Read records (length, its checksum, event, its checksum) up to a torn one."""
    at = 0
    while at + 12 <= len(content):
        (length,) = struct.unpack_from("<Q", content, at)
        end = at + 12 + length
        if end + 4 > len(content):
            return
        yield Event.FromString(content[at + 12 : end])
        at = end + 4
