"""The segments of a completion: which there are, and that they fit its text."""

import math
from collections.abc import Sequence

from jaxalign.data.columns import ListedSegment, Segment, shown
from jaxalign.data.messages import check_text
from jaxalign.errors import UserError


__all__ = ["read_segments"]


def read_segments(
    segments: Sequence[ListedSegment] | None,
    field: str,
    texts: Sequence[str],
    where: str,
) -> tuple[Segment, ...] | None:
    """Check all segments and return them; one that was not judged has no scores.

    Args:
      segments: of one completion; None where it has no such column.
      field: the column, for messages.
      texts: of the completion's assistant turns.
      where: the record's place, for messages.
    Raises:
      UserError: one is empty, out of place or out of its text.
    """
    if segments is None:
        return None
    previous, turn, found = 0, 0, []
    for i, segment in enumerate(segments):
        name = f"{field}[{i}]"
        if segment.turn >= len(texts):
            raise UserError(
                f"{where}: field {name}.turn: got {segment.turn}, but the completion "
                f"has {len(texts)} turn(s) of the assistant, counted from 0"
            )
        if segment.turn != turn:
            previous = 0
        if segment.end <= segment.start:
            raise UserError(
                f"{where}: field {name}.end: expected more than start="
                f"{shown(segment.start)}: got {shown(segment.end)}. Offsets are "
                "half-open"
            )
        if segment.start < previous or segment.turn < turn:
            raise UserError(
                f"{where}: field {name}.start: got {shown(segment.start)}, but the "
                f"segment before ends at {previous}. Segments are ordered and do not "
                "overlap"
            )
        if segment.end > len(texts[segment.turn]):
            raise UserError(
                f"{where}: field {name}.end: got {shown(segment.end)}, but the text "
                f"has {len(texts[segment.turn])} characters. Offsets count code "
                "points, not bytes"
            )
        for aspect, score in (segment.scores or {}).items():
            check_text(aspect, f"{name}.scores", where)
            if not aspect or not math.isfinite(score):
                raise UserError(
                    f"{where}: field {name}.scores: got {aspect!r}: {score}; expected "
                    "a name and a finite number"
                )
        previous, turn = segment.end, segment.turn
        found.append(Segment(**segment.model_dump(exclude_none=True)))
    return tuple(found)
