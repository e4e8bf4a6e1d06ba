"""UltraFeedback: four completions an instruction, each rated from 1 to 5 by aspect.

https://huggingface.co/datasets/openbmb/UltraFeedback (MIT): ``instruction`` and
``completions``, of which each has ``response`` and ``annotations`` with a ``Rating`` on
``instruction_following, honesty, truthfulness, helpfulness``.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from jaxalign.data.layouts import implicit
from jaxalign.data.layouts.foreign import (
    Converted,
    Dropped,
    Row,
    messages,
    text,
    user_turn,
)
from jaxalign.errors import UserError


__all__ = ["ASPECTS", "binarized", "convert", "convert_binarized", "record"]

ASPECTS = ("instruction_following", "honesty", "truthfulness", "helpfulness")


def record(row: Mapping[str, Any], where: str = "row") -> dict[str, Any] | Dropped:
    """Make a feedback record of a row: its best completion against its worst.

    By the mean of the ratings (``overall_score`` is wrong in some rows, where a 1 was
    read as a 10: https://huggingface.co/datasets/argilla/ultrafeedback-binarized-preferences).
    Each is one segment with its ratings as scores: the top of the scale is 5, which is
    ``objective.max_score``.

    Returns:
      The record, or why there is none: less than two completions with ratings, equal
      ratings, or equal responses.
    Raises:
      UserError: a column is missing or not of its kind.
    """
    given = row.get("completions")
    if not isinstance(given, list):
        raise UserError(
            f"{where}: field completions: expected a list of {{response, annotations}}:"
            f" got {type(given).__name__}"
        )
    rated = []
    for i, completion in enumerate(given):
        place = f"{where}: field completions[{i}]"
        if not isinstance(completion, Mapping):
            raise UserError(f"{place}: expected an object: got {completion!r:.40}")
        scores = _ratings(completion.get("annotations"))
        if scores:
            rated.append((text(completion, "response", place), scores))
    if len(rated) < 2:
        return Dropped("less than two rated completions")

    def mean(one: tuple[str, dict[str, float]]) -> float:
        return sum(one[1].values()) / len(one[1])

    best, worst = max(rated, key=mean), min(rated, key=mean)
    if mean(best) == mean(worst):
        return Dropped("equal ratings")
    if best[0] == worst[0]:
        return Dropped("equal responses")
    made: dict[str, Any] = {"prompt": [user_turn(text(row, "instruction", where))]}
    for side, (response, scores) in (("chosen", best), ("rejected", worst)):
        made[side] = response
        whole = {"start": 0, "end": len(response), "scores": scores}
        made[f"{side}_segments"] = [whole] if response else []
    return made


def binarized(row: Mapping[str, Any], where: str = "row") -> dict[str, Any] | Dropped:
    """Make a record of a row whose prompt is a text and whose sides are conversations.

    https://huggingface.co/datasets/HuggingFaceH4/ultrafeedback_binarized. The prompt is
    what both conversations begin with; the column ``prompt`` repeats its last turn.

    Returns:
      The record, or why there is none.
    Raises:
      UserError: a column is missing or not of its kind.
    """
    sides = {side: messages(row, side, where) for side in ("chosen", "rejected")}
    if all(turns[0]["role"] == "assistant" for turns in sides.values()):
        # Answers alone: the text is the whole question.
        return {**row, "prompt": [user_turn(text(row, "prompt", where))], **sides}
    return implicit.record({**row, **sides}, where)


def convert(rows: Iterable[Row]) -> Iterator[Converted]:
    """Convert row by row."""
    for row, where in rows:
        yield Converted(record(row, where), where)


def convert_binarized(rows: Iterable[Row]) -> Iterator[Converted]:
    """Convert row by row."""
    for row, where in rows:
        yield Converted(binarized(row, where), where)


def _ratings(annotations: Any) -> dict[str, float]:
    """Return the ratings that are numbers; some say that there is none."""
    found = {}
    for aspect in ASPECTS:
        given = annotations.get(aspect) if isinstance(annotations, Mapping) else None
        rating = given.get("Rating") if isinstance(given, Mapping) else None
        try:
            value = float(rating) if isinstance(rating, str | int | float) else math.nan
        except ValueError:
            continue
        if math.isfinite(value):
            found[aspect] = value
    return found
