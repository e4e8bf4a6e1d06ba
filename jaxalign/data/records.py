"""Feedback records: reading them, and refusing what is malformed.

A record is TRL's explicit-prompt preference format plus two columns that hold the
two-dimensional feedback::

    {"prompt": "text" or [{"role": "user", "content": "..."}, ...],
     "chosen": "text" or [{"role": "assistant", "content": "..."}],
     "rejected": "...",
     "chosen_segments": [{"start": 0, "end": 42, "scores": {"helpfulness": 3}}, ...],
     "rejected_segments": [...]}

``start`` and ``end`` are half-open code-point offsets into the completion's text.
Feedback may also be one-sided: ``completion`` and ``label`` (true for a desirable one)
take the place of ``chosen`` and ``rejected``; supervised training needs no label.
Optional columns are ``weight`` (the record's loss is multiplied by it) and one number
for each completion token, the end of turn included, in ``chosen_token_weights`` and
``rejected_token_weights``.
"""

import difflib
import gzip
import json
import math
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import pydantic

from jaxalign.errors import UserError


__all__ = ["Message", "Record", "Segment", "aspects_of", "parse", "read"]

_LARGEST = float(np.finfo(np.float32).max)
# Scores are float32 on the devices: what overflows there is not finite either.
Finite = Annotated[
    float, pydantic.Field(allow_inf_nan=False, ge=-_LARGEST, le=_LARGEST)
]


class Segment(pydantic.BaseModel):
    """A stretch of a completion with its scores by aspect."""

    model_config = pydantic.ConfigDict(strict=True, extra="forbid", frozen=True)

    start: Annotated[int, pydantic.Field(ge=0)]
    end: int
    scores: Annotated[dict[str, Finite], pydantic.Field(min_length=1)]


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
    chosen_segments: list[Segment] | None = None
    rejected_segments: list[Segment] | None = None
    images: list[str] | None = None
    weight: Annotated[Finite, pydantic.Field(ge=0)] = 1.0
    chosen_token_weights: list[Finite] | None = None
    rejected_token_weights: list[Finite] | None = None


class _OneSided(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(strict=True, extra="ignore")

    prompt: str | list[Message]
    completion: str | list[Message]
    label: bool | None = None
    images: list[str] | None = None
    weight: Annotated[Finite, pydantic.Field(ge=0)] = 1.0


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


def read(source: str | Path) -> list[Record]:
    """Read and validate every record of a file.

    Args:
      source: a ``.jsonl`` (also ``.jsonl.gz``) or ``.parquet`` file, or
        ``tfds:NAME_OR_DIRECTORY:SPLIT`` for a tensorflow-datasets source.
    Raises:
      UserError: the file cannot be read, is empty, or a record is malformed; the text
        names file, line, field and cure.
    """
    records = [parse(columns, where) for columns, where in _rows(str(source))]
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


def _rows(source: str) -> Iterator[tuple[Any, str]]:
    if source.startswith("tfds:"):
        yield from _tfds_rows(source)
        return
    path = Path(source)
    if not path.is_file():
        raise UserError(
            f"{source} is not a file: expected a .jsonl, .jsonl.gz or .parquet file of "
            "feedback records, or tfds:NAME:SPLIT"
        )
    if path.suffix == ".parquet":
        yield from _parquet_rows(path)
    else:
        yield from _json_rows(path)


def _json_rows(path: Path) -> Iterator[tuple[Any, str]]:
    opened: Any = gzip.open(path) if path.suffix == ".gz" else path.open("rb")
    with opened as lines:
        number = 0
        while True:
            try:
                raw = lines.readline()
            except (OSError, EOFError, zlib.error) as error:
                raise UserError(
                    f"{path}:{number + 1}: the file cannot be read: {error}"
                ) from None
            if not raw:
                return
            number += 1
            if not raw.strip():
                continue
            where = f"{path}:{number}"
            try:
                yield json.loads(raw), where
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{where}: not UTF-8 ({error.reason} at byte {error.start}). "
                    "Save the file as UTF-8"
                ) from None
            except (json.JSONDecodeError, RecursionError) as error:
                raise UserError(
                    f"{where}: not a JSON object: {error}. "
                    "Expected one JSON object per line (JSON Lines)"
                ) from None
            except ValueError as error:  # an integer of thousands of digits
                raise UserError(f"{where}: not usable JSON: {error}") from None


def _parquet_rows(path: Path) -> Iterator[tuple[Any, str]]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path)
        number = 0
        for batch in table.iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield _without_missing_scores(row), f"{path}:row {number}"
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable Parquet file: {error}") from None


def _tfds_rows(source: str) -> Iterator[tuple[Any, str]]:
    import tensorflow_datasets as tfds

    _, name, split = (source.split(":", 2) + ["", ""])[:3]
    if not name or not split:
        raise UserError(
            f"{source!r} names no split: expected tfds:NAME_OR_DIRECTORY:SPLIT, "
            "such as tfds:/data/my_feedback/1.0.0:train"
        )
    data: Any
    try:
        if Path(name).is_dir():
            builder: Any = tfds.builder_from_directory(name)
            data = builder.as_data_source(split)
        else:
            data = tfds.data_source(name, split=split)
    except Exception as error:  # tfds raises many kinds, all about its arguments
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{source}: tensorflow-datasets says: {reason}") from None
    for number in range(len(data)):
        where = f"{source}:row {number + 1}"
        try:
            row = _untensored(data[number])
        except UnicodeDecodeError as error:
            raise UserError(f"{where}: not UTF-8: {error}. Store UTF-8") from None
        except (IndexError, TypeError) as error:
            raise UserError(
                f"{where}: not laid out as a feedback record: {error}. Expected Text, "
                "or a Sequence of {role, content} or {start, end, scores}"
            ) from None
        yield row, where


def _without_missing_scores(row: Mapping[str, Any]) -> dict[str, Any]:
    """Drop the nulls by which Arrow fills aspects that a segment was not scored on."""
    cleaned = dict(row)
    for column in ("chosen_segments", "rejected_segments"):
        segments = cleaned.get(column)
        for segment in segments if isinstance(segments, list) else ():
            if isinstance(segment, dict) and isinstance(segment.get("scores"), dict):
                scores = segment["scores"].items()
                segment["scores"] = {k: v for k, v in scores if v is not None}
    return cleaned


def _untensored(value: Any) -> Any:
    """Turn what tfds returns (bytes, arrays, dicts of lists) into plain values."""
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if isinstance(value, Mapping):
        plain = {str(k): _untensored(v) for k, v in value.items()}
        for column in (
            *("prompt", "chosen", "rejected", "completion"),
            *("chosen_segments", "rejected_segments"),
        ):
            if column in plain:
                plain[column] = _rows_of_columns(plain[column])
        return {k: v for k, v in plain.items() if v is not None}
    if hasattr(value, "tolist"):
        return _untensored(value.tolist())
    if isinstance(value, list | tuple):
        return [_untensored(v) for v in value]
    return value


def _rows_of_columns(value: Any) -> Any:
    """Turn a dict of equally long lists into a list of dicts, scores included."""
    if not isinstance(value, dict):
        return value
    columns = {
        k: _rows_of_columns(v) if isinstance(v, dict) else v for k, v in value.items()
    }
    length = len(next(iter(columns.values()), []))
    return [{k: v[i] for k, v in columns.items()} for i in range(length)]


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
            problem["type"] not in ("string_type", "list_type"),
            len(problem["loc"]),
        )

    problem = max(error.errors(include_url=False), key=relevance)
    field = ""
    for part in problem["loc"]:
        if part in ("str", "list[Message]"):
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
    segments: Sequence[Segment] | None, field: str, text: str, where: str
) -> tuple[Segment, ...] | None:
    if segments is None:
        return None
    previous = 0
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
        for aspect, score in segment.scores.items():
            _check_text(aspect, f"{name}.scores", where)
            if not aspect or not math.isfinite(score):
                raise UserError(
                    f"{where}: field {name}.scores: got {aspect!r}: {score}; expected "
                    "a name and a finite number"
                )
        previous = segment.end
    return tuple(segments)
