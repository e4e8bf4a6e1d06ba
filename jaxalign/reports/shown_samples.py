"""Which samples a report shows: those that say most, and some that say little."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from jaxalign.feedback.candidates import JudgedPrompt
from jaxalign.feedback.decompose.decomposition import Judged


__all__ = ["Shown", "change", "extremes", "held_out_places", "training_places"]


class Shown(NamedTuple):
    """One response with what the judge made of it."""

    text: str
    judged: Judged


def change(before: JudgedPrompt, after: JudgedPrompt) -> float | None:
    """Return the difference of a prompt's mean scores, None if one has no score."""
    if not before.scores or not after.scores:
        return None
    means = (math.fsum(one.scores) / len(one.scores) for one in (after, before))
    return next(means) - next(means)


def extremes(one: JudgedPrompt) -> tuple[Shown, Shown] | None:
    """Return the best candidate and the worst one, or one without a score.

    None if there are not two candidates, or none has a score.
    """
    shown = [Shown(*both) for both in zip(one.texts, one.judged, strict=True)]
    ranked = sorted(
        (s for s in shown if s.judged.score is not None),
        key=lambda s: -(s.judged.score or 0.0),
    )
    failed = [s for s in shown if s.judged.score is None]
    if len(shown) < 2 or not ranked:
        return None
    return ranked[0], failed[0] if failed else ranked[-1]


def held_out_places(
    before: Sequence[JudgedPrompt], after: Sequence[JudgedPrompt], most: int
) -> list[int]:
    """Return the places of the prompts to show, from the largest gain downwards.

    Of ``most``, about a third each: largest gains, largest losses, least changes; and
    at most two that cannot be compared, at the end.
    """
    changes = [change(*both) for both in zip(before, after, strict=True)]
    lost = [i for i, c in enumerate(changes) if c is None][:2]
    rest = [(c, i) for i, c in enumerate(changes) if c is not None]
    room = most - len(lost)
    third = max(1, room // 3)
    gains = sorted((one for one in rest if one[0] > 0), reverse=True)[: room - third]
    losses = sorted(one for one in rest if one[0] < 0)[:third]
    calm = sorted((abs(c), i) for c, i in rest)
    chosen = [i for _, i in (*gains[:third], *losses)]
    for _, place in (*calm[:third], *gains[third:], *calm):
        if place not in chosen and len(chosen) < room:
            chosen.append(place)
    return sorted(chosen, key=lambda i: -(changes[i] or 0.0)) + lost


def training_places(prompts: Sequence[JudgedPrompt], most: int) -> list[int]:
    """Return the places of the prompts to show, from the largest gap downwards.

    Half of ``most`` have the largest gaps, the others are spread over all gaps; one has
    a candidate without a score, if there is such a prompt.
    """
    gaps: dict[int, float] = {}
    failed: list[int] = []
    for place, one in enumerate(prompts):
        found = extremes(one)
        if found is None:
            continue
        if found[1].judged.score is None:
            failed.append(place)
        else:
            gaps[place] = (found[0].judged.score or 0.0) - found[1].judged.score
    order = sorted(gaps, key=lambda i: (-gaps[i], i))
    room = max(1, most - len(failed[:1]))
    top = order[: -(-room // 2)]
    rest, wanted = order[len(top) :], room - len(top)
    step = max(1.0, len(rest) / wanted) if wanted else 1.0
    spread = [rest[int(n * step)] for n in range(wanted) if int(n * step) < len(rest)]
    return [*top, *spread, *failed[:1]]
