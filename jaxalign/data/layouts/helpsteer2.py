"""HelpSteer2: two responses a prompt, each with five ratings from 0 to 4.

https://huggingface.co/datasets/nvidia/HelpSteer2 (CC-BY-4.0). One row is one response:
``prompt, response, helpfulness, correctness, coherence, complexity, verbosity``.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from jaxalign.data.layouts.foreign import (
    Converted,
    Dropped,
    Row,
    number,
    text,
    user_turn,
)


__all__ = ["ATTRIBUTES", "convert", "messages", "pair"]

ATTRIBUTES = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")

_TURN = re.compile(r"\n*<extra_id_1>(User|Assistant)\n")


def pair(
    first: Mapping[str, Any], second: Mapping[str, Any], where: str = "rows"
) -> dict[str, Any] | Dropped:
    """Make one feedback record of the two rows of a prompt.

    The more helpful response is chosen. Each response is one segment with the ratings
    that its row has; ``helpfulness`` is needed, the other four may be left out. Note
    that a higher ``complexity`` or ``verbosity`` is not a better one: set
    ``aspect_weights`` accordingly.

    Returns:
      The record, or why there is none: a tie in helpfulness, or equal responses.
    Raises:
      UserError: a column is missing or not of its kind.
    """
    sides = [_response(row, where) for row in (first, second)]
    helpfulness = [scores["helpfulness"] for _, scores in sides]
    if helpfulness[0] == helpfulness[1]:
        return Dropped("tie in helpfulness")
    if helpfulness[0] < helpfulness[1]:
        sides.reverse()
    (chosen, chosen_scores), (rejected, rejected_scores) = sides
    if chosen == rejected:
        return Dropped("equal responses")
    return {
        "prompt": messages(text(first, "prompt", where)),
        "chosen": chosen,
        "rejected": rejected,
        "chosen_segments": _whole(chosen, chosen_scores),
        "rejected_segments": _whole(rejected, rejected_scores),
    }


def messages(prompt: str) -> list[dict[str, str]]:
    r"""Split a prompt into its turns, which the data set marks by ``<extra_id_1>``.

    >>> messages("Hi\n<extra_id_1>Assistant\nHo\n<extra_id_1>User\nWhy?")[1]
    {'role': 'assistant', 'content': 'Ho'}
    """
    first, *later = _TURN.split(prompt)
    turns = [user_turn(first)]
    for role, content in zip(later[::2], later[1::2], strict=True):
        turns.append({"role": role.lower(), "content": content})
    return turns


def convert(rows: Iterable[Row]) -> Iterator[Converted]:
    """Pair the rows of each prompt, in the order in which prompts first appear.

    A prompt with more than two rows gives a pair for each two of them, in file order.
    """
    by_prompt: dict[str, list[Row]] = {}
    for row, where in rows:
        by_prompt.setdefault(text(row, "prompt", where), []).append((row, where))
    for found in by_prompt.values():
        for i in range(0, len(found), 2):
            two = found[i : i + 2]
            where = " and ".join(place for _, place in two)
            if len(two) == 1:
                yield Converted(Dropped("one response to its prompt"), where)
            else:
                yield Converted(pair(two[0][0], two[1][0], where), where)


def _response(row: Mapping[str, Any], where: str) -> tuple[str, dict[str, int | float]]:
    given = [name for name in ATTRIBUTES[1:] if row.get(name) is not None]
    scores = {
        name: number(row, name, where, low=0, high=4)
        for name in (ATTRIBUTES[0], *given)
    }
    return text(row, "response", where), scores


def _whole(response: str, scores: dict[str, int | float]) -> list[dict[str, Any]]:
    if not response:
        return []
    return [{"start": 0, "end": len(response), "scores": scores}]
