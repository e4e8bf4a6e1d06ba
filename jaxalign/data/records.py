"""Feedback records: reading them, and refusing what is malformed.

A record is TRL's explicit-prompt preference format plus two columns that hold the
two-dimensional feedback::

    {"prompt": "text" or [{"role": "user", "content": "..."}, ...],
     "chosen": "text" or [{"role": "assistant", "content": "..."}],
     "rejected": "...",
     "chosen_segments": [{"start": 0, "end": 42, "scores": {"helpfulness": 3}}, ...],
     "rejected_segments": [...]}

``start`` and ``end`` are half-open code-point offsets into the completion's text. A
segment without ``scores`` has not been judged (yet): its tokens are summed as any
segment's, and what learns from scores leaves it out; a score that is null is none.
Feedback may also be one-sided: ``completion`` and ``label`` (true or 1 for a desirable
one) take the place of ``chosen`` and ``rejected``; supervised training needs no label.

Turns are what chat templates take: ``content`` is a text or a list of
``{"type": "text", "text": ...}``, and may be null beside ``tool_calls``; roles such as
``tool``, and ``reasoning_content``, go to the template as they are. A prompt that ends
with an assistant's turn is one that the completion goes on with. A completion may have
several turns: the assistant's are learnt, and a segment says which of these it is in by
its ``turn``, from 0.

Optional columns are ``tools`` (JSON schemas, as a list or written as JSON) and
``chat_template_kwargs`` (an object), which the chat template is given; ``images`` (or
one ``image``), see :mod:`jaxalign.data.record_images`; ``weight`` (the record's loss is
multiplied by it) and one number for each completion token, the end of turn included, in
``chosen_token_weights`` and ``rejected_token_weights``.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from jaxalign.data import collector, layouts, record_images
from jaxalign.data.columns import (
    CompletionColumns,
    PairColumns,
    PromptColumns,
    Rendered,
    Segment,
    check_template_kwargs,
    name_unused,
    read_columns,
    refuse_misspelt,
    shown,
)
from jaxalign.data.completions import Completion, read_completion, texts_of
from jaxalign.data.given import name_of
from jaxalign.data.messages import Message, check_text, check_turn
from jaxalign.data.picture import Picture
from jaxalign.data.rows import image_base
from jaxalign.data.segments import read_segments
from jaxalign.errors import UserError


__all__ = [
    "PROMPT_COLUMNS",
    "Completion",
    "Message",
    "Prompt",
    "Record",
    "Segment",
    "as_records",
    "aspects_of",
    "from_rows",
    "parse",
    "parse_prompt",
    "read",
    "read_prompts",
    "texts_of",
]

PROMPT_COLUMNS = ("tools", "chat_template_kwargs", *record_images.COLUMNS)
"""What a record that is made of a prompt needs of its row, beside the prompt."""

_NO_KWARGS: Mapping[str, Any] = MappingProxyType({})
_HERE = Path()


class Prompt(NamedTuple):
    """A text or a conversation that is to be completed."""

    text: str | tuple[Message, ...]
    given: Any
    """As it stood in the file."""
    where: str
    """File and line, for messages."""
    template_kwargs: Mapping[str, Any] = _NO_KWARGS
    """What the chat template is given beside the conversation, such as ``tools``."""
    images: tuple[Picture, ...] = ()
    """One for each image part of a conversation, in the order of these."""
    image_columns: Mapping[str, Any] = _NO_KWARGS
    """The columns of these as they stood in the file."""


class Record(NamedTuple):
    """One validated record: a preference pair, or a single completion.

    ``prompt`` is a plain text or the turns of a conversation; a completion is a text in
    both cases, or turns (see :data:`Completion`). Segments and token weights are None
    where the record has none.
    """

    prompt: str | tuple[Message, ...]
    chosen: Completion
    """The preferred completion, or the only one."""
    rejected: Completion | None
    chosen_segments: tuple[Segment, ...] | None
    rejected_segments: tuple[Segment, ...] | None
    where: str
    """File and line, for messages."""
    label: bool | None = None
    """Whether a single completion is desirable."""
    weight: float = 1.0
    chosen_token_weights: tuple[float, ...] | None = None
    rejected_token_weights: tuple[float, ...] | None = None
    template_kwargs: Mapping[str, Any] = _NO_KWARGS
    """What the chat template is given beside the conversation, such as ``tools``."""
    images: tuple[Picture, ...] = ()
    """The prompt's: one for each image part of a conversation, in their order."""

    @property
    def completions(self) -> tuple[Completion, ...]:
        """Return the chosen and the rejected completion, or the only one."""
        if self.rejected is None:
            return (self.chosen,)
        return self.chosen, self.rejected


def from_rows(
    rows: Iterable[Any] | Any,
    layout: str | None = None,
    *,
    image_dir: str | Path | None = None,
) -> list[Record]:
    """Validate rows that Python has: any iterable of dicts, or a table.

    Args:
      rows: a list of dicts, a generator, a ``datasets.Dataset`` or ``IterableDataset``,
        a data source of tensorflow-datasets, a pandas, polars or Arrow table; see
        :func:`jaxalign.data.given.rows_of`. Records among them stay as they are.
      layout: see :func:`read`.
      image_dir: where relative paths of pictures start; default the working directory.
    Raises:
      UserError: see :func:`read`; it says the row's number.
    Example:
      >>> rows = [{"prompt": "Q", "chosen": "a", "rejected": "b", "completion": None}]
      >>> from_rows(rows)[0].chosen
      'a'
    """
    return read(rows, layout, image_dir=image_dir)


def as_records(rows: Iterable[Any] | Any) -> list[Record]:
    """Return a list of records as it is, also of none, and any others' rows read.

    >>> as_records([{"prompt": "2 + 2?", "chosen": "4", "rejected": "5"}])[0].chosen
    '4'
    """
    if isinstance(rows, list | tuple) and all(isinstance(r, Record) for r in rows):
        return list(rows)
    return from_rows(rows)


def read(
    source: Any, layout: str | None = None, *, image_dir: str | Path | None = None
) -> list[Record]:
    """Read and validate every record of a file, or of rows.

    Args:
      source: a ``.jsonl``, ``.jsonl.gz`` or ``.parquet`` file, or one of the other
        sources of :func:`jaxalign.data.rows.read_rows`.
      layout: of its rows, a key of :data:`jaxalign.data.layouts.LAYOUTS`; default what
        the first row's columns say.
      image_dir: where relative paths of pictures start; default beside the file, see
        :func:`jaxalign.data.rows.image_base`.
    Raises:
      UserError: the file cannot be read, is empty, or a record is malformed; the text
        names file, line, field and cure.
    Example:
      >>> import tempfile
      >>> path = Path(tempfile.mkdtemp()) / "pairs.jsonl"
      >>> _ = path.write_text('{"prompt": "2 + 2?", "chosen": "4", "rejected": "5"}')
      >>> [record.rejected for record in read(path)]
      ['5']
    """
    base = image_base(source, image_dir)
    with collector.paused():
        records = [
            columns if isinstance(columns, Record) else parse(columns, where, base)
            for columns, where in layouts.read(source, layout)
        ]
    if not records:
        raise UserError(
            f"{name_of(source)} holds no record: expected one JSON object per line"
        )
    return records


def parse(
    columns: Any, where: str = "record", image_dir: Path | None = _HERE
) -> Record:
    """Validate one record given as a mapping.

    Args:
      columns: the record's.
      where: file and line, for messages.
      image_dir: where relative paths of pictures start; None refuses them.
    Raises:
      UserError: with ``where``, the field, what was got and how to mend it.
    Example:
      >>> parse({"prompt": "2 + 2?", "chosen": "4", "rejected": "5"}).rejected
      '5'
    """
    if not isinstance(columns, Mapping):
        raise UserError(
            f"{where}: a record must be an object with prompt, chosen and rejected: "
            f"got {shown(columns)}"
        )
    refuse_misspelt(columns, where)
    name_unused(columns)
    present = {k: v for k, v in columns.items() if v is not None}
    if "completion" in present:
        return _single(present, where, image_dir)
    return _pair(present, where, image_dir)


def _pair(row: Mapping[str, Any], where: str, image_dir: Path | None) -> Record:
    _refuse_mixed(row, ("label",), "chosen and rejected", where)
    columns = read_columns(PairColumns, row, where)
    prompt, images = _prompt(columns, where, image_dir)
    chosen = read_completion(columns.chosen, "chosen", prompt, where)
    rejected = read_completion(columns.rejected, "rejected", prompt, where)
    weights = (columns.chosen_token_weights, columns.rejected_token_weights)
    return Record(
        prompt=prompt,
        chosen=chosen,
        rejected=rejected,
        chosen_segments=read_segments(
            columns.chosen_segments, "chosen_segments", texts_of(chosen), where
        ),
        rejected_segments=read_segments(
            columns.rejected_segments, "rejected_segments", texts_of(rejected), where
        ),
        where=where,
        weight=columns.weight,
        chosen_token_weights=None if weights[0] is None else tuple(weights[0]),
        rejected_token_weights=None if weights[1] is None else tuple(weights[1]),
        template_kwargs=_template_kwargs(columns, where),
        images=images,
    )


def _single(row: Mapping[str, Any], where: str, image_dir: Path | None) -> Record:
    _refuse_mixed(row, _PAIRED, "a completion", where)
    columns = read_columns(CompletionColumns, row, where)
    prompt, images = _prompt(columns, where, image_dir)
    completion = read_completion(columns.completion, "completion", prompt, where)
    # Checked, though no objective learns from the segments of a single completion.
    read_segments(
        columns.completion_segments, "completion_segments", texts_of(completion), where
    )
    return Record(
        *(prompt, completion, None, None, None, where),
        label=None if columns.label is None else bool(columns.label),
        weight=columns.weight,
        template_kwargs=_template_kwargs(columns, where),
        images=images,
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


def read_prompts(
    source: Any, layout: str | None = None, *, image_dir: str | Path | None = None
) -> list[Prompt]:
    """Read and validate the prompts of a file or of rows; other columns are left alone.

    Args:
      source: see :func:`read`.
      layout: see :func:`read`.
      image_dir: see :func:`read`.
    Raises:
      UserError: see :func:`read`.
    Example:
      >>> [p.text for p in read_prompts([{"prompt": "2 + 2?", "answer": "4"}])]
      ['2 + 2?']
    """
    base = image_base(source, image_dir)
    found = layouts.read(source, layout)
    prompts = [parse_prompt(columns, where, base) for columns, where in found]
    if not prompts:
        raise UserError(
            f"{name_of(source)} holds no prompt: expected one JSON object per line"
        )
    return prompts


def parse_prompt(
    columns: Any, where: str = "prompt", image_dir: Path | None = _HERE
) -> Prompt:
    """Validate one row that has a prompt.

    Args:
      columns: the row's.
      where: file and line, for messages.
      image_dir: where relative paths of pictures start; None refuses them.
    Raises:
      UserError: with ``where``, what was got and how to mend it.
    Example:
      >>> turns = [{"role": "user", "content": "2 + 2?"}]
      >>> parse_prompt({"prompt": turns}).text[0].text
      '2 + 2?'
    """
    if not isinstance(columns, Mapping) or columns.get("prompt") is None:
        raise UserError(
            f'{where}: expected an object with the field prompt, {{"prompt": text or '
            f"messages}}: got {shown(columns)}"
        )
    row = read_columns(PromptColumns, columns, where)
    prompt, images = _prompt(row, where, image_dir)
    given, kwargs = columns["prompt"], _template_kwargs(row, where)
    kept = {k: columns[k] for k in record_images.COLUMNS if columns.get(k) is not None}
    return Prompt(prompt, given, where, kwargs, images, kept)


def aspects_of(records: Iterable[Record] | Any) -> tuple[str, ...]:
    """Return the names of all aspects that any segment is scored on, sorted.

    ``records`` may be rows too, see :func:`from_rows`.

    >>> one = [{"start": 0, "end": 1, "scores": {"correctness": 4}}]
    >>> row = {"prompt": "2 + 2?", "chosen": "4", "rejected": "5"}
    >>> aspects_of([{**row, "chosen_segments": one, "rejected_segments": one}])
    ('correctness',)
    """
    names: set[str] = set()
    for record in as_records(records):
        for segment in (
            *(record.chosen_segments or ()),
            *(record.rejected_segments or ()),
        ):
            names.update(segment.scores)
    return tuple(sorted(names))


def _prompt(
    columns: Rendered, where: str, image_dir: Path | None
) -> tuple[str | tuple[Message, ...], tuple[Picture, ...]]:
    prompt = columns.prompt
    if isinstance(prompt, str):
        check_text(prompt, "prompt", where)
    elif not prompt:
        raise UserError(
            f"{where}: field prompt: expected at least one message: got none"
        )
    else:
        for i, message in enumerate(prompt):
            check_turn(message, f"prompt[{i}]", where)
    return record_images.placed(columns, where, image_dir)


def _template_kwargs(columns: Rendered, where: str) -> Mapping[str, Any]:
    given = columns.template_kwargs
    check_template_kwargs(given, f"{where}: field chat_template_kwargs")
    if given and isinstance(columns.prompt, str):
        raise UserError(
            f"{where}: field {'tools' if 'tools' in given else 'chat_template_kwargs'} "
            "is for the chat template, which a plain-text prompt does not go through. "
            "Give the prompt as messages, or take the field out"
        )
    return given or _NO_KWARGS
