"""The columns of a record's row: their types, and what is said of a wrong one.

What one column must be to another is checked in :mod:`jaxalign.data.records`.
"""

import difflib
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

import numpy as np
import pydantic

from jaxalign.errors import UserError


__all__ = [
    "CompletionColumns",
    "ListedSegment",
    "Message",
    "PairColumns",
    "PromptColumns",
    "Segment",
    "read_columns",
    "refuse_misspelt",
    "shown",
]

_LARGEST = float(np.finfo(np.float32).max)
# Scores are float32 on the devices: what overflows there is not finite either.
Finite = Annotated[
    float, pydantic.Field(allow_inf_nan=False, ge=-_LARGEST, le=_LARGEST)
]
Scores = Annotated[dict[str, Finite], pydantic.Field(min_length=1)]


class _Span(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(strict=True, extra="forbid", frozen=True)

    start: Annotated[int, pydantic.Field(ge=0)]
    end: int


class Segment(_Span):
    """A stretch of a completion with its scores by aspect."""

    scores: Scores


class ListedSegment(_Span):
    """A segment as files have it: not every one has been judged."""

    scores: Scores | None = None


class Message(pydantic.BaseModel):
    """One turn of a conversation."""

    model_config = pydantic.ConfigDict(strict=True, extra="forbid", frozen=True)

    role: Annotated[str, pydantic.Field(min_length=1)]
    content: str


class PairColumns(pydantic.BaseModel):
    """A preference pair."""

    model_config = pydantic.ConfigDict(strict=True, extra="ignore")

    prompt: str | list[Message]
    chosen: str | list[Message]
    rejected: str | list[Message]
    chosen_segments: list[ListedSegment] | None = None
    rejected_segments: list[ListedSegment] | None = None
    images: list[str | bytes] | None = None
    weight: Annotated[Finite, pydantic.Field(ge=0)] = 1.0
    chosen_token_weights: list[Finite] | None = None
    rejected_token_weights: list[Finite] | None = None


class CompletionColumns(pydantic.BaseModel):
    """A single completion, and whether it is desirable."""

    model_config = pydantic.ConfigDict(strict=True, extra="ignore")

    prompt: str | list[Message]
    completion: str | list[Message]
    completion_segments: list[ListedSegment] | None = None
    label: bool | None = None
    images: list[str | bytes] | None = None
    weight: Annotated[Finite, pydantic.Field(ge=0)] = 1.0


class PromptColumns(pydantic.BaseModel):
    """What is to be completed, whatever else the row has."""

    model_config = pydantic.ConfigDict(strict=True, extra="ignore")

    prompt: str | list[Message]


Columns = TypeVar("Columns", bound=pydantic.BaseModel)


def read_columns(kind: type[Columns], row: Mapping[str, Any], where: str) -> Columns:
    """Return the columns of a row, each of its type.

    Raises:
      UserError: with ``where``, the field, what was got and what was expected.
    """
    try:
        return kind.model_validate(row)
    except pydantic.ValidationError as error:
        raise UserError(_explain(error, where)) from None


def refuse_misspelt(columns: Mapping[str, Any], where: str) -> None:
    """Refuse a column that is nearly one of ours; others are ignored.

    Raises:
      UserError: with the name that was meant.
    """
    known = set(PairColumns.model_fields) | set(CompletionColumns.model_fields)
    for name in columns:
        if name in known or not isinstance(name, str):
            continue
        # Near, but not as far as TRL's own column "messages" is from "images".
        near = difflib.get_close_matches(name, known - set(columns), n=1, cutoff=0.72)
        if near:
            raise UserError(
                f"{where}: unknown field {name!r}. Did you mean {near[0]}? "
                "Rename the column (other columns are ignored)"
            )


def _explain(error: pydantic.ValidationError, where: str) -> str:
    # The branch of "text or list of messages" that fits the value's type says most.
    def relevance(problem: Any) -> tuple[bool, int]:
        return (
            problem["type"] not in ("string_type", "list_type", "bytes_type"),
            len(problem["loc"]),
        )

    problem = max(error.errors(include_url=False), key=relevance)
    field = ""
    for part in problem["loc"]:
        if part in ("str", "bytes", "list[Message]"):
            continue
        field += (
            f"[{part}]" if isinstance(part, int) else f".{part}" if field else f"{part}"
        )
    if problem["type"] == "missing":
        return (
            f"{where}: field {field} is missing. "
            "A record needs prompt, chosen and rejected (or prompt, completion and "
            "label); a message role and content; a segment start, end and scores"
        )
    expected = problem["msg"][0].lower() + problem["msg"][1:]
    if field in ("prompt", "chosen", "rejected", "completion"):
        expected = "expected a text or a list of {role, content} messages"
    if problem["type"] == "extra_forbidden":
        expected = "not a known field here; remove or rename it"
    text = f"{where}: field {field}: {expected}: got {shown(problem['input'])}"
    # Field names come from the file: half a surrogate pair could not be printed.
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def shown(value: Any) -> str:
    """Show a value without spilling a text that may be long or offensive."""
    if isinstance(value, str):
        return f"a text of {len(value)} characters"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    if isinstance(value, Mapping):
        return f"an object with {', '.join(map(str, list(value)[:6])) or 'no fields'}"
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
