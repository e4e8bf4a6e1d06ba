"""What a page shows of an item beside its answers and grades: ``items.jsonl``.

Of pictures only thumbnails are kept: the page holds all that it shows, and a thousand
photographs are more than a browser opens.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxalign.data.picture import Picture
from jaxalign.errors import UserError
from jaxalign.evaluation.answering import text_of
from jaxalign.evaluation.task import Graded, Grading, Question
from jaxalign.judging.judge import JudgeRequest


__all__ = ["as_questions", "rows", "thumbnail"]


def rows(
    graded: Sequence[Graded], questions: Mapping[int, Sequence[Question]]
) -> list[dict[str, Any]]:
    """Return a line for each item that was asked something, or that has a topic.

    Args:
      graded: items with their answers and grades.
      questions: by an item's index; empty where only grades were given.
    Returns:
      Objects with ``index``, ``asked`` (by question, a text), and where there are any
      ``images`` (data URLs of thumbnails, each picture once), ``topic`` and
      ``references`` (a task's item may have them as fields or keys).
    Example:
      >>> question = Question("q", ({"role": "user", "content": "2 + 2?"},))
      >>> rows([Graded(0, {"topic": "sums"}, {}, {})], {0: [question]})[0]["topic"]
      'sums'
    """
    found = []
    for one in graded:
        mine = questions.get(one.index, ())
        pictures = {repr(p): p for question in mine for p in question.images}
        shown = {
            "images": [url for p in pictures.values() if (url := thumbnail(p))],
            "topic": _field(one.item, "topic"),
            "references": _field(one.item, "references"),
        }
        found.append(
            {
                "index": one.index,
                "asked": {q.name: text_of(q.messages) for q in mine},
                **{name: value for name, value in shown.items() if value},
            }
        )
    return [row for row in found if len(row) > 2 or row["asked"]]


def as_questions(gradings: Sequence[Grading]) -> list[Question]:
    """Return what a judge is asked as the page shows what a model is.

    >>> as_questions([])
    []
    """
    return [
        Question(one.name, one.by.messages, one.images)
        for one in gradings
        if isinstance(one.by, JudgeRequest)
    ]


def thumbnail(picture: Picture) -> str | None:
    """Return a small picture as a data URL, None where it cannot be opened.

    The run is over by then, and its answers are there: a file that has gone since is
    no reason to write no page.

    Example:
      >>> thumbnail(Picture(b"none", "row 0")) is None
      True
    """
    try:
        return picture.thumbnail()[0]
    except UserError:
        return None


def _field(item: Any, name: str) -> Any:
    """Return what an item has under a name, if that is a text or several."""
    value = item.get(name) if isinstance(item, Mapping) else getattr(item, name, None)
    if isinstance(value, str):
        return value
    if isinstance(value, Sequence) and all(isinstance(one, str) for one in value):
        return list(value)
    return None
