"""What a store holds, for people: tables of counts, and every judgement as a line."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import rich.console
import rich.table

from jaxalign.judging.agreement import Agreement, agreement_of
from jaxalign.judging.store import Store, text_of
from jaxalign.whole_file import whole


__all__ = ["agreement", "export", "kind_of", "show"]

_JUDGES = """
SELECT judge, task, count(*), sum(state = 'judged'), sum(state = 'failed'),
       sum(attempts), sum(prompt_tokens), sum(completion_tokens), sum(cost)
FROM requests JOIN verdicts USING (key) GROUP BY judge, task ORDER BY judge, task
"""
_REASONS = "SELECT reason FROM verdicts WHERE state = 'failed'"
_VOTES = """
SELECT question, value FROM requests JOIN verdicts USING (key)
WHERE task = 'scores' AND state = 'judged' AND question IN
    (SELECT question FROM requests WHERE vote > 0)
ORDER BY question, vote
"""
_ALL = """
SELECT r.key, r.task, r.vote, r.judge, s.prompt, s.response, o.response, r.subject,
       w.text, v.state, v.value, v.reason, v.raw, v.attempts, v.prompt_tokens,
       v.completion_tokens, v.cost, v.instant
FROM verdicts v JOIN requests r USING (key) JOIN samples s ON s.id = r.sample
LEFT JOIN samples o ON o.id = r.other LEFT JOIN wordings w ON w.id = r.wording
ORDER BY v.instant, r.key
"""


def show(store: Store, console: rich.console.Console | None = None) -> None:
    """Print what a store holds."""
    console = console or rich.console.Console(highlight=False)
    names = ("samples", "units", "requests", "verdicts", "pairs")
    counts = _table("holds", "count")
    for name in names:
        ((count,),) = store.select(f"SELECT count(*) FROM {name}")
        counts.add_row(name, str(count))
    console.print(counts)
    judges = _table(
        *("judge", "task", "requests", "judged", "failed", "attempts"),
        *("prompt tokens", "completion tokens", "cost"),
    )
    for judge, task, *numbers, cost in store.select(_JUDGES):
        judges.add_row(_judge(judge), task, *map(str, numbers), f"{cost:.4f}")
    console.print(judges)
    reasons = Counter(kind_of(reason) for (reason,) in store.scan(_REASONS))
    if reasons:
        failures = _table("failures", "count")
        for reason, count in reasons.most_common():
            failures.add_row(reason, str(count))
        console.print(failures)
    equal, pairs, distance = agreement(store)
    if pairs:
        console.print(
            f"agreement of votes: {equal / pairs:.3f} of {pairs} pairs of scores "
            f"equal, mean distance {distance / pairs:.3f}"
        )


def agreement(store: Store) -> Agreement:
    """Return how far the votes on the same questions agree."""
    total, question = Agreement(0, 0, 0), None
    before: list[Any] = []
    for asked, value in store.scan(_VOTES):
        if asked != question:
            question, before = asked, []
        vote = json.loads(value)
        for other in before:
            total = total.plus(agreement_of(other, vote))
        before.append(vote)
    return total


def export(store: Store, out: str | Path) -> int:
    """Write every judgement as one JSON object a line; return how many.

    Raises:
      UserError: the file cannot be written.
    """
    count = 0
    with whole(Path(out), "the store is as it was") as file:
        for line in _lines(store):
            file.write(json.dumps(line) + "\n")
            count += 1
    return count


def _lines(store: Store) -> Iterator[dict[str, Any]]:
    for row in store.scan(_ALL):
        key, task, vote, judge, prompt, response, other, subject, wording = row[:9]
        state, value, reason, raw, attempts, *tokens, cost, instant = row[9:]
        yield {
            "key": key,
            "task": task,
            "vote": vote,
            "judge": json.loads(judge),
            "prompt": json.loads(prompt),
            "response": response,
            "other": other,
            **json.loads(subject),
            "system": wording,
            "state": state,
            "value": None if value is None else json.loads(value),
            "reason": reason,
            "raw": text_of(raw),
            "attempts": attempts,
            "prompt_tokens": tokens[0],
            "completion_tokens": tokens[1],
            "cost": cost,
            "time": instant,
        }


def _table(*columns: str) -> rich.table.Table:
    table = rich.table.Table()
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right")
    return table


def _judge(settings: str) -> str:
    """Return a judge's settings as people write them, those that are null left out."""
    given = {k: v for k, v in json.loads(settings).items() if v is not None}
    name = given.pop("judge", "?")
    return " ".join([str(name), *(f"{k}={v}" for k, v in given.items())])


def kind_of(reason: str) -> str:
    """Return a reason without its details, which differ from case to case."""
    return reason.split(":", 1)[0]
