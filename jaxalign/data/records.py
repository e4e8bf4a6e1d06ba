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

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxalign.data.columns import (
    CompletionColumns,
    ListedSegment,
    Message,
    PairColumns,
    PromptColumns,
    Segment,
    read_columns,
    refuse_misspelt,
    shown,
)
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
            f"got {shown(columns)}"
        )
    refuse_misspelt(columns, where)
    present = {k: v for k, v in columns.items() if v is not None}
    if "completion" in present:
        return _single(present, where)
    return _pair(present, where)


def _pair(row: Mapping[str, Any], where: str) -> Record:
    _refuse_mixed(row, ("label",), "chosen and rejected", where)
    columns = read_columns(PairColumns, row, where)
    _refuse_images(columns.images, where)
    prompt = _prompt(columns.prompt, where)
    chosen = _completion(columns.chosen, "chosen", prompt, where)
    rejected = _completion(columns.rejected, "rejected", prompt, where)
    weights = (columns.chosen_token_weights, columns.rejected_token_weights)
    return Record(
        prompt=prompt,
        chosen=chosen,
        rejected=rejected,
        chosen_segments=_segments(
            columns.chosen_segments, "chosen_segments", chosen, where
        ),
        rejected_segments=_segments(
            columns.rejected_segments, "rejected_segments", rejected, where
        ),
        where=where,
        weight=columns.weight,
        chosen_token_weights=None if weights[0] is None else tuple(weights[0]),
        rejected_token_weights=None if weights[1] is None else tuple(weights[1]),
    )


def _single(row: Mapping[str, Any], where: str) -> Record:
    _refuse_mixed(row, _PAIRED, "a completion", where)
    columns = read_columns(CompletionColumns, row, where)
    _refuse_images(columns.images, where)
    prompt = _prompt(columns.prompt, where)
    completion = _completion(columns.completion, "completion", prompt, where)
    # Checked, though no objective learns from the segments of a single completion.
    _segments(columns.completion_segments, "completion_segments", completion, where)
    return Record(
        *(prompt, completion, None, None, None, where),
        label=columns.label,
        weight=columns.weight,
    )


_PAIRED = (
    "chosen_segments",
    "rejected_segments",
    "chosen_token_weights",
    "rejected_token_weights",
    "chosen",
    "rejected",
)
"""Columns that only a pair has."""


def _refuse_mixed(
    row: Mapping[str, Any], names: Iterable[str], expected: str, where: str
) -> None:
    for name in names:
        if name in row:
            raise UserError(
                f"{where}: field {name} does not go with {expected}. A record has "
                "either chosen and rejected, or completion and label"
            )


def _refuse_images(images: Sequence[str | bytes] | None, where: str) -> None:
    if images:
        raise UserError(
            f"{where}: field images: got {len(images)} image(s), but no "
            "vision-language model family is supported yet. Leave the column out"
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
            f"messages}}: got {shown(columns)}"
        )
    if columns.get("images"):
        raise UserError(
            f"{where}: field images: no vision-language model family is supported yet. "
            "Leave the column out"
        )
    row = read_columns(PromptColumns, columns, where)
    return Prompt(_prompt(row.prompt, where), columns["prompt"], where)


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
    segments: Sequence[ListedSegment] | None, field: str, text: str, where: str
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
                f"{shown(segment.start)}: got {shown(segment.end)}. Offsets are "
                "half-open"
            )
        if segment.start < previous:
            raise UserError(
                f"{where}: field {name}.start: got {shown(segment.start)}, but the "
                f"segment before ends at {previous}. Segments are ordered and do not "
                "overlap"
            )
        if segment.end > len(text):
            raise UserError(
                f"{where}: field {name}.end: got {shown(segment.end)}, but the text "
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
