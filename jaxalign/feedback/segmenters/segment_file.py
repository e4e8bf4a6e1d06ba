"""From feedback records to the same records with unscored segments, for judges."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxalign.configs import check_fields
from jaxalign.data import layouts, records
from jaxalign.data.record_images import as_json
from jaxalign.data.rows import image_base
from jaxalign.errors import UserError
from jaxalign.feedback.segmenters.config import SegmenterConfig, segment
from jaxalign.whole_file import whole


__all__ = ["SegmentReport", "SegmentConfig", "segment_file", "segment_row"]

_HERE = Path()
_RESPONSES = ("chosen", "rejected", "completion")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SegmentConfig:
    """Cutting the responses of feedback records into segments.

    Attributes:
      segmenter: how they are cut.
      layout: of the rows, see ``jaxalign.data.layouts``; default what their columns
        say.
      image_dir: where relative paths of pictures start; default beside the records.
        Paths are written as they are: OUT is read with the same directory.
      replace: take away segments that have scores; else a record with some is refused.
    """

    segmenter: SegmenterConfig = dataclasses.field(default_factory=SegmenterConfig)
    layout: str | None = None
    image_dir: str | None = None
    replace: bool = False

    def __post_init__(self) -> None:
        check_fields(self)


class SegmentReport(NamedTuple):
    """What was written."""

    responses: int
    segments: int


def segment_file(source: str, out: Path, config: SegmentConfig) -> SegmentReport:
    """Write the records of a source with the segments of their responses.

    The rows stay in order, their other columns as they are. ``out`` is written whole or
    not at all, over a file of that name.

    Args:
      source: see :func:`jaxalign.data.rows.read_rows`.
      out: JSON Lines file to write.
      config: the segmenter, and whether scores may be taken away.
    Raises:
      UserError: something is wrong with the source, a record or ``out``; nothing is
        written then.
    """
    if out.is_dir():
        raise UserError(f"{out} is a directory: give a .jsonl file to write")
    if out.suffix != ".jsonl":
        raise UserError(
            f"{out}: the records are written as JSON Lines: give a name that ends in "
            ".jsonl"
        )
    # No picture is opened here, so that none needs a place.
    base = image_base(source, config.image_dir) or _HERE
    lines = []
    responses = segments = 0
    for row, where in layouts.read(source, config.layout):
        made = segment_row(row, config, where, base)
        for name in _RESPONSES:
            if (spans := made.get(f"{name}_segments")) is not None:
                responses, segments = responses + 1, segments + len(spans)
        try:
            lines.append(json.dumps(made, default=as_json) + "\n")
        except (TypeError, ValueError) as error:
            raise UserError(
                f"{where}: a column cannot be written as JSON: {error}. Leave it out, "
                "or store it as text or numbers"
            ) from None
    if not lines:
        raise UserError(f"{source} holds no record: expected one JSON object per line")
    with whole(out, "the input is as it was") as file:
        file.writelines(lines)
    return SegmentReport(responses, segments)


def segment_row(
    row: Any,
    config: SegmentConfig,
    where: str = "record",
    image_dir: Path = _HERE,
) -> dict:
    """Return a row with segments ``{"start", "end"}`` beside each of its responses.

    Raises:
      UserError: the row is no feedback record, or has scores and ``config.replace`` is
        not set; the text names ``where``.
    """
    plain = row
    if isinstance(row, Mapping):
        columns = [f"{name}_segments" for name in _RESPONSES]
        if not config.replace:
            for column in columns:
                _refuse_scores(row.get(column), column, where)
        # What is replaced need not be valid.
        plain = {k: v for k, v in row.items() if k not in columns}
    record = records.parse(plain, where, image_dir)
    names = ("completion",) if record.rejected is None else ("chosen", "rejected")
    made = dict(row)
    for name, completion in zip(names, record.completions, strict=True):
        made[f"{name}_segments"] = [
            {"start": start, "end": end, **({"turn": turn} if turn else {})}
            for turn, text in enumerate(records.texts_of(completion))
            for start, end in segment(text, config.segmenter)
        ]
    return made


def _refuse_scores(segments: Any, column: str, where: str) -> None:
    if segments is None:
        return
    only_spans = isinstance(segments, list) and all(
        isinstance(entry, Mapping)
        and not any(entry[key] for key in entry if key not in ("start", "end", "turn"))
        for entry in segments
    )
    if not only_spans:
        raise UserError(
            f"{where}: field {column} has scores already, which new segments would "
            "take away. Leave the record out, or give --replace true"
        )
