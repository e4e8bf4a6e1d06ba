"""The observations that DREAM's released training dialogues carry.

A row is a dialogue about one image; its unsafe exchange should carry ``observe``, a
list of risk observations that is metadata and no part of the answer.
https://github.com/Kizna1ver/DREAM (``data/VLGuard/train_llava_format.json``)
"""

from collections import Counter
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

from jaxalign.errors import UserError
from jaxalign.feedback.decompose.observations import Observation, normalise


__all__ = ["ObservationCounts", "Dialogue", "count", "parse"]

State = Literal["given", "misplaced", "empty", "absent"]


class Dialogue(NamedTuple):
    """What one row says about the risks of its unsafe exchange."""

    id: str
    observations: tuple[Observation, ...]
    state: State
    """Where ``observe`` stood: on the unsafe exchange, on a safe one, there but without
    an entry, or nowhere."""
    renamed: tuple[tuple[str, str], ...]
    dropped: tuple[str, ...]
    """As of :class:`jaxalign.feedback.decompose.observations.Normalised`."""


class ObservationCounts(NamedTuple):
    """What was read, and what had to be mended."""

    states: Counter[str]
    observations: int
    sources: Counter[str]
    categories: Counter[str]
    renamed: Counter[tuple[str, str]]
    dropped: Counter[str]


def parse(row: Any) -> Dialogue:
    """Return the observations of a row, also those that stand on the wrong exchange.

    Raises:
      UserError: the row is no dialogue of this layout.
    """
    try:
        name = str(row["id"])
        turns = [
            (turn["from"], turn.get("safe"), turn.get("observe"))
            for turn in row["conversations"]
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            "a row of DREAM's training data needs id and conversations, a list of "
            f"{{from, value, safe or observe}}: got none of this layout ({error!r})"
        ) from None
    listed: list[tuple[Any, bool]] = []
    unsafe = False
    for speaker, safe, observe in turns:
        if speaker == "human":
            unsafe = safe is False
        elif observe is not None:
            listed.append((observe, unsafe))
    entries = [e for found, _ in listed for e in _entries(found)]
    normal = normalise(entries)
    if not listed:
        state = "absent"
    elif not entries:
        state = "empty"
    else:
        on_unsafe = any(_entries(found) and unsafe for found, unsafe in listed)
        state = "given" if on_unsafe else "misplaced"
    return Dialogue(name, normal.observations, state, normal.renamed, normal.dropped)


def count(dialogues: Iterable[Dialogue]) -> ObservationCounts:
    """Return how many observations there are of each kind, and what was mended."""
    counts = ObservationCounts(Counter(), 0, Counter(), Counter(), Counter(), Counter())
    total = 0
    for dialogue in dialogues:
        counts.states[dialogue.state] += 1
        total += len(dialogue.observations)
        counts.sources.update(o.source for o in dialogue.observations)
        counts.categories.update(o.risk_category for o in dialogue.observations)
        counts.renamed.update(dialogue.renamed)
        counts.dropped.update(dialogue.dropped)
    return counts._replace(observations=total)


def _entries(observe: Any) -> list[Any]:
    return observe if isinstance(observe, list) else [observe]
