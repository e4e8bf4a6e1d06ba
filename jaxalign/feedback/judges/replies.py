"""One call to the endpoint: its reply as text, or the trouble there was."""

import json
from typing import Any

from jaxalign.feedback.judges import endpoint
from jaxalign.feedback.judges.attempts import Trouble, fate_of, told_to_wait


__all__ = ["NO_CONNECTION", "Reply", "chat", "content"]

NO_CONNECTION = "no connection"

Reply = dict[str, Any]


async def chat(
    client: Any, body: bytes, url: str, key: str, any_success: bool
) -> tuple[Reply, tuple[int, int] | None]:
    """Make one call; return the first choice of the reply, and its tokens if counted.

    Args:
      client: the official one.
      body: of the request.
      url: base URL of the endpoint.
      key: taken out of everything that comes back.
      any_success: whether any call has succeeded yet.
    Raises:
      Trouble: there is no choice.
    """
    import httpx2
    import openai

    try:
        # The typed `chat.completions.create` would walk through the body and build
        # models of the reply: more work than all the rest, and a lenient reading.
        response = await client.post(
            f"{url}/chat/completions",
            content=body,
            cast_to=httpx2.Response,
            options={"headers": {"Content-Type": "application/json"}},
        )
    except openai.APITimeoutError:
        raise Trouble("time-out: no whole reply in judge.timeout seconds") from None
    except openai.APIConnectionError as error:
        cause = endpoint.without_key(str(error.__cause__ or error), key)
        refused = isinstance(error.__cause__, httpx2.ConnectError)
        raise Trouble(
            f"{NO_CONNECTION if refused else 'broken connection'}: {cause}"
        ) from None
    except openai.APIStatusError as error:
        raise _status_trouble(error.response, url, key, any_success) from None
    text = response.content.decode("utf-8", "replace")
    return _choice(endpoint.without_key(text, key))


def content(choice: Reply, key: str) -> str:
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


def _choice(text: str) -> tuple[Reply, tuple[int, int] | None]:
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


def _status_trouble(response: Any, url: str, key: str, any_success: bool) -> Trouble:
    status, body = response.status_code, endpoint.without_key(response.text, key)
    fate = fate_of(status, body, any_success)
    said = _said(body)
    if fate == "run":
        return Trouble(
            f"the judge at {url} answers HTTP {status}{said}. {_cure(status)} What was "
            "judged is in the store",
            fate=fate,
        )
    return Trouble(
        f"HTTP {status}{said}", fate=fate, wait=told_to_wait(response.headers)
    )


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
