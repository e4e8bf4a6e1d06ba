"""Feedback records: reading them, and refusing what is malformed.

A record is TRL's explicit-prompt preference format plus two columns that hold the
two-dimensional feedback::

    {"prompt": "text" or [{"role": "user", "content": "..."}, ...],
     "chosen": "text" or [{"role": "assistant", "content": "..."}],
     "rejected": "...",
     "chosen_segments": [{"start": 0, "end": 42, "scores": {"helpfulness": 3}}, ...],
     "rejected_segments": [...]}

``start`` and ``end`` are half-open code-point offsets into the completion's text. A
segment without ``scores`` has not been judged (yet) and counts as not listed.
Feedback may also be one-sided: ``completion`` and ``label`` (true for a desirable one)
take the place of ``chosen`` and ``rejected``; supervised training needs no label.
Optional columns are ``images`` (paths, or encoded bytes where the source can hold
them), ``weight`` (the record's loss is multiplied by it) and one number for each
completion token, the end of turn included, in ``chosen_token_weights`` and
``rejected_token_weights``.
"""

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import pydantic

from jaxalign.data.rows import read_rows
from jaxalign.errors import UserError


__all__ = [
    "Message",
    "Prompt",
    "Record",
    "Segment",
    "aspects_of",
    "parse",
    "parse_prompt",
    "read",
    "read_prompts",
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


class _Listed(_Span):
    """A segment as files have it: not every one has been judged."""

    scores: Scores | None = None


class Message(pydantic.BaseModel):
    """One turn of a conversation."""

    model_config = pydantic.ConfigDict(strict=True, extra="forbid", frozen=True)

    role: Annotated[str, pydantic.Field(min_length=1)]
    content: str


class _Columns(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(strict=True, extra="ignore")

    prompt: str | list[Message]
    chosen: str | list[Message]
    rejected: str | list[Message]
    chosen_segments: list[_Listed] | None = None
    rejected_segments: list[_Listed] | None = None
    images: list[str | bytes] | None = None
    weight: Annotated[Finite, pydantic.Field(ge=0)] = 1.0
    chosen_token_weights: list[Finite] | None = None
    rejected_token_weights: list[Finite] | None = None


class _OneSided(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(strict=True, extra="ignore")

    prompt: str | list[Message]
    completion: str | list[Message]
    completion_segments: list[_Listed] | None = None
    label: bool | None = None
    images: list[str | bytes] | None = None
    weight: Annotated[Finite, pydantic.Field(ge=0)] = 1.0


class _PromptRow(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(strict=True, extra="ignore")

    prompt: str | list[Message]


class Prompt(NamedTuple):
    """A text or a conversation that is to be completed."""

    text: str | tuple[Message, ...]
    given: Any
    """As it stood in the file."""
    where: str
    """File and line, for messages."""


class Record(NamedTuple):
    """One validated record: a preference pair, or a single completion.

    ``prompt`` is a plain text or the turns of a conversation; the completions are
    texts in both cases. Segments and token weights are None where the record has none.
    """

    prompt: str | tuple[Message, ...]
    chosen: str
    """The preferred completion, or the only one."""
    rejected: str | None
    chosen_segments: tuple[Segment, ...] | None
    rejected_segments: tuple[Segment, ...] | None
    where: str
    """File and line, for messages."""
    label: bool | None = None
    """Whether a single completion is desirable."""
    weight: float = 1.0
    chosen_token_weights: tuple[float, ...] | None = None
    rejected_token_weights: tuple[float, ...] | None = None

    @property
    def completions(self) -> tuple[str, ...]:
        """Return the chosen and the rejected completion, or the only one."""
        if self.rejected is None:
            return (self.chosen,)
        return self.chosen, self.rejected


def read(source: str | Path) -> list[Record]:
    """Read and validate every record of a file.

    Args:
      source: a ``.jsonl``, ``.jsonl.gz`` or ``.parquet`` file, or one of the other
        sources of :func:`jaxalign.data.rows.read_rows`.
    Raises:
      UserError: the file cannot be read, is empty, or a record is malformed; the text
        names file, line, field and cure.
    """
    records = [parse(columns, where) for columns, where in read_rows(source)]
    if not records:
        raise UserError(f"{source} holds no record: expected one JSON object per line")
    return records


def parse(columns: Any, where: str = "record") -> Record:
    """Validate one record given as a mapping.

    Raises:
      UserError: with ``where``, the field, what was got and how to mend it.
    """
    if not isinstance(columns, Mapping):
        raise UserError(
            f"{where}: a record must be an object with prompt, chosen and rejected: "
            f"got {_shown(columns)}"
        )
    _refuse_misspelt(columns, where)
    present = {k: v for k, v in columns.items() if v is not None}
    one_sided = "completion" in present
    for name in (*_PAIRED, "chosen", "rejected") if one_sided else ("label",):
        if name in present:
            expected = "a completion" if one_sided else "chosen and rejected"
            raise UserError(
                f"{where}: field {name} does not go with {expected}. A record has "
                "either chosen and rejected, or completion and label"
            )
    kind = _OneSided if one_sided else _Columns
    try:
        checked: Any = kind.model_validate(present)
    except pydantic.ValidationError as error:
        raise UserError(_explain(error, where)) from None
    if checked.images:
        raise UserError(
            f"{where}: field images: got {len(checked.images)} image(s), but no "
            "vision-language model family is supported yet. Leave the column out"
        )
    prompt = _prompt(checked.prompt, where)
    if one_sided:
        completion = _completion(checked.completion, "completion", prompt, where)
        # Checked, though no objective learns from the segments of a single completion.
        _segments(checked.completion_segments, "completion_segments", completion, where)
        return Record(
            *(prompt, completion, None, None, None, where),
            label=checked.label,
            weight=checked.weight,
        )
    chosen = _completion(checked.chosen, "chosen", prompt, where)
    rejected = _completion(checked.rejected, "rejected", prompt, where)
    weights = (checked.chosen_token_weights, checked.rejected_token_weights)
    return Record(
        prompt=prompt,
        chosen=chosen,
        rejected=rejected,
        chosen_segments=_segments(
            checked.chosen_segments, "chosen_segments", chosen, where
        ),
        rejected_segments=_segments(
            checked.rejected_segments, "rejected_segments", rejected, where
        ),
        where=where,
        weight=checked.weight,
        chosen_token_weights=None if weights[0] is None else tuple(weights[0]),
        rejected_token_weights=None if weights[1] is None else tuple(weights[1]),
    )


def read_prompts(source: str | Path) -> list[Prompt]:
    """Read and validate the prompts of a file; other columns are left alone.

    Raises:
      UserError: see :func:`read`.
    """
    prompts = [parse_prompt(columns, where) for columns, where in read_rows(source)]
    if not prompts:
        raise UserError(f"{source} holds no prompt: expected one JSON object per line")
    return prompts


def parse_prompt(columns: Any, where: str = "prompt") -> Prompt:
    """Validate one row that has a prompt.

    Raises:
      UserError: with ``where``, what was got and how to mend it.
    """
    if not isinstance(columns, Mapping) or columns.get("prompt") is None:
        raise UserError(
            f'{where}: expected an object with the field prompt, {{"prompt": text or '
            f"messages}}: got {_shown(columns)}"
        )
    if columns.get("images"):
        raise UserError(
            f"{where}: field images: no vision-language model family is supported yet. "
            "Leave the column out"
        )
    try:
        asked = _PromptRow.model_validate(columns)
    except pydantic.ValidationError as error:
        raise UserError(_explain(error, where)) from None
    return Prompt(_prompt(asked.prompt, where), columns["prompt"], where)


_PAIRED = (
    "chosen_segments",
    "rejected_segments",
    "chosen_token_weights",
    "rejected_token_weights",
)
"""Columns that only a pair has."""


def aspects_of(records: Iterable[Record]) -> tuple[str, ...]:
    """Return the names of all aspects that any segment is scored on, sorted."""
    names: set[str] = set()
    for record in records:
        for segment in (
            *(record.chosen_segments or ()),
            *(record.rejected_segments or ()),
        ):
            names.update(segment.scores)
    return tuple(sorted(names))


def _refuse_misspelt(columns: Mapping[str, Any], where: str) -> None:
    known = set(_Columns.model_fields) | set(_OneSided.model_fields)
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
    text = f"{where}: field {field}: {expected}: got {_shown(problem['input'])}"
    # Field names come from the file: half a surrogate pair could not be printed.
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _shown(value: Any) -> str:
    """Show a value without spilling a text that may be long or offensive."""
    if isinstance(value, str):
        return f"a text of {len(value)} characters"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    if isinstance(value, Mapping):
        return f"an object with {', '.join(map(str, list(value)[:6])) or 'no fields'}"
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _prompt(prompt: str | Sequence[Message], where: str) -> str | tuple[Message, ...]:
    if isinstance(prompt, str):
        _check_text(prompt, "prompt", where)
        return prompt
    if not prompt:
        raise UserError(
            f"{where}: field prompt: expected at least one message: got none"
        )
    for i, message in enumerate(prompt):
        _check_text(message.content, f"prompt[{i}].content", where)
        _check_text(message.role, f"prompt[{i}].role", where)
    if prompt[-1].role == "assistant":
        raise UserError(
            f"{where}: field prompt: the last message is the assistant's. Expected the "
            "turn that the completions answer: move it into chosen and rejected"
        )
    return tuple(prompt)


def _completion(
    value: str | Sequence[Message],
    field: str,
    prompt: str | tuple[Message, ...],
    where: str,
) -> str:
    if isinstance(value, str):
        _check_text(value, field, where)
        return value
    if isinstance(prompt, str):
        raise UserError(
            f"{where}: field {field}: messages, but the prompt is a plain text. "
            "Give both as texts, or the prompt as messages too"
        )
    if len(value) != 1 or value[0].role != "assistant":
        roles = ", ".join(message.role for message in value) or "none"
        raise UserError(
            f"{where}: field {field}: expected exactly one assistant message: got "
            f"{roles}. Put the turns that both completions share into prompt"
        )
    _check_text(value[0].content, f"{field}[0].content", where)
    return value[0].content


def _check_text(text: str, field: str, where: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: field {field}: character {error.start} is half of a surrogate "
            "pair, which is no text. Escape the character as a whole pair, or as UTF-8"
        ) from None


def _segments(
    segments: Sequence[_Listed] | None, field: str, text: str, where: str
) -> tuple[Segment, ...] | None:
    """Check all segments and return those that have scores."""
    if segments is None:
        return None
    previous, scored = 0, []
    for i, segment in enumerate(segments):
        name = f"{field}[{i}]"
        if segment.end <= segment.start:
            raise UserError(
                f"{where}: field {name}.end: expected more than start="
                f"{_shown(segment.start)}: got {_shown(segment.end)}. Offsets are "
                "half-open"
            )
        if segment.start < previous:
            raise UserError(
                f"{where}: field {name}.start: got {_shown(segment.start)}, but the "
                f"segment before ends at {previous}. Segments are ordered and do not "
                "overlap"
            )
        if segment.end > len(text):
            raise UserError(
                f"{where}: field {name}.end: got {_shown(segment.end)}, but the text "
                f"has {len(text)} characters. Offsets count code points, not bytes"
            )
        for aspect, score in (segment.scores or {}).items():
            _check_text(aspect, f"{name}.scores", where)
            if not aspect or not math.isfinite(score):
                raise UserError(
                    f"{where}: field {name}.scores: got {aspect!r}: {score}; expected "
                    "a name and a finite number"
                )
        previous = segment.end
        if segment.scores is not None:
            scored.append(
                Segment(start=segment.start, end=segment.end, scores=segment.scores)
            )
    return tuple(scored)
