"""Judges that compute in this process: some requests at a time, beside the loop."""

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Iterable, Sequence

from jaxalign.judging.judge import JudgeRequest, Verdict


__all__ = ["graded"]

_AT_ONCE = 64
"""Requests that are read ahead, so that those of one prompt or length meet."""


async def graded(
    requests: Iterable[JudgeRequest],
    verdicts_of: Callable[[Sequence[JudgeRequest]], Sequence[Verdict]],
) -> AsyncIterator[tuple[int, Verdict]]:
    """Yield (number of the request, verdict), in order.

    Args:
      requests: are read as they are needed.
      verdicts_of: computes those of some requests; called in a thread, one at a time.
    """
    numbered = enumerate(requests)
    while some := list(itertools.islice(numbered, _AT_ONCE)):
        asked = [request for _, request in some]
        verdicts = await asyncio.to_thread(verdicts_of, asked)
        for (number, _), verdict in zip(some, verdicts, strict=True):
            yield number, verdict
