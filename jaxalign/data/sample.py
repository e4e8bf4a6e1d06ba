"""The packaged feedback: 96 pairs with segment × aspect scores, to try things on."""

from pathlib import Path

from jaxalign.data import records
from jaxalign.data.records import Record


__all__ = ["path", "read"]


def path() -> Path:
    """Return the file, JSON Lines of feedback records, for what takes ``data``.

    >>> path().name
    'two_dimensional_feedback.jsonl'
    """
    return Path(__file__).parent / "samples" / "two_dimensional_feedback.jsonl"


def read() -> list[Record]:
    """Return its records.

    >>> records.aspects_of(read())[:2]
    ('clarity', 'completeness')
    """
    return records.read(path())
