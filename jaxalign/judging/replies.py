"""What an endpoint answered: the judge's text, or the trouble there was. Pure."""

import json
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, NamedTuple

from jaxalign.judging import endpoint
from jaxalign.judging.attempts import Trouble, fate_of, told_to_wait


__all__ = ["Choice", "Post", "Reply", "choice", "content"]

Choice = dict[str, Any]


class Reply(NamedTuple):
    """An answer to a call."""

    status: int
    headers: Mapping[str, str]
    """By name in any case."""
    body: bytes


Post = Callable[[bytes], Awaitable[Reply]]
"""Posts the body of a call; raises Trouble where there is no whole reply."""


def choice(
    reply: Reply, url: str, key: str, any_success: bool
) -> tuple[Choice, tuple[int, int] | None]:
    """Return the first choice of a chat completion, and its tokens if counted.

    Read by hand: the official client's types would read it leniently, and take longer
    than the call.

    Args:
      reply: as it came.
      url: base URL of the endpoint.
      key: taken out of everything that comes back.
      any_success: whether any call has succeeded yet.
    Raises:
      Trouble: there is no choice.
    """
    text = endpoint.without_key(reply.body.decode("utf-8", "replace"), key)
    if not 200 <= reply.status < 300:
        raise _status_trouble(reply, text, url, any_success)
    return _choice(text)


def content(choice: Choice, key: str) -> str:
    """Return the judge's text in a choice, without the key.

    Raises:
      Trouble: it refused, was cut off, or said nothing.
    """
    message = choice.get("message")
    message = message if isinstance(message, dict) else {}
    text, refusal = message.get("content"), message.get("refusal")
    text = endpoint.without_key(text, key) if isinstance(text, str) else None
    if isinstance(refusal, str) and refusal:
        raise Trouble("refused by the judge", raw=endpoint.without_key(refusal, key))
    ended = choice.get("finish_reason")
    if ended in ("length", "content_filter"):
        raise Trouble(f"cut off: the finish_reason is {ended}", raw=text)
    if not text:
        raise Trouble("empty: the reply has no text", raw=text)
    return text


def _choice(text: str) -> tuple[Choice, tuple[int, int] | None]:
    try:
        reply = json.loads(text)
    except (ValueError, RecursionError):
        raise Trouble("no chat completion: the reply is not JSON", raw=text) from None
    choices = reply.get("choices") if isinstance(reply, dict) else None
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise Trouble("empty: the reply has no choices", raw=text)
    used = reply.get("usage")
    counts = (
        [used.get("prompt_tokens"), used.get("completion_tokens")]
        if isinstance(used, dict)
        else []
    )
    whole = [n for n in counts if isinstance(n, int) and n >= 0]
    return choices[0], (whole[0], whole[1]) if len(whole) == 2 else None


def _status_trouble(reply: Reply, body: str, url: str, any_success: bool) -> Trouble:
    status = reply.status
    fate = fate_of(status, body, any_success)
    unclear = fate != fate_of(status, body, any_success=True)
    said = _said(body)
    if fate == "run":
        return Trouble(
            f"the judge at {url} answers HTTP {status}{said}. {_cure(status)} What was "
            "judged is in the store",
            fate=fate,
            unclear=unclear,
        )
    return Trouble(f"HTTP {status}{said}", fate=fate, wait=told_to_wait(reply.headers))


def _said(body: str, most: int = 300) -> str:
    """Return the error's own words, as the end of a phrase."""
    try:
        error = json.loads(body)["error"]
        words = error["message"] if isinstance(error, dict) else error
    except (ValueError, KeyError, TypeError, RecursionError):
        words = body
    line = " ".join(str(words).split())
    return f": {line[:most]}{'...' if len(line) > most else ''}" if line else ""


def _cure(status: int) -> str:
    if status in (401, 403):
        return f"Check {endpoint.KEY_VARIABLE} and what its owner may use."
    if status in (402, 429):
        return "There is no credit left."
    if status in (404, 405):
        return "Check judge.base_url (up to and with /v1) and judge.model."
    if status < 400:
        return "Redirects are not followed: give the URL where it ends."
    return "No request has succeeded, so all would fail: check judge.model and options."
