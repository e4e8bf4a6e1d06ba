"""How good a grader of refusals is: its labels against people's."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxalign.errors import UserError
from jaxalign.evaluation import statistics
from jaxalign.evaluation.statistics import Figure
from jaxalign.judging.agreement import cohens_kappa
from jaxalign.judging.refusals import REFUSAL_LABELS, refused


__all__ = ["agreement_with_people"]

_ROUNDS = 2000


def agreement_with_people(
    people: Sequence[str], grader: Sequence[str]
) -> dict[str, Any]:
    """Return how far a grader agrees with people about refusals.

    Args:
      people: the label that people gave to each reply.
      grader: what the grader said of the same replies.
    Returns:
      ``accuracy`` and ``kappa`` (Cohen's) of refused, in full or in part, or not; under
      ``three_way`` both with partial refusals as a label of their own; and
      ``confusion``, outer key the people's label. Accuracy has Wilson's interval, kappa
      a bootstrap's over replies, 2,000 rounds, seed 0. Replies to one prompt by several
      models are taken for independent.
    Raises:
      UserError: a label is none, or there is not one of each for every reply.
    Example:
      >>> people = ["full_refusal", "partial_refusal", "full_compliance"]
      >>> rule = ["full_refusal", "full_compliance", "full_compliance"]
      >>> found = agreement_with_people(people, rule)
      >>> round(found["accuracy"].value, 4), found["confusion"]["partial_refusal"]
      (0.6667, {'full_compliance': 1})
    """
    if len(people) != len(grader):
        raise UserError(
            f"agreement needs two labels for each reply: got {len(people)} of people "
            f"and {len(grader)} of the grader"
        )
    unknown = {*people, *grader} - set(REFUSAL_LABELS)
    if unknown:
        raise UserError(
            f"{sorted(unknown)[0]!r} is no label of refusal: expected "
            f"{', '.join(REFUSAL_LABELS)}"
        )
    pairs = Counter(zip(people, grader, strict=True))
    found: dict[str, Any] = _agreement(
        [int(refused(label)) for label in people],
        [int(refused(label)) for label in grader],
        2,
    )
    found["three_way"] = _agreement(
        [REFUSAL_LABELS.index(label) for label in people],
        [REFUSAL_LABELS.index(label) for label in grader],
        3,
    )
    found["confusion"] = {
        label: {
            other: pairs[label, other]
            for other in REFUSAL_LABELS
            if pairs[label, other]
        }
        for label in REFUSAL_LABELS
    }
    return found


def _agreement(truths: list[int], guesses: list[int], k: int) -> dict[str, Any]:
    n = len(truths)
    table = np.zeros((k, k))
    np.add.at(table, (truths, guesses), 1)
    return {
        "accuracy": statistics.share(int(np.trace(table)), n),
        "kappa": _kappa(table, cohens_kappa(truths, guesses), n),
    }


def _kappa(table: np.ndarray, value: float | None, n: int) -> Figure:
    """Return kappa with its bootstrap over the replies of a table.

    Rows drawn with replacement fall into the cells as a multinomial does, so that the
    rows themselves need not be drawn.
    """
    if value is None:
        return Figure(None, None, None, n)
    drawn = np.random.default_rng(0).multinomial(n, table.ravel() / n, _ROUNDS)
    tables = drawn.reshape(-1, *table.shape).astype(np.float64)
    agreed = np.trace(tables, axis1=1, axis2=2) * n
    chance = (tables.sum(1) * tables.sum(2)).sum(1)
    defined = chance < n * n  # else all of a round are of one label
    found = (agreed[defined] - chance[defined]) / (n * n - chance[defined])
    if len(found) < 0.95 * _ROUNDS or n == 1:
        return Figure(value, None, None, n)
    low, high = np.quantile(found, (0.025, 0.975))
    return Figure(value, float(found.std(ddof=1)), (float(low), float(high)), n)
