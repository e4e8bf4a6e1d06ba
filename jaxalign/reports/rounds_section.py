"""The report's answer: which rounds were accepted, and what each one did."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxalign.feedback import gate
from jaxalign.reports import gate_section, page
from jaxalign.reports.figures import Step, bar, count, gate_picture, signed
from jaxalign.reports.page import escape
from jaxalign.reports.run_files import BASE, Round, Run, judged_of


__all__ = ["answer", "heading", "pairing", "rounds_table", "training"]

_FATES = {
    "failed": "one of the two has no score",
    "identical": "the two texts are equal",
    "inconsistent": "one text was given several scores",
    "repeated": "the same two texts again",
    "tie": "equal scores",
    "below_gap": "gap below the least one",
    "near_duplicate": "texts too much alike",
    "contradictory": "segments speak against the scores",
    "length_ratio": "lengths too different",
    "not_selected": "not selected: enough of the prompt",
    "length_balance": "dropped to balance lengths",
    "kept": "kept for training",
}


def heading(run: Run) -> str:
    """Say what was run."""
    config = run.config
    judge = config.judge
    held = next(iter(run.held_out.values()), None)
    asked = f"{len(run.rounds[0].judged):,} to train on"
    facts = {
        "model": config.model,
        "judge": " ".join(filter(None, (judge.name, judge.model))),
        "decomposer": config.decomposer.name,
        "objective": str(config.objective.name),
        "adapter": str(config.adapter.name),
        "prompts": asked if held is None else f"{asked}, {len(held):,} held out",
        "rounds": str(config.rounds),
    }
    told = " · ".join(f"{name}: {escape(value)}" for name, value in facts.items())
    return f"<h1>RLAIF report</h1><p class='mute'>{told}</p>"


def answer(run: Run) -> str:
    """Say which rounds were accepted and how far the policy came."""
    if gate_section.names_of(run):
        return gate_section.answer(run)
    names = ["base model", *(f"round {one.number}" for one in run.rounds)]
    places = {BASE: 0, **{one.name: one.number for one in run.rounds}}
    steps = [_step(one, places) for one in run.rounds]
    said = f"<p class='answer'>{_verdict(run)}</p>"
    if not any(steps):
        return said
    drawn = page.scrolling("held-out score by policy", gate_picture(names, steps))
    return f"{said}<figure>{drawn}<figcaption>{_caption(run)}</figcaption></figure>"


def _verdict(run: Run) -> str:
    total = len(run.rounds)
    if not run.accepted:
        said = (
            "<b>No round was accepted.</b> The policy is still the base model and "
            "there is no adapter to export."
        )
        reasons = "; ".join(
            f"round {one.number}: {escape(one.decision.reason)}{_gain(one)}"
            for one in run.rounds
        )
        return f"{said} {reasons[0].upper()}{reasons[1:]}."
    which = ", ".join(str(one.number) for one in run.accepted)
    found = gate.decide(run.held_out[BASE], run.held_out[run.policy])
    told = f"<b>{len(run.accepted)} of {count(total, 'round')} accepted</b> ({which})."
    if found.improvement is None or found.before is None or found.after is None:
        return f"{told} No held-out prompt has a score from both ends of the run."
    error, doubt = "", ""
    if found.standard_error is not None:
        error = f" ± {found.standard_error:.3f}"
        if found.improvement < 2 * found.standard_error:
            doubt = (
                " That is less than two standard errors: it may be chance. More "
                "held-out prompts would tell."
            )
    missing = f", {found.failed} more without a score" if found.failed else ""
    return (
        f"{told} From the base model to round {run.accepted[-1].number} the mean "
        f"held-out score went from {signed(found.before, plus='')} to "
        f"<b>{signed(found.after, plus='')}</b>: <b>{signed(found.improvement)}</b>"
        f"{error} (standard error, {count(found.prompts, 'prompt')}{missing}).{doubt}"
    )


def _gain(one: Round) -> str:
    gain = one.decision.improvement
    return "" if gain is None else f" ({signed(gain)}{_error(one)})"


def _caption(run: Run) -> str:
    other = run.config.gate.judge_model
    judge = (
        "the judge of the rounds, under another seed"
        if other is None
        else f"another model, {escape(other)}"
    )
    return (
        "Mean score of the held-out prompts by policy. A bar is ± one standard error "
        "of the difference, prompt by prompt, from the policy that the round began "
        "with. Full dots and lines: accepted; empty dots and dashes: rejected. The "
        f"scores are of {judge}: they say what a judge prefers, not what people do."
    )


def _step(one: Round, places: dict[str, int]) -> Step | None:
    found = one.decision
    if found.before is None or found.after is None:
        return None
    return Step(
        places[one.origin],
        found.before,
        found.after,
        found.standard_error,
        found.accepted,
    )


def rounds_table(run: Run) -> str:
    """Show each round's figures, a round a column."""
    columns = [_figures(one, gate_section.names_of(run)) for one in run.rounds]
    rows = [[name, *(column[name] for column in columns)] for name in columns[0]]
    head = ("", *(f"round {one.number}" for one in run.rounds))
    return page.table("the rounds", head, rows)


def _figures(one: Round, metrics: Sequence[str]) -> dict[str, str]:
    """Return the figures of a round; of a gate those it decides by."""
    found = one.decision
    every = list(judged_of(one.judged))
    scores = [judged.score for judged in every if judged.score is not None]
    losses = _logged(one, "loss")
    margins = _logged(one, "rewards/margins")
    mark = "✓ accepted" if found.accepted else "✗ rejected"
    lost = "verdict" if metrics else "score"
    missing = f", {found.failed:,} without a {lost}" if found.failed else ""
    return {
        "gate": f"<b>{mark}</b><br><span class='mute reason'>{escape(found.reason)}"
        "</span>",
        "began with": _policy(one.origin),
        **{name: gate_section.cell(one, name) for name in metrics},
        **({} if metrics else _held_out_score(one)),
        "held-out prompts": f"{found.prompts:,}{missing}" if one.compared else "–",
        "prompts": f"{len(one.judged):,}",
        "candidates": f"{len(every):,}",
        "candidates without a score": f"{len(every) - len(scores):,}",
        "mean score of candidates": signed(math.fsum(scores) / len(scores), plus="")
        if scores
        else "–",
        "training pairs": f"{one.pairing['fates']['kept']:,}",
        "loss, first → last": f"{losses[0]:.4f} → {losses[-1]:.4f}" if losses else "–",
        "reward margin, last": signed(margins[-1], 4) if margins else "–",
    }


def _held_out_score(one: Round) -> dict[str, str]:
    found = one.decision
    gain, before, after = found.improvement, found.before, found.after
    return {
        "held-out score": "–"
        if before is None or after is None
        else f"{signed(before, plus='')} → {signed(after, plus='')}",
        "improvement ± standard error": "–"
        if gain is None
        else f"{signed(gain)}{_error(one)}",
    }


def _policy(name: str) -> str:
    return "base model" if name == BASE else escape(name.replace("-", " "))


def _error(one: Round) -> str:
    error = one.decision.standard_error
    return "" if error is None else f" ± {error:.3f}"


def _logged(one: Round, name: str) -> list[float]:
    values = (step.get(name) for step in one.steps.values())
    return [value for value in values if page.is_number(value)]


def pairing(run: Run) -> str:
    """Show what became of every pair of candidates."""
    totals = [sum(one.pairing["fates"].values()) for one in run.rounds]
    rows = [["<b>pairs of candidates</b>", *(f"<b>{n:,}</b>" for n in totals)]]
    for fate, meaning in reversed(_FATES.items()):
        counts = [one.pairing["fates"][fate] for one in run.rounds]
        if any(counts) or fate == "kept":
            cells = [_cell(n, total) for n, total in zip(counts, totals, strict=True)]
            rows.append([_strong(meaning) if fate == "kept" else meaning, *cells])
    spreads = [
        ["prompts with a record", *_each(run, lambda p: f"{p['paired']:,}")],
        [
            "prompts with fewer than two scores",
            *_each(run, lambda p: f"{p['unpaired']:,}"),
        ],
        ["characters, chosen / rejected, before the filters", *_lengths(run, "before")],
        ["characters, chosen / rejected, kept", *_lengths(run, "after")],
        ["gap of those kept: least, median, largest", *_each(run, _gaps)],
    ]
    head = ("", *(f"round {one.number}" for one in run.rounds))
    return (
        "<p>Every two candidates of a prompt are a pair; each meets the first fate "
        "that applies.</p>"
        + page.table("fates of the pairs", head, rows)
        + page.table("lengths and gaps of the pairs", head, spreads)
    )


def _strong(text: str) -> str:
    return f"<b>{text}</b>"


def _cell(number: int, total: int) -> str:
    share = number / max(1, total)
    return f"{number:,} <span class='mute'>{share:.0%}</span>{bar(share)}"


def _each(run: Run, show: Callable[[Mapping[str, Any]], str]) -> list[str]:
    return [show(one.pairing) for one in run.rounds]


def _lengths(run: Run, when: str) -> list[str]:
    spreads = [one.pairing[when] for one in run.rounds]
    return [
        f"{s['chosen_length']:,.0f} / {s['rejected_length']:,.0f}"
        if s["pairs"]
        else "–"
        for s in spreads
    ]


def _gaps(pairing: Mapping[str, Any]) -> str:
    gaps = pairing["after"]["gaps"]
    return f"{gaps[0]:.3g}, {gaps[2]:.3g}, {gaps[4]:.3g}" if gaps else "–"


def training(run: Run) -> str:
    """Draw the curves of each round's training."""
    parts = []
    for one in run.rounds:
        drawn = page.curves(one.steps) if one.steps else ""
        parts.append(f"<h3>Round {one.number}</h3>")
        parts.append(drawn or "<p class='mute'>Nothing was trained.</p>")
    return "".join(parts)
