"""Judges that compute in this process: some requests at a time, beside the loop.

What they read is the checkpoint's own: messages go through its chat template, and the
images of a request are opened as pictures of the prompt.
"""

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from typing import Any

from jaxalign.data.images import checked
from jaxalign.data.picture import Picture
from jaxalign.data.records import Message, Prompt
from jaxalign.data.rendering import Renderer
from jaxalign.errors import UserError
from jaxalign.judging.judge import JudgeRequest, Verdict


__all__ = ["graded", "pictures_of", "prompt_of", "seen"]

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


def pictures_of(
    requests: Iterable[JudgeRequest],
    renderer: Renderer,
    load_image: Callable[[str], bytes] | None,
) -> dict[str, Picture]:
    """Return the pictures that some requests show, by their references.

    None are read for a checkpoint that does not see.

    Raises:
      UserError: nothing loads them, or one is not what it was.
    """
    if renderer.patcher is None:
        return {}
    names = {name for request in requests for name in request.subject.images}
    return {name: Picture(checked(name, load_image), name) for name in names}


def seen(
    names: Sequence[str], pictures: Mapping[str, Picture], renderer: Renderer
) -> tuple[Picture, ...]:
    """Return the pictures of these references.

    Raises:
      UserError: there are some, and the checkpoint does not see.
    """
    if names and renderer.patcher is None:
        raise UserError("it sees no images; judge.name openai may")
    return tuple(pictures[name] for name in names)


def prompt_of(
    messages: Sequence[Mapping[str, Any]],
    pictures: Mapping[str, Picture],
    renderer: Renderer,
) -> Prompt:
    """Return messages as a prompt; without a chat template, one below the other.

    A judged prompt that is a plain text has placeholders of the family for pictures,
    which stand in front of the judge as well: ``[image]`` is written for each.

    Args:
      messages: of a request; parts of their contents are texts or images.
      pictures: of the request, by their references.
      renderer: of the checkpoint.
    Raises:
      UserError: there are images, and the checkpoint does not see.
    """
    parts = [_parts(message["content"]) for message in messages]
    names = [name for own in parts for kind, name in own if kind == "image"]
    images = seen(names, pictures, renderer)
    place = "" if renderer.patcher is None else renderer.patcher.placeholder

    def said(text: str) -> str:
        return text.replace(place, "[image]") if place else text

    if not renderer.has_template:
        shown = [
            "".join(place if k == "image" else said(v) for k, v in own) for own in parts
        ]
        text = "\n\n".join(shown) + "\n\nAnswer: "
        return Prompt(text, None, "the request", images=images)
    turns = []
    for message, own in zip(messages, parts, strict=True):
        content: Any = [
            {"type": "image"}
            if kind == "image"
            else {"type": "text", "text": said(value)}
            for kind, value in own
        ]
        if isinstance(message["content"], str):
            content = said(message["content"])
        turns.append(Message(**{**message, "content": content}))
    return Prompt(tuple(turns), None, "the request", images=images)


def _parts(content: str | Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Return a message's content as pairs of kind and text or reference."""
    if isinstance(content, str):
        return [("text", content)]
    return [
        ("text", part["text"])
        if part["type"] == "text"
        else ("image", part.get("image_url", {}).get("url", ""))
        for part in content
    ]
