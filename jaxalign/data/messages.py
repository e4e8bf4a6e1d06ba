"""Turns of conversations, as chat templates take them."""

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import pydantic
import pydantic_core

from jaxalign.errors import UserError


__all__ = [
    "ImagePart",
    "Message",
    "TextPart",
    "check_text",
    "check_turn",
    "without_nulls",
]


class TextPart(pydantic.BaseModel):
    """A stretch of a turn's text."""

    model_config = pydantic.ConfigDict(strict=True, extra="forbid", frozen=True)

    type: Literal["text"] = "text"
    text: str


class ImagePart(pydantic.BaseModel):
    """Where a turn shows a picture."""

    model_config = pydantic.ConfigDict(strict=True, extra="forbid", frozen=True)

    type: Literal["image"] = "image"
    # No template is given it: a record takes its pictures out of their parts.
    image: Any = pydantic.Field(default=None, exclude=True, repr=False)
    """The picture as it stood in the part, until the record's pictures are read."""


Part = Annotated[TextPart | ImagePart, pydantic.Field(discriminator="type")]


class Message(pydantic.BaseModel):
    """One turn of a conversation, as chat templates take it.

    What else a turn has (``tool_calls``, ``tool_call_id``, ``name``,
    ``reasoning_content`` ...) is kept and given to the template. A null is no value,
    but for ``content``, which templates look at.
    """

    model_config = pydantic.ConfigDict(strict=True, extra="allow", frozen=True)

    role: Annotated[str, pydantic.Field(min_length=1)]
    content: str | list[Part] | None = None

    @pydantic.model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        kept = {k: v for k, v in given.items() if v is not None or k == "content"}
        if isinstance(kept.get("content"), list):
            kept["content"] = [_part(part) for part in without_nulls(kept["content"])]
        if kept.get("content") is None and not set(kept) & _IN_PLACE_OF_CONTENT:
            kind = "content_null" if "content" in given else "content_missing"
            raise pydantic_core.PydanticCustomError(
                kind, "expected a text (null goes with tool_calls alone)"
            )
        return kept

    @property
    def text(self) -> str:
        """Return the text of the content; parts of a text are one behind the other."""
        if isinstance(self.content, list):
            return "".join(p.text for p in self.content if isinstance(p, TextPart))
        return self.content or ""

    def turn(self) -> dict[str, Any]:
        """Return the turn as a chat template takes it."""
        return self.model_dump(exclude_unset=True)


def _part(given: Any) -> Any:
    """Return a part of a turn's content in our own words; OpenAI has others."""
    if not isinstance(given, Mapping):
        return given
    kind = given.get("type")
    if kind == "image_url" and set(given) <= {"type", "image_url"}:
        url = given.get("image_url")
        image = url.get("url") if isinstance(url, Mapping) else url
        if image is None:
            raise pydantic_core.PydanticCustomError(
                "content_part", 'expected {{"url": a data URL or a path}} in image_url'
            )
        return {"type": "image", "image": image}
    if isinstance(kind, str) and kind not in ("text", "image"):
        raise pydantic_core.PydanticCustomError(
            "content_part",
            "a part of type {kind}; expected parts of type text, image or image_url",
            {"kind": kind[:40]},
        )
    return given


_IN_PLACE_OF_CONTENT = {"tool_calls", "reasoning_content"}
"""What a turn without a text may say."""


def without_nulls(value: Any, keep: str | None = None) -> Any:
    """Return a nested value without the keys that are null, but for one of them.

    >>> without_nulls({"a": None, "b": [{"c": 1, "d": None}]})
    {'b': [{'c': 1}]}
    """
    if isinstance(value, Mapping):
        return {
            k: without_nulls(v, keep)
            for k, v in value.items()
            if v is not None or k == keep
        }
    if isinstance(value, list):
        return [without_nulls(v, keep) for v in value]
    return value


def check_text(text: str, field: str, where: str) -> None:
    """Refuse a text that cannot be written down.

    Raises:
      UserError: with ``where``, the field and the character.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: field {field}: character {error.start} is half of a surrogate "
            "pair, which is no text. Escape the character as a whole pair, or as UTF-8"
        ) from None


def check_turn(message: Message, field: str, where: str) -> None:
    """Refuse a turn that has a text that cannot be written down.

    Raises:
      UserError: see :func:`check_text`.
    """
    for name, value in message.turn().items():
        if not isinstance(value, str):
            value = json.dumps(value, ensure_ascii=False, default=str)
        check_text(value, f"{field}.{name}", where)
