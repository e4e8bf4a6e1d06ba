"""What becomes of a call that gave no verdict: again, when, or not at all.

The API's facts: status codes and the codes in an error's body
(https://platform.openai.com/docs/guides/error-codes), the headers ``retry-after``
(seconds or a date, RFC 9110 section 10.2.3) and ``retry-after-ms``. Ours is what
follows from them.
"""

import email.utils
import math
import time
from collections.abc import Mapping
from typing import Literal


__all__ = ["Fate", "Trouble", "backoff", "fate_of", "told_to_wait"]

Fate = Literal["again", "item", "run"]
"""What a failed call concerns: this moment, this request, or every request."""

_OF_THE_MOMENT = frozenset({408, 409, 425, 429})
_OF_THE_RUN = frozenset({401, 402, 403, 404, 405})
_OF_THE_ITEM = (
    "content_filter",
    "content_policy_violation",
    "context_length_exceeded",
    "string_above_max_length",
    "maximum context length",  # words of servers that give no code
    "longer than the maximum model length",
)
_NO_MORE_MONEY = ("insufficient_quota", "billing_hard_limit_reached")


class Trouble(Exception):
    """A call that gave no verdict."""

    def __init__(
        self,
        reason: str,
        *,
        fate: Fate = "again",
        raw: str | None = None,
        wait: float | None = None,
        repair: str | None = None,
        unreached: bool = False,
        unclear: bool = False,
        unread: bool = False,
    ):
        super().__init__(reason)
        self.reason = reason
        self.fate: Fate = fate
        self.raw = raw
        """The reply, where there was one."""
        self.wait = wait
        """Seconds that the endpoint asks for."""
        self.repair = repair
        """What was wrong with the reply, if telling the judge may mend it."""
        self.unreached = unreached
        """Whether there was no connection at all."""
        self.unclear = unclear
        """Whether its fate rests on no other call having succeeded yet."""
        self.unread = unread
        """Whether a reply came, and nothing of what was asked for was in it."""


def fate_of(status: int, body: str, any_success: bool) -> Fate:
    """Return what an error status concerns.

    A 400 or 422 may be about the one request (a content filter, a text that is too
    long) or about all of them (an option that the endpoint does not know). It is taken
    to be about all as long as nothing has succeeded, unless the body says otherwise.

    >>> fate_of(503, "", False), fate_of(401, "", True), fate_of(400, "", False)
    ('again', 'run', 'run')
    >>> fate_of(400, '{"error": {"code": "content_filter"}}', False)
    'item'
    """
    if status == 429 and any(code in body for code in _NO_MORE_MONEY):
        return "run"
    if status >= 500 or status in _OF_THE_MOMENT:
        return "again"
    if status < 400 or status in _OF_THE_RUN:
        return "run"  # below 400 are redirects, which are never followed
    if status == 413 or any(words in body for words in _OF_THE_ITEM):
        return "item"
    return "item" if any_success else "run"


def told_to_wait(headers: Mapping[str, str], now: float | None = None) -> float | None:
    """Return the seconds that an endpoint asks to wait, or None.

    Args:
      headers: of its reply, with names in lower case or matched in any.
      now: seconds since the epoch; default the clock's.

    >>> told_to_wait({"retry-after": "2"}), told_to_wait({"retry-after-ms": "250"})
    (2.0, 0.25)
    >>> told_to_wait({"retry-after": "Thu, 01 Jan 1970 00:01:00 GMT"}, now=50.0)
    10.0
    """
    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        given = headers.get(name)
        if given is None:
            continue
        try:
            seconds = float(given) * unit
        except ValueError:
            try:
                date = email.utils.parsedate_to_datetime(given).timestamp()
            except (ValueError, TypeError, OverflowError):
                continue
            seconds = date - (time.time() if now is None else now)
        if math.isfinite(seconds):
            return max(0.0, seconds)
    return None


def backoff(attempt: int, chance: float, told: float | None = None) -> float:
    """Return the seconds to wait after the n-th failed attempt in a row (from 1).

    min(30, 0.5 * 2^(n-1)) times 0.5..1, so that requests which failed together do not
    come back together; never less than what the endpoint asked for, and up to a tenth
    (at most a second) more.

    >>> backoff(1, 1.0), backoff(3, 0.0), backoff(1, 0.0, told=5.0)
    (0.5, 1.0, 5.0)
    """
    if told is not None:
        return told + chance * min(1.0, told / 10)
    return min(30.0, 0.5 * 2 ** min(attempt - 1, 10)) * (0.5 + 0.5 * chance)
