"""What became of grades that are in no share: counted by name, never dropped."""

from collections import Counter
from collections.abc import Iterable

from jaxalign.evaluation.task import Grade


__all__ = ["failures"]


def failures(grades: Iterable[Grade]) -> dict[str, int]:
    """Return how many grades have each status that is not ``ok``.

    >>> failures([Grade("A"), Grade(None, "judge_failed"), Grade(None, "unparsed")])
    {'unparsed': 1, 'judge_failed': 1, 'answer_failed': 0}
    """
    counts = Counter(grade.status for grade in grades)
    return {
        name: counts[name] for name in ("unparsed", "judge_failed", "answer_failed")
    }
