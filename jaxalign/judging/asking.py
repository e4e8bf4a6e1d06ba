"""Asking a judge what the store does not know yet."""

import asyncio
import contextlib
import dataclasses
import itertools
import time
from collections import defaultdict, deque
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Iterator
from typing import NamedTuple

from jaxalign import progress
from jaxalign.judging.judge import Judge, JudgeRequest, Proven, Verdict, request_key
from jaxalign.judging.store import Judgement, Store


__all__ = ["SettledVerdict", "Usage", "ask", "ask_all"]

_BETWEEN_WRITES = 0.03
"""Seconds from one transaction to the next: each costs as much as some ten rows."""

_LOOK_AHEAD = 16
"""Requests that are looked up in the store at once."""

_BATCH = 1024
"""The most verdicts that wait to be written, or known ones to be taken."""


class SettledVerdict(NamedTuple):
    """The verdict on one of the requests."""

    number: int
    """Of the request, from 0."""
    key: str
    """In the store."""
    verdict: Verdict
    fresh: bool
    """Whether the judge was asked now, for this very request."""


async def ask(
    judge: Judge, requests: Iterable[JudgeRequest], store: Store
) -> AsyncGenerator[SettledVerdict, None]:
    """Yield an answer to every request once, in any order.

    What the store has a value for is not asked, and equal requests of one run are asked
    once. A verdict is yielded after it has been written. Verdicts that come in while
    others are being written are written together (group commit), so the disk is no
    limit on the rate. Requests are drawn as the judge takes them; memory holds those
    on their way, at most 1024 verdicts, and the keys of what failed in this run.

    Raises:
      UserError: from the judge or the store; what was judged until then is written.
    Example::

      with Store(Path("store.db")) as store:
          async for settled in ask(judge, requests, store):
              print(settled.verdict.value)
    """
    if isinstance(judge, Proven):
        judge.proven = judge.proven or store.has_judged(judge.settings)
    pending = _Pending(judge, requests, store)
    while not pending.exhausted:
        missing = pending.missing()
        first = next(missing, None)
        for answer in pending.take_known():
            yield answer
        if first is None:
            await asyncio.sleep(0)
            continue
        graded = judge.grade(itertools.chain([first], missing))
        async with contextlib.aclosing(_written(graded, pending)) as answers:
            async for answer in answers:
                yield answer
                for known in pending.take_known():
                    yield known
        pending.check_all_answered()
    for answer in pending.take_known():
        yield answer


@dataclasses.dataclass
class Usage:
    """What has been asked so far, and what it took.

    >>> Usage().asked
    0
    """

    requests: int = 0
    asked: int = 0
    """Requests that the store did not know."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0

    def add(self, settled: SettledVerdict) -> None:
        """Count one request, and what its verdict took if it was asked for now."""
        self.requests += 1
        if settled.fresh:
            self.asked += 1
            self.prompt_tokens += settled.verdict.prompt_tokens
            self.completion_tokens += settled.verdict.completion_tokens
            self.cost += settled.verdict.cost


async def ask_all(
    judge: Judge,
    requests: Iterable[JudgeRequest],
    store: Store,
    total: int,
    *,
    what: str,
    unit: str = "answers",
    usage: Usage | None = None,
) -> list[Verdict]:
    """Return the verdict on every request, in their order, and show how far it is.

    Args:
      judge: who is asked.
      requests: as of :func:`ask`.
      store: knows some of them, and keeps the others.
      total: how many there are.
      what: is done, for the display.
      unit: of what is counted there.
      usage: what is asked and used is added to it.
    Raises:
      UserError: see :func:`ask`.
    Example::

      with Store(Path("store.db")) as store:
          await ask_all(judge, requests, store, len(requests), what="judging")
    """
    if not total:
        return []
    verdicts: dict[int, Verdict] = {}
    usage = Usage() if usage is None else usage
    with progress.counting(what, total, unit) as show:
        async with contextlib.aclosing(ask(judge, requests, store)) as answers:
            async for answer in answers:
                verdicts[answer.number] = answer.verdict
                usage.add(answer)
                show(len(verdicts), len(verdicts))
    return [verdicts[number] for number in range(total)]


class _Pending:
    """The requests of a run: which are known, which are on their way."""

    def __init__(self, judge: Judge, requests: Iterable[JudgeRequest], store: Store):
        self.exhausted = False
        self._settings = judge.settings
        self._store = store
        self._requests = enumerate(requests)
        self._next: deque[tuple[int, str, JudgeRequest, Verdict | None]] = deque()
        self._outdated: set[str] = set()
        self._known: deque[SettledVerdict] = deque()
        self._asked: dict[int, tuple[int, str, JudgeRequest]] = {}
        self._equal: defaultdict[str, list[int]] = defaultdict(list)
        self._on_the_way: set[str] = set()
        self._failed: dict[str, Verdict] = {}

    def missing(self) -> Iterator[JudgeRequest]:
        """Yield the requests that must be asked; end early when many known ones wait.

        The place of a request in this sequence is what the judge calls its number.
        """
        self._asked = {}
        places = itertools.count()
        while self._next or self._look_ahead():
            number, key, request, known = self._next.popleft()
            if key in self._on_the_way:
                self._equal[key].append(number)
                continue
            if key in self._outdated:
                known = self._looked_up([key]).get(key)
            if known is None:
                self._on_the_way.add(key)
                self._outdated.add(key)
                self._asked[next(places)] = (number, key, request)
                yield request
                continue
            self._known.append(SettledVerdict(number, key, known, False))
            if len(self._known) >= _BATCH:
                return
        self.exhausted = True

    def _look_ahead(self) -> bool:
        """Draw some requests and look all of them up at once; False at the end."""
        drawn = [
            (number, request_key(request, self._settings), request)
            for number, request in itertools.islice(self._requests, _LOOK_AHEAD)
        ]
        known = self._looked_up([key for _, key, _ in drawn])
        self._next.extend((*one, known.get(one[1])) for one in drawn)
        # For these the look-up may be overtaken before their turn comes.
        self._outdated = set(self._on_the_way)
        return bool(drawn)

    def _looked_up(self, keys: list[str]) -> dict[str, Verdict]:
        """Return what need not be asked: values, and failures of this very run."""
        found = self._store.verdicts(keys)
        values = {key: found[key] for key in found if found[key].failure is None}
        return {**{k: self._failed[k] for k in keys if k in self._failed}, **values}

    def take_known(self) -> Iterator[SettledVerdict]:
        """Yield the answers that were there before."""
        while self._known:
            yield self._known.popleft()

    def write(self, graded: list[tuple[int, Verdict]]) -> None:
        """Write verdicts in one transaction."""
        if not graded:
            return
        self._store.add(
            (
                Judgement(self._asked[place][1], self._asked[place][2], verdict)
                for place, verdict in graded
            ),
            self._settings,
        )

    def check_all_answered(self) -> None:
        """Refuse a judge that leaves requests without a verdict."""
        if self._asked:
            raise RuntimeError(f"the judge left {len(self._asked)} requests unanswered")

    def settle(self, place: int, verdict: Verdict) -> Iterator[SettledVerdict]:
        """Yield the answers to a request and those equal to it."""
        number, key, _ = self._asked.pop(place)
        self._on_the_way.discard(key)
        if verdict.failure is not None:
            self._failed[key] = Verdict(None, failure=verdict.failure, raw=verdict.raw)
        yield SettledVerdict(number, key, verdict, True)
        for equal in self._equal.pop(key, ()):
            yield SettledVerdict(equal, key, verdict, False)


async def _written(
    graded: AsyncIterator[tuple[int, Verdict]], pending: _Pending
) -> AsyncGenerator[SettledVerdict, None]:
    """Yield answers once they are written."""
    queue: asyncio.Queue[tuple[int, Verdict] | None] = asyncio.Queue(_BATCH)
    failures: list[BaseException] = []

    async def pump() -> None:
        try:
            async for one in graded:
                await queue.put(one)
        except Exception as error:  # raised below, after what came before is written
            failures.append(error)
        finally:
            if (close := getattr(graded, "aclose", None)) is not None:
                await close()
        await queue.put(None)

    pumping = asyncio.create_task(pump())
    writable, written = True, 0.0
    try:
        ended = False
        while not ended:
            await asyncio.sleep(written + _BETWEEN_WRITES - time.monotonic())
            batch, ended = await _batch(queue)
            writable = False
            await asyncio.to_thread(pending.write, batch)
            writable = True
            written = time.monotonic()
            for place, verdict in batch:
                for answer in pending.settle(place, verdict):
                    yield answer
    finally:
        pumping.cancel()
        await asyncio.gather(pumping, return_exceptions=True)
        if writable:  # we were stopped, but what has come in is paid for
            pending.write([one for one in _left(queue) if one is not None])
    if failures:
        raise failures[0]


async def _batch(
    queue: asyncio.Queue[tuple[int, Verdict] | None],
) -> tuple[list[tuple[int, Verdict]], bool]:
    """Return all that waits, at least one, and whether it is the last."""
    found = [await queue.get(), *_left(queue)]
    batch = [one for one in found if one is not None]
    return batch, len(batch) < len(found)


def _left(
    queue: asyncio.Queue[tuple[int, Verdict] | None],
) -> Iterator[tuple[int, Verdict] | None]:
    while not queue.empty():
        yield queue.get_nowait()
