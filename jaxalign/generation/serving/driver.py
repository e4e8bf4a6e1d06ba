"""The thread that owns the engine, and what an event loop asks of it.

Everything but the engine is touched by the event loop's thread alone. Commands go to
the engine's thread through a queue, which it waits for when it has nothing to do;
tokens come back through ``call_soon_threadsafe``.
"""

import asyncio
import dataclasses
import functools
import queue
import threading
import traceback
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from jaxalign.generation.engine import Engine, Event, Request


__all__ = ["Call", "Driver", "EngineFailed", "Overloaded"]


class Overloaded(Exception):
    """More texts wait than may."""


class EngineFailed(Exception):
    """The engine's thread has ended with an error."""


@dataclasses.dataclass(eq=False)
class _Ticket:
    """A request of a call; number and left belong to the engine's thread."""

    call: "Call"
    index: int
    request: Request
    left: int
    number: int = -1


class Call:
    """Requests that are answered together."""

    def __init__(self, driver: "Driver", requests: Sequence[Request]):
        self._driver = driver
        self._tickets = [
            _Ticket(self, index, request, request.sampling.num_samples)
            for index, request in enumerate(requests)
        ]
        self._texts = sum(r.sampling.num_samples for r in requests)
        self.texts_left = self._texts
        self._queue: asyncio.Queue[tuple[int, Event] | None] = asyncio.Queue()

    async def events(self) -> AsyncIterator[tuple[int, Event]]:
        """Yield (index of the request, event) until all are answered or it is closed.

        Raises:
          EngineFailed: the engine cannot go on.
        """
        left = self._texts  # some may have come in already
        while left:
            item = await self._queue.get()
            if item is None:
                if self._driver.error is not None:
                    raise EngineFailed(self._driver.error)
                return
            left -= item[1].finish_reason is not None
            yield item

    def close(self) -> None:
        """Give up what is not finished yet; its slots become free."""
        self._driver._close(self)
        self._queue.put_nowait(None)

    def _put(self, index: int, event: Event) -> None:
        self._queue.put_nowait((index, event))


class Driver:
    """Runs an engine in a thread of its own; call all else from one event loop."""

    def __init__(self, engine: Engine, *, most: int):
        """Make a driver.

        Args:
          engine: nobody else may use it from :meth:`start` on.
          most: texts that may be in slots or wait for one; a single call may have more
            if nothing else is there.
        """
        self.engine, self.most = engine, most
        self.error: str | None = None
        self._calls: set[Call] = set()
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._tickets: dict[int, _Ticket] = {}
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self) -> None:
        """Start the thread; in the event loop that calls will be made from."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def stop(self) -> None:
        """End the thread, whatever it is doing, and wait for it; from any thread."""
        self._inbox.put(None)
        if self._thread.is_alive():
            self._thread.join()

    @property
    def texts(self) -> int:
        """How many texts are in the making or wait."""
        return sum(call.texts_left for call in self._calls)

    def submit(self, requests: Sequence[Request]) -> Call:
        """Hand over requests that ``engine.check`` has passed.

        Raises:
          Overloaded: too many wait already.
          EngineFailed: the engine cannot go on.
        """
        if self.error is not None:
            raise EngineFailed(self.error)
        call = Call(self, requests)
        waiting = self.texts
        if waiting and waiting + call.texts_left > self.most:
            raise Overloaded(
                f"{waiting} completions are being made or wait, and {call.texts_left} "
                f"more would be above {self.most}: try again later"
            )
        self._calls.add(call)
        for ticket in call._tickets:
            self._inbox.put(functools.partial(self._begin, ticket))
        return call

    def _close(self, call: Call) -> None:
        if call in self._calls:
            self._calls.remove(call)
            for ticket in call._tickets:
                self._inbox.put(functools.partial(self._cancel, ticket))

    def _deliver(self, found: list[tuple[_Ticket, Event]]) -> None:
        for ticket, event in found:
            call = ticket.call
            if call not in self._calls:
                continue
            call._put(ticket.index, event)
            call.texts_left -= event.finish_reason is not None
            if not call.texts_left:
                self._calls.remove(call)

    def _fail(self, error: str) -> None:
        self.error = error
        for call in list(self._calls):
            call.close()

    # What follows runs in the engine's thread.

    def _run(self) -> None:
        try:
            while self._obey():
                # One piece of a prompt a step, so that running texts go on.
                events = self.engine.step(chunks=1)
                found = [(self._ticket_of(event), event) for event in events]
                if found:
                    self._post(self._deliver, found)
        except Exception as error:
            traceback.print_exc()
            self._post(self._fail, f"the engine failed: {type(error).__name__}")

    def _obey(self) -> bool:
        """Do what was asked, and wait while there is nothing else; False to end."""
        while True:
            try:
                command = self._inbox.get(block=not self.engine.busy)
            except queue.Empty:
                return True
            if command is None:
                return False
            command()

    def _begin(self, ticket: _Ticket) -> None:
        ticket.number = self.engine.submit(ticket.request)
        self._tickets[ticket.number] = ticket

    def _cancel(self, ticket: _Ticket) -> None:
        if self._tickets.pop(ticket.number, None) is not None:
            self.engine.cancel(ticket.number)

    def _ticket_of(self, event: Event) -> _Ticket:
        ticket = self._tickets[event.request]
        ticket.left -= event.finish_reason is not None
        if not ticket.left:
            del self._tickets[event.request]
        return ticket

    def _post(self, fn: Callable[..., None], *args: Any) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(fn, *args)
        except RuntimeError:
            pass  # the loop has been closed: nobody listens
