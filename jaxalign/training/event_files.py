"""TensorBoard's event files, written line by line: no queue, no thread.

A summary writer with a thread of its own loses minutes when it is killed, and a full
disk ends its thread, not the run.
"""

import socket
import time
from collections.abc import Mapping
from pathlib import Path

from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore
from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore
from tensorboardX.record_writer import RecordWriter
from tensorboardX.summary import scalar


__all__ = ["EventFile"]


class EventFile:
    """Writes scalars of steps into a new file of a directory.

    TensorBoard reads the files of a directory one after the other. Each one begins with
    a purge: what earlier files say of step ``first`` and of later ones is forgotten, as
    an earlier process went on past the checkpoint that this one starts from.
    """

    def __init__(self, directory: Path, first: int):
        directory.mkdir(parents=True, exist_ok=True)
        # TensorBoard goes by the order of the names: the time, to the microsecond.
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}"
        self._records = RecordWriter(str(directory / name))
        self._write(Event(file_version="brain.Event:2"))
        self._write(Event(step=first, session_log=SessionLog(status=SessionLog.START)))
        self._flushed = 0.0

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Add a step: ``eval_x`` as ``eval/x``, others as ``train/x``."""
        scalars = [scalar(_tag(name), value).value[0] for name, value in values.items()]
        self._write(Event(step=step, summary=Summary(value=scalars)))
        if time.monotonic() - self._flushed > 1:
            self.flush()

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        self._records.write(event.SerializeToString())

    def flush(self) -> None:
        """Bring all that was written to the disk."""
        self._records.flush()
        self._flushed = time.monotonic()

    def close(self) -> None:
        """Flush and close."""
        self._records.close()


def _tag(name: str) -> str:
    group = "eval" if name.startswith("eval_") else "train"
    return f"{group}/{name.removeprefix('eval_')}"
