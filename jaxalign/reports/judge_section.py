"""What the judge was asked, what it cost, and where it failed."""

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxalign.data.records import Message
from jaxalign.feedback.candidates import as_judged
from jaxalign.judging.store import Store, sample_id, text_of
from jaxalign.judging.store_report import kind_of
from jaxalign.reports import agreement_section, page
from jaxalign.reports.figures import count
from jaxalign.reports.page import escape
from jaxalign.reports.run_files import Run, judged_of


__all__ = ["judge"]

_RAW = 600
"""Characters of a raw reply that are shown."""

_CALLS = """
SELECT r.sample, r.judge, r.task, v.state, v.reason,
       CASE v.state WHEN 'failed' THEN v.raw END, v.attempts, v.prompt_tokens,
       v.completion_tokens, v.cost
FROM requests r JOIN verdicts v USING (key) ORDER BY r.judge, r.task, r.key
"""


class _Failures(NamedTuple):
    """Those of one kind."""

    number: int
    reason: str
    """Of the first one, whole."""
    raw: str | None
    """The first reply that there was."""


def judge(run: Run, store: Store) -> str:
    """Show what the store knows of this run's judgements."""
    samples = _samples(run)
    return "\n".join(
        [
            _calls(run, store, samples),
            _without_score(run),
            _failed_calls(store, samples),
            agreement_section.agreement(store, samples),
        ]
    )


def _samples(run: Run) -> set[str]:
    """Return what the store calls all that this run may have asked about.

    Questions on a prompt, or on a claim by itself, stand there without a response; a
    hop's prompt is its question.
    """
    made = {sample_id("", "")}
    for one in _groups(run).values():
        for asked in one:
            prompt = as_judged({"prompt": asked.prompt, **asked.columns})
            last = prompt if isinstance(prompt, str) else Message(**prompt[-1]).text
            for text in ("", *asked.texts):
                made |= {sample_id(prompt, text), sample_id(last, text)}
    return made


def _groups(run: Run) -> dict[str, list[Any]]:
    return {
        **{f"round {one.number}": one.judged for one in run.rounds},
        **{
            f"held out, {name.replace('-', ' ')}": judged
            for name, judged in run.held_out.items()
        },
    }


def _calls(run: Run, store: Store, samples: set[str]) -> str:
    totals: defaultdict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0] * 6)
    for row in store.scan(_CALLS):
        sample, settings, task, state, _, _, attempts, *spent = row
        if sample in samples:
            added = (1, state == "failed", attempts, *spent)
            total = totals[settings, task]
            totals[settings, task] = [a + b for a, b in zip(total, added, strict=True)]
    if not totals:
        return "<p>The store holds no judgement of this run's candidates.</p>"
    rows = [
        [f"{_name(settings)}<br><span class='mute'>{escape(task)}</span>", *_sums(sums)]
        for (settings, task), sums in totals.items()
    ]
    if len(rows) > 1:
        sums = [sum(column) for column in zip(*totals.values(), strict=True)]
        rows.append(["<b>all</b>", *_sums(sums)])
    head = (
        *("judge and task", "requests", "failed", "calls", "prompt tokens"),
        *("reply tokens", "cost"),
    )
    priced = run.config.judge.prompt_price + run.config.judge.completion_price
    notes = [
        "Calls count retries. What the store knew already was not asked again.",
        _repeats(run),
        ""
        if priced or run.config.judge.name != "openai"
        else "No price of a token was given, so the cost says nothing.",
        ""
        if run.config.store is None
        else "The store is shared: what another run paid for counts here too.",
    ]
    return (
        page.table("what the judge was asked", head, rows)
        + f"<p class='mute'>{' '.join(filter(None, notes))}</p>"
    )


def _sums(sums: Sequence[float]) -> list[str]:
    return [*(f"{round(n):,}" for n in sums[:5]), f"{sums[5]:,.4f}"]


def _name(settings: str) -> str:
    """Return a judge's name and model, and all settings for who asks."""
    given = {k: v for k, v in json.loads(settings).items() if v is not None}
    short = " ".join(str(given[k]) for k in ("judge", "model") if k in given)
    every = ", ".join(f"{name}: {value}" for name, value in given.items())
    return f"<span title='{escape(every)}'>{escape(short[:60])}</span>"


def _repeats(run: Run) -> str:
    """Say how many candidates cost nothing because they had been judged before."""
    candidates = [
        ((json.dumps([one.prompt, {**one.columns}]), text), judged)
        for group in _groups(run).values()
        for one in group
        for text, judged in zip(one.texts, one.judged, strict=True)
    ]
    seen, repeated = set(), 0
    for key, judged in candidates:
        if key in seen:
            repeated += 1
        elif judged.failure is None:
            seen.add(key)
    return (
        f"{repeated:,} of {count(len(candidates), 'candidate')} had the text of an "
        "earlier one to the same prompt and took its verdict."
    )


def _without_score(run: Run) -> str:
    groups = _groups(run)
    found = {
        name: Counter(
            f"{j.failure.kind}: {kind_of(j.failure.reason)}"
            for j in judged_of(group)
            if j.failure is not None
        )
        for name, group in groups.items()
    }
    kinds = sorted({kind for counts in found.values() for kind in counts})
    if not kinds:
        return "<p>Every candidate has a score.</p>"
    rows = [
        [escape(kind), *(f"{counts[kind]:,}" for counts in found.values())]
        for kind in kinds
    ]
    sizes = [sum(len(one.texts) for one in group) for group in groups.values()]
    rows.append(["<b>of candidates</b>", *(f"<b>{n:,}</b>" for n in sizes)])
    return (
        "<h3>Candidates without a score</h3><p>A failed judgement is no score: such a "
        "candidate is in no pair.</p>"
        + page.table("candidates without a score", ("reason", *groups), rows)
    )


def _failed_calls(store: Store, samples: set[str]) -> str:
    kinds: dict[str, _Failures] = {}
    for row in store.scan(_CALLS):
        sample, _, _, state, reason, raw, *_ = row
        if sample in samples and state == "failed":
            number, first, reply = kinds.get(kind_of(reason), (0, reason, None))
            kinds[kind_of(reason)] = _Failures(number + 1, first, reply or text_of(raw))
    if not kinds:
        return ""
    parts = ["<h3>Failed requests</h3>"]
    for kind, found in sorted(kinds.items(), key=lambda item: -item[1].number):
        reply = "no reply came" if found.raw is None else "one reply, as it came"
        shown = "" if found.raw is None else f"<pre>{_cut(found.raw)}</pre>"
        parts.append(
            f"<details{'' if found.raw is None else ' open'}>"
            f"<summary>{escape(kind)}: {found.number:,} "
            f"<span class='mute'>({reply})</span></summary>"
            f"<p class='mute'>{escape(found.reason)}</p>{shown}</details>"
        )
    return "".join(parts)


def _cut(raw: str) -> str:
    left = len(raw) - _RAW
    rest = f" … and {count(left, 'character')} more" if left > 0 else ""
    return escape(raw[:_RAW]) + (f"<span class='mute'>{rest}</span>" if rest else "")
