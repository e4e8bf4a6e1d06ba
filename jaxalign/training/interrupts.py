"""Ctrl-C, kept off the moments in which a state is given away."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


__all__ = ["Interrupts"]


class Interrupts:
    """Has Ctrl-C raise as ever, but never inside of :meth:`held`.

    A step takes the arrays of the old state for the new ones. An exception between the
    two would leave neither, so there it waits until the new state has its name.
    """

    def __init__(self) -> None:
        self._holding = False
        self._waiting: tuple[int, FrameType | None] | None = None

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Look at SIGINT before its handler does, which is there again at the end.

        Outside of the main thread no signal interrupts Python, and nothing is done.
        """
        before = signal.getsignal(signal.SIGINT)
        main = threading.current_thread() is threading.main_thread()
        if not main or not callable(before):
            yield
            return
        self._before = before
        signal.signal(signal.SIGINT, self._handle)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keep Ctrl-C waiting until the end of the context."""
        self._holding = True
        try:
            yield
        finally:
            self._holding = False
            if self._waiting is not None:
                waiting, self._waiting = self._waiting, None
                self._before(*waiting)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self._holding:
            self._waiting = (signum, frame)
        else:
            self._before(signum, frame)
