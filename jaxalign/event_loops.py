"""Coroutines run to their end from anywhere, a notebook's cell included."""

import asyncio
import contextlib
import contextvars
from collections.abc import Coroutine
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar


__all__ = ["run"]

T = TypeVar("T")


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end and return what it returns.

    Where no event loop runs this is ``asyncio.run``. Where one does (a cell of Jupyter,
    a handler of a server), which Python lets nobody enter twice, the coroutine has a
    loop of its own in a thread of its own, with the caller's context variables, and the
    caller waits. Ctrl-C cancels it either way, and raises when it has ended.

    Args:
      coroutine: not begun yet.
    Raises:
      KeyboardInterrupt: Ctrl-C came.
      BaseException: what the coroutine raises.

    >>> async def answer():
    ...     return 42
    >>> async def cell():
    ...     return run(answer())
    >>> run(answer()), run(cell())
    (42, 42)
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(coroutine)
    begun: Future[tuple[asyncio.AbstractEventLoop, asyncio.Task[T]]] = Future()

    async def whole() -> T:
        task: Any = asyncio.current_task()
        begun.set_result((asyncio.get_running_loop(), task))
        return await coroutine

    context = contextvars.copy_context()
    with ThreadPoolExecutor(1, "event-loop") as pool:
        ended = pool.submit(context.run, asyncio.run, whole())
        try:
            return ended.result()
        except BaseException:
            if not ended.done():  # the caller was interrupted, not the coroutine
                loop, task = begun.result()
                with contextlib.suppress(RuntimeError):  # it has ended meanwhile
                    loop.call_soon_threadsafe(task.cancel)
            raise
