"""Requests from templates: what the decomposers' questions have in common."""

import json
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxalign.data import images
from jaxalign.judging import wording
from jaxalign.judging.judge import JudgeRequest, Schema, Subject, Task


__all__ = ["YES_OR_NO", "closed", "folded", "make_request", "texts"]


def closed(**properties: Any) -> Schema:
    """Return the JSON schema of an object with exactly these properties.

    >>> closed(answer={"type": "string"})["required"]
    ['answer']
    """
    return Schema(
        type="object",
        properties=properties,
        required=list(properties),
        additionalProperties=False,
    )


def texts(at_least: int, at_most: int) -> dict[str, Any]:
    """Return the JSON schema of a list of so many texts."""
    bounds = {"minItems": at_least, "maxItems": at_most}
    return {"type": "array", "items": {"type": "string"}, **bounds}


YES_OR_NO = closed(answer={"type": "string", "enum": ["yes", "no"]})


def make_request(
    task: Task,
    template: str,
    material: Mapping[str, Any],
    schema: Mapping[str, Any],
    subject: Subject,
    own: Path | None,
    **values: str,
) -> JudgeRequest:
    """Return a request in a template's words; it shows the subject's images.

    Args:
      task: what kind of reply is wanted.
      template: name of the file of wording.
      material: what the reply is about; it goes in as one JSON object, which no text
        in it can close.
      schema: of the reply.
      subject: the material again, without wording.
      own: a directory with templates of the user's that replace ours.
      **values: of the template's other places.
    """
    values["material"] = json.dumps(
        material, ensure_ascii=False, indent=1, default=dict
    )
    system, user = wording.messages(template, values, own)
    shown = images.with_images(user, subject.images)
    return JudgeRequest(task, (system, shown), schema, subject)


def folded(text: str) -> str:
    """Return what two texts share that differ in case, width and spaces alone.

    >>> folded(" Ｔwo  Words") == folded("two words")
    True
    """
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())
