"""From a source in a named layout to checked feedback records."""

import collections
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxalign.data import records
from jaxalign.data.layouts import LAYOUTS, Converted, Dropped, rlaif_v
from jaxalign.data.layouts.table import check_name, objects
from jaxalign.data.picture import Stretch
from jaxalign.data.rows import read_rows
from jaxalign.errors import UserError


__all__ = [
    "RECORD_COLUMNS",
    "Counts",
    "convert",
    "records_of",
]

RECORD_COLUMNS = (
    *("prompt", "images", "chosen", "rejected", "chosen_segments", "rejected_segments"),
    *("completion", "completion_segments", "label", "weight"),
    *("tools", "chat_template_kwargs"),
    *("chosen_token_weights", "rejected_token_weights"),
)
"""The columns of a feedback record, of a pair and of a single completion."""

_KEPT = (*RECORD_COLUMNS, *rlaif_v.ORIGIN)


def convert(layout: str, source: str | Path) -> Iterator[Converted]:
    """Yield the feedback records of a source, checked, and what was dropped and why.

    A record has ``where``: the places in the source that it is made of.

    Args:
      layout: a key of :data:`jaxalign.data.layouts.LAYOUTS`.
      source: a file of that layout: ``.json``, ``.jsonl``, ``.jsonl.gz``, ``.csv`` or
        ``.parquet``, or another source that ``--data`` takes.
    Raises:
      UserError: the layout is not known, the source cannot be read, or a row is
        malformed; the text names file, row, field and cure.
    """
    check_name(layout)
    folder = f"{Path(source).parent}/"
    for made, where in LAYOUTS[layout].convert(objects(read_rows(source))):
        if isinstance(made, dict):
            records.parse(made, where)
            made = _with_files(made)
            made = {k: made[k] for k in _KEPT if made.get(k) is not None}
            made["where"] = where.replace(folder, "")
        yield Converted(made, where)


@dataclasses.dataclass
class Counts:
    """What became of the rows of one source, counted while it is read."""

    kept: int = 0
    """Records."""
    dropped: collections.Counter[str] = dataclasses.field(
        default_factory=collections.Counter
    )
    """Rows, or pairs of rows, that give no record, by reason."""

    def __str__(self) -> str:
        reasons = (f"{n} dropped ({why})" for why, n in self.dropped.items())
        return ", ".join([f"{self.kept} records", *reasons])


def records_of(
    layout: str, source: str | Path, counts: Counts | None = None
) -> Iterator[dict[str, Any]]:
    """Yield the records of :func:`convert` alone.

    Args:
      layout: a key of :data:`jaxalign.data.layouts.LAYOUTS`.
      source: a file of that layout.
      counts: is added to.
    Raises:
      UserError: see :func:`convert`; or there is no record at all.
    """
    counts = Counts() if counts is None else counts
    for made, _ in convert(layout, source):
        if isinstance(made, Dropped):
            counts.dropped[made.reason] += 1
        else:
            counts.kept += 1
            yield made
    if not counts.kept:
        raise UserError(f"{source} gives no record in the layout {layout}: {counts}")


def _with_files(made: dict[str, Any]) -> dict[str, Any]:
    """Return a record whose pictures are encoded bytes or paths, in one column."""
    image = made.get("image")
    images = made.get("images") if image is None else [image]
    if not images:
        return made
    return {**made, "images": [_file(one) for one in images]}


def _file(image: Any) -> Any:
    if isinstance(image, Mapping):
        image = image.get("bytes") or image.get("path")
    return image.read() if isinstance(image, Stretch) else image
