"""What an endpoint answered: the judge's text, or the trouble there was. Pure."""

import json
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, NamedTuple

from jaxalign.judging import endpoint
from jaxalign.judging.attempts import Trouble, fate_of, told_to_wait
from jaxalign.judging.endpoint import Key


__all__ = ["Choice", "Post", "Reply", "choice", "content", "prose"]

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
    reply: Reply, url: str, key: Key, any_success: bool
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
    text = endpoint.without_key(reply.body.decode("utf-8-sig", "replace"), key)
    if not 200 <= reply.status < 300:
        raise _status_trouble(reply, text, url, key, any_success)
    return _choice(text)


def content(choice: Choice, key: Key) -> str:
    """Return the judge's text in a choice, without the key.

    The API's parts of kind ``text`` are joined. What a server gives as reasoning beside
    the content (``reasoning_content``, or ``reasoning``) is a draft and no reply.

    Raises:
      Trouble: it refused, was cut off, or said nothing; with the text, or else with all
        of the message.
    """
    message = choice.get("message")
    message = message if isinstance(message, dict) else {}
    text, refusal = _joined(message.get("content"))
    refusal = message.get("refusal") or refusal
    said = endpoint.without_key(text or json.dumps(message, ensure_ascii=False), key)
    if isinstance(refusal, str) and refusal:
        raise Trouble("refused by the judge", raw=endpoint.without_key(refusal, key))
    ended = choice.get("finish_reason")
    if ended == "content_filter":
        raise Trouble("cut off: the finish_reason is content_filter", raw=said)
    if ended == "length":
        reason = "cut off: the finish_reason is length (see judge.max_reply_tokens)"
        raise Trouble(reason, raw=said, unread=True)
    if not text:
        thought = message.get("reasoning_content") or message.get("reasoning")
        reason = "empty: the reply has no text"
        reason += ", only reasoning" if thought else ""
        raise Trouble(reason, raw=said, unread=True)
    return said


def prose(choice: Choice, key: Key) -> dict[str, Any]:
    """Return what a choice says, whatever that is, without the key.

    Nothing is trouble here: a cut or an empty text is an answer, and so is a refusal,
    whose ``finish_reason`` is then ``refusal``. What an endpoint's filter took away has
    ``content_filter``.

    Returns:
      ``text``, ``finish_reason``, ``top_logprobs``: [token, log-probability] of the
      most probable first tokens, and ``mean_logp`` of all tokens; None for what the
      endpoint does not tell.
    """
    message = choice.get("message")
    message = message if isinstance(message, dict) else {}
    text, refusal = _joined(message.get("content"))
    refusal = message.get("refusal") or refusal
    ended = choice.get("finish_reason")
    ended = ended if isinstance(ended, str) else "stop"
    if isinstance(refusal, str) and refusal:
        text, ended = text or refusal, "refusal"
    return {
        "text": endpoint.without_key(text, key),
        "finish_reason": ended,
        "top_logprobs": _first_logprobs(choice),
        "mean_logp": _mean_logp(choice),
    }


def _told_logprobs(choice: Choice) -> list[dict[str, Any]]:
    told = choice.get("logprobs")
    places = told.get("content") if isinstance(told, dict) else None
    listed = places if isinstance(places, list) else []
    return [place for place in listed if isinstance(place, dict)]


def _mean_logp(choice: Choice) -> float | None:
    """Return the mean log-probability of a choice's tokens."""
    logps = [place.get("logprob") for place in _told_logprobs(choice)]
    known = [logp for logp in logps if isinstance(logp, int | float)]
    return sum(known) / len(known) if known and len(known) == len(logps) else None


def _first_logprobs(choice: Choice) -> list[list[Any]] | None:
    """Return the first token's most probable alternatives."""
    places = _told_logprobs(choice)
    ranked = places[0].get("top_logprobs") if places else None
    if not isinstance(ranked, list):
        return None
    found = [
        [one["token"], float(one["logprob"])]
        for one in ranked
        if isinstance(one, dict)
        and isinstance(one.get("token"), str)
        and isinstance(one.get("logprob"), int | float)
    ]
    return found or None


def _joined(content: Any) -> tuple[str, str]:
    """Return the text and the refusal of a message's content, "" for none."""
    if isinstance(content, str):
        return content, ""
    parts = content if isinstance(content, list) else []
    found = {"text": "", "refusal": ""}
    for part in parts:
        if not isinstance(part, dict):
            continue
        for name in found:
            if part.get("type") == name and isinstance(part.get(name), str):
                found[name] += part[name]
    return found["text"], found["refusal"]


def _choice(text: str) -> tuple[Choice, tuple[int, int] | None]:
    try:
        reply = json.loads(text)
    except (ValueError, RecursionError):
        reason = "no chat completion: the reply is not JSON"
        raise Trouble(reason, raw=text, unread=True) from None
    choices = reply.get("choices") if isinstance(reply, dict) else None
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise Trouble("empty: the reply has no choices", raw=text, unread=True)
    used = reply.get("usage")
    counts = (
        [used.get("prompt_tokens"), used.get("completion_tokens")]
        if isinstance(used, dict)
        else []
    )
    whole = [n for n in counts if isinstance(n, int) and n >= 0]
    return choices[0], (whole[0], whole[1]) if len(whole) == 2 else None


def _status_trouble(
    reply: Reply, body: str, url: str, key: Key, any_success: bool
) -> Trouble:
    status = reply.status
    fate = fate_of(status, body, any_success)
    unclear = fate != fate_of(status, body, any_success=True)
    said = _said(body)
    if fate == "run":
        cure = _cure(status, body, key)
        return Trouble(
            f"the judge at {url} answers HTTP {status}{said}. {cure} What was judged "
            "is in the store",
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


def _cure(status: int, body: str, key: Key) -> str:
    if status in (401, 403):
        return f"Check {key.variable} and what its owner may use."
    if status in (402, 429):
        return "There is no credit left."
    if status in (404, 405):
        return "Check judge.base_url (up to and with /v1) and judge.model."
    if status < 400:
        return "Redirects are not followed: give the URL where it ends."
    if "response_format" in body or "json_schema" in body:
        return (
            "It does not take the reply's schema: give judge.response_format "
            "json_object, or none."
        )
    return "No request has succeeded, so all would fail: check judge.model and options."
