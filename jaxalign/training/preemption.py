"""SIGTERM as a flag: a machine is taken away, and everything is saved first."""

import signal
from types import FrameType


__all__ = ["Preempted", "Preemption"]


class Preempted(Exception):
    """The process was told to end (SIGTERM); everything worth keeping is saved."""


class Preemption:
    """Turns SIGTERM into a flag that loops look at.

    Until a loop runs there is nothing to lose, and the signal ends the process at once.
    """

    def __init__(self) -> None:
        self.requested = False
        self.deferred = False

    def install(self) -> None:
        """Catch SIGTERM from now on."""
        signal.signal(signal.SIGTERM, self._handle)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        del signum, frame
        self.requested = True
        if not self.deferred:
            raise Preempted
