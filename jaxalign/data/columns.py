"""The columns of a record's row: their types, and what is said of a wrong one.

What one column must be to another is checked in :mod:`jaxalign.data.records`.
"""

import difflib
import json
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

import numpy as np
import pydantic

from jaxalign import progress
from jaxalign.data.messages import Message, without_nulls
from jaxalign.errors import UserError


__all__ = [
    "CompletionColumns",
    "ListedSegment",
    "PairColumns",
    "PromptColumns",
    "Rendered",
    "Segment",
    "check_template_kwargs",
    "is_slip",
    "name_unused",
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
    turn: Annotated[int, pydantic.Field(ge=0)] = 0
    """Which of the completion's assistant turns it is a stretch of, from 0."""


class Segment(_Span):
    """A stretch of a completion with its scores by aspect, none if not judged (yet)."""

    scores: dict[str, Finite] = pydantic.Field(default_factory=dict)


class ListedSegment(_Span):
    """A segment as files have it: not every one has been judged."""

    scores: Scores | None = None

    @pydantic.model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, given: Any) -> Any:
        """Drop scores that are null; a segment without any other is not judged."""
        if not isinstance(given, Mapping):
            return given
        kept = {k: v for k, v in given.items() if v is not None}
        scores = kept.get("scores")
        if isinstance(scores, Mapping) and None in scores.values():
            judged = {k: v for k, v in scores.items() if v is not None}
            kept["scores"] = judged or None
        return kept


def _from_json(value: Any) -> Any:
    """Read what is written as JSON, as TRL lets ``tools`` be."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value


def _truth(value: Any) -> Any:
    """Read 0 and 1 as what they stand for."""
    whole = isinstance(value, int | float) and value in (0, 1)
    return bool(value) if whole else value


Tools = Annotated[list[dict[str, Any]] | None, pydantic.BeforeValidator(_from_json)]
TemplateKwargs = Annotated[dict[str, Any] | None, pydantic.BeforeValidator(_from_json)]


class Rendered(pydantic.BaseModel):
    """What a row says of how its prompt is rendered."""

    model_config = pydantic.ConfigDict(strict=True, extra="ignore")

    prompt: str | list[Message]
    # Arrays and opened pictures are no JSON: see jaxalign.data.record_images.
    images: Any = None
    image: Any = None
    tools: Tools = None
    chat_template_kwargs: TemplateKwargs = None

    @property
    def template_kwargs(self) -> dict[str, Any]:
        """Return what the chat template is given beside the conversation."""
        given = without_nulls(self.chat_template_kwargs or {})
        return {"tools": self.tools, **given} if self.tools else given


class PairColumns(Rendered):
    """A preference pair."""

    chosen: str | list[Message]
    rejected: str | list[Message]
    chosen_segments: list[ListedSegment] | None = None
    rejected_segments: list[ListedSegment] | None = None
    weight: Annotated[Finite, pydantic.Field(ge=0)] = 1.0
    chosen_token_weights: list[Finite] | None = None
    rejected_token_weights: list[Finite] | None = None


class CompletionColumns(Rendered):
    """A single completion, and whether it is desirable."""

    completion: str | list[Message]
    completion_segments: list[ListedSegment] | None = None
    label: Annotated[bool | None, pydantic.BeforeValidator(_truth)] = None
    weight: Annotated[Finite, pydantic.Field(ge=0)] = 1.0


class PromptColumns(Rendered):
    """What is to be completed, whatever else the row has."""


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
    """Refuse a column that is one of ours with a slip of the pen.

    Two slips at most, so that other people's columns are left alone.

    Raises:
      UserError: with the name that was meant.
    """
    known = {*PairColumns.model_fields, *CompletionColumns.model_fields}
    sides = {"completion"} if "chosen" in columns or "rejected" in columns else set()
    meant = known - sides - set(columns)
    for name in columns:
        if name in known or name in _OTHERS or not isinstance(name, str):
            continue
        near = [other for other in sorted(meant) if is_slip(name, other)]
        if near:
            raise UserError(
                f"{where}: unknown field {name!r}. Did you mean {near[0]}? "
                "Rename the column (other columns are ignored)"
            )


_NEEDED = {"prompt", "chosen", "rejected", "completion"}
_OTHERS = {"labels", "weights", "height"}
"""Columns of other people that differ from ours by one letter."""

_TRL = {
    "ref_chosen_logps": "the reference is computed, or cached (--reference cached)",
    "ref_rejected_logps": "the reference is computed, or cached (--reference cached)",
    "margin": "no objective here has a margin of each record's own",
}
"""Columns that TRL reads and we do not, with what is done instead."""


def name_unused(columns: Mapping[str, Any]) -> None:
    """Say once of each column that TRL would use that it is not used here."""
    for name, instead in _TRL.items():
        if columns.get(name) is not None:
            progress.say_once(f"column {name} is not used: {instead}")


def is_slip(name: str, meant: str) -> bool:
    """Tell whether a name is another with a letter or two too many, too few or moved.

    >>> is_slip("chosen_segmnets", "chosen_segments"), is_slip("weigth", "weight")
    (True, True)
    >>> is_slip("chosen_len", "chosen_segments"), is_slip("width", "weight")
    (False, False)
    """
    if sorted(name) == sorted(meant):
        return True
    matcher = difflib.SequenceMatcher(None, name, meant, autojunk=False)
    same = sum(block.size for block in matcher.get_matching_blocks())
    slips = max(len(name), len(meant)) - same
    return slips <= (2 if len(meant) > 10 else 1)


def _explain(error: pydantic.ValidationError, where: str) -> str:
    # The branch of "text or list of messages" that fits the value's type says most.
    def relevance(problem: Any) -> tuple[bool, int]:
        return (
            problem["type"] not in ("string_type", "list_type", "bytes_type"),
            len(problem["loc"]),
        )

    problem = max(error.errors(include_url=False), key=relevance)
    field = ""
    for i, part in enumerate(problem["loc"]):
        # Which branch of a union was tried is no part of the field's name.
        if part in ("str", "bytes") or str(part).startswith(("list[", "function-")):
            continue
        if i > 1 and str(problem["loc"][i - 2]).startswith("list[tagged-union"):
            continue
        field += (
            f"[{part}]" if isinstance(part, int) else f".{part}" if field else f"{part}"
        )
    if problem["type"].startswith("content_"):
        field += ".content"
    if problem["type"] in ("missing", "content_missing"):
        return (
            f"{where}: field {field} is missing. "
            "A record needs prompt, chosen and rejected (or prompt, completion and "
            "label); a message role and content; a segment start, end and scores"
        )
    expected = problem["msg"][0].lower() + problem["msg"][1:]
    if field in _NEEDED:
        expected = "expected a text or a list of {role, content} messages"
    if field in ("tools", "chat_template_kwargs"):
        what = "a list of JSON schemas" if field == "tools" else "an object"
        expected = f"expected {what}, or one written as JSON"
    if problem["type"] in ("model_type", "model_attributes_type"):
        expected = "expected an object"
    if problem["type"].startswith("model_") and ".content[" in field:
        expected = 'expected a part of a text, {"type": "text", "text": ...}'
    if problem["type"] == "extra_forbidden":
        expected = "not a known field here; remove or rename it"
    text = f"{where}: field {field}: {expected}: got {shown(problem['input'])}"
    # Field names come from the file: half a surrogate pair could not be printed.
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def check_template_kwargs(given: Mapping[str, Any], name: str) -> None:
    """Refuse what a chat template is given where it is not for users to say.

    Args:
      given: options of the template.
      name: where they stand, for messages.
    Raises:
      UserError: with the option.
    """
    for option in sorted(_OURS & set(given)):
        raise UserError(
            f"{name}: {option} is set by jaxalign itself. Take it out: expected what "
            "the chat template looks at, such as enable_thinking"
        )


_OURS = {
    *("conversation", "tokenize", "add_generation_prompt", "continue_final_message"),
    *("return_dict", "return_tensors", "return_assistant_tokens_mask"),
    *("padding", "truncation", "max_length", "chat_template"),
}
"""Options of ``apply_chat_template`` that decide what is made of a conversation."""


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
