"""Whether a judge's replies can be read at all.

A model that cannot give the reply that is asked for, or an endpoint that does not know
how it is asked for, answers every request and settles none. That is told from bad luck
by the first requests: if none of twenty that were answered could be read, the rest
would only cost. What was not answered (an error status, a time-out) says nothing of it,
and neither does a refusal, which is of the one request.
"""

from jaxalign.errors import UserError


__all__ = ["FIRST", "Legibility", "bare"]

FIRST = 20
"""Requests that are answered, and not read, before a run is stopped."""

_BOM = "\ufeff"
_FENCE = "```"
_LONGEST_EXAMPLE = 300


class Legibility:
    """Counts what was answered and could not be read.

    Args:
      who: the judge, for the message.
      cure: what to look at, a sentence.
    """

    def __init__(self, who: str, cure: str):
        self._who, self._cure = who, cure
        self._unread = 0

    def unread(self, reason: str, reply: str | None) -> UserError | None:
        """Count a request that was answered in vain; return what stops the run.

        Not to be asked any more once a reply of such a judge has been read.

        Args:
          reason: why its last reply could not be read.
          reply: that reply, without secrets.
        """
        self._unread += 1
        if self._unread < FIRST:
            return None
        shown = " ".join((reply or "").split())
        if len(shown) > _LONGEST_EXAMPLE:
            shown = f"{shown[:_LONGEST_EXAMPLE]}..."
        example = f". It replied: {shown}" if shown else ""
        return UserError(
            f"none of the first {self._unread} requests that {self._who} has answered "
            f"could be read. The last one: {reason}{example}\n{self._cure} What was "
            "judged is in the store, and the same command goes on from there"
        )


def bare(reply: str) -> str:
    """Return a reply without what models put around the JSON that they are asked for.

    That is a byte order mark, a block ``<think>...</think>`` before it (or its end
    alone, where the chat template has begun it in the prompt), and one code fence, with
    ``json`` behind it or nothing, around all of it. What else there is stays, and is no
    JSON: of prose with a value in it nobody knows which part is meant.

    >>> bare('<think>Well {4}?</think>\\n```json\\n{"better": "A"}\\n```')
    '{"better": "A"}'
    >>> bare('Hm.</think> {"better": "A"}'), bare('So: {"better": "A"}')
    ('{"better": "A"}', 'So: {"better": "A"}')
    """
    text = _trimmed(reply)
    thought, end, rest = text.partition("</think>")
    # The words may also stand in a text of the value, which is no thought.
    if end and (thought.startswith("<think>") or not thought.startswith(("{", _FENCE))):
        text = _trimmed(rest)
    if (
        text.startswith(_FENCE)
        and text.endswith(_FENCE)
        and len(text) > 2 * len(_FENCE)
    ):
        inside = text[len(_FENCE) : -len(_FENCE)]
        if inside[:4].lower() == "json":
            inside = inside[4:]
        text = inside.strip()
    return text


def _trimmed(text: str) -> str:
    return text.strip().lstrip(_BOM).strip()
