"""What of a benchmark a run was trained on, by the hashes that the run kept."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxalign.data import seen
from jaxalign.evaluation.task import Question
from jaxalign.judging.judge import message_text


__all__ = ["overlap_with_training", "summed", "texts_of"]

_NAMED = 50
"""Items that are listed by their index."""


def overlap_with_training(
    run: Path, questions: Mapping[int, Sequence[Question]]
) -> dict[str, Any] | None:
    """Return which items were in the training set of a run.

    An item was seen by its text where a turn that it asks is one that was trained on,
    word for word: wording of the task around an item's text hides it.
    Matches by a picture's file name alone are apart, and prove little.

    Args:
      run: directory of ``jaxalign train``.
      questions: what the items ask, by their index.
    Returns:
      Counts: ``compared``, ``items`` (seen by text or picture), ``by_text``,
      ``by_picture``, ``by_name_alone``; and ``indices`` of the first 50 items. None for
      a directory without ``seen.txt``: an adapter of another program, or an older run.
    Raises:
      UserError: ``seen.txt`` is broken, or a picture is not there.
    Example:
      >>> overlap_with_training(Path("nowhere"), {}) is None
      True
    """
    path = run / seen.SEEN
    if not path.is_file():
        return None
    order = list(questions)
    found = seen.overlap(
        seen.read(path),
        (
            (
                [text for asked in questions[index] for text in texts_of(asked)],
                [picture for asked in questions[index] for picture in asked.images],
            )
            for index in order
        ),
    )
    places = sorted({*found.texts, *found.pictures})
    return {
        "compared": found.compared,
        "items": found.items,
        "by_text": len(found.texts),
        "by_picture": len(found.pictures),
        "by_name_alone": len(found.names),
        "indices": [order[place] for place in places[:_NAMED]],
    }


def summed(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what was found in parts of the items as what was found in all of them.

    >>> found = {"compared": 2, "items": 1, "by_text": 1, "by_picture": 0}
    >>> parts = [{**found, "indices": [4]}, {**found, "indices": [1]}]
    >>> summed(parts)["items"], summed(parts)["indices"]
    (2, [1, 4])
    """
    counts = {
        name: sum(part[name] for part in parts)
        for name in parts[0]
        if name != "indices"
    }
    named = sorted(index for part in parts for index in part["indices"])
    return {**counts, "indices": named[:_NAMED]}


def texts_of(question: Question) -> list[str]:
    """Return the texts of a question's user turns, without their pictures.

    >>> parts = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    >>> texts_of(Question("q", ({"role": "user", "content": parts},)))
    ['What is it?']
    """
    return [message_text(turn) for turn in question.messages if turn["role"] == "user"]
