"""SIGTERM as a flag: a machine is taken away, and everything is saved first."""

import signal
from types import FrameType

from jax.experimental import multihost_utils

from jaxalign.parallel import multihost


__all__ = ["Preempted", "Preemption"]


class Preempted(Exception):
    """The process was told to end (SIGTERM); everything worth keeping is saved."""


class Preemption:
    """Turns SIGTERM into a flag that loops look at.

    Until a loop runs there is nothing to lose, and the signal ends the process at once.
    With several processes JAX catches it, and all of them stop where the last of them
    is, whichever was told.
    """

    def __init__(self) -> None:
        self.deferred = False
        self._requested = False
        self._asked = 0

    def install(self) -> None:
        """Catch SIGTERM from now on."""
        if not multihost.several():
            signal.signal(signal.SIGTERM, self._handle)

    def reached(self) -> bool:
        """Return whether to stop here; every process asks at the same places."""
        if not multihost.several():
            return self._requested
        self._asked += 1
        return multihost_utils.reached_preemption_sync_point(self._asked)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        del signum, frame
        self._requested = True
        if not self.deferred:
            raise Preempted
