"""How far a judge agrees with itself when it is asked several times."""

import itertools
import json
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from jaxalign.judging.agreement import Agreement, agreement_of
from jaxalign.judging.store import Store
from jaxalign.reports import page
from jaxalign.reports.page import escape


__all__ = ["agreement"]

_VOTES = """
SELECT r.sample, r.task, r.question, v.value
FROM requests r JOIN verdicts v USING (key)
WHERE v.state = 'judged' AND r.question IN
    (SELECT question FROM requests GROUP BY question HAVING count(*) > 1)
ORDER BY r.question, r.vote
"""


def agreement(store: Store, samples: Collection[str]) -> str:
    """Compare the votes on the same question, two by two; "" without several votes.

    Args:
      store: with the votes.
      samples: ids of what they are to be about.
    """
    found: defaultdict[str, Agreement] = defaultdict(lambda: Agreement(0, 0, 0))
    for task, votes in _questions(store, samples):
        for one, other in itertools.combinations(votes, 2):
            for name, agreed in _compared(task, one, other).items():
                found[name] = found[name].plus(agreed)
    if not found:
        return ""
    rows = [
        [
            escape(name),
            f"{a.pairs:,}",
            f"{a.equal / a.pairs:.1%}",
            f"{a.distance / a.pairs:.3f}" if name.startswith("scores") else "–",
        ]
        for name, a in sorted(found.items())
    ]
    head = ("", "pairs of votes", "equal", "mean distance")
    return "<h3>Agreement of the judge with itself</h3>" + page.table(
        "agreement of votes", head, rows
    )


def _questions(
    store: Store, samples: Collection[str]
) -> Iterator[tuple[str, list[Any]]]:
    """Yield the task and the values of each question with several votes."""
    rows = (row for row in store.scan(_VOTES) if row[0] in samples)
    for (task, _), votes in itertools.groupby(rows, key=lambda row: row[1:3]):
        yield task, [json.loads(value) for *_, value in votes]


def _compared(
    task: str, one: Mapping[str, Any], other: Mapping[str, Any]
) -> dict[str, Agreement]:
    if task != "scores":
        return {task: Agreement(int(one == other), 1, 0)}
    aspects = {aspect for segment in one["segments"] for aspect in segment}
    return {
        f"scores: {aspect}": agreement_of(_only(one, aspect), _only(other, aspect))
        for aspect in aspects
    }


def _only(value: Mapping[str, Any], aspect: str) -> dict[str, Any]:
    return {"segments": [{aspect: segment[aspect]} for segment in value["segments"]]}
