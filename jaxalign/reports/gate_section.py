"""The report's answer where a gate looks at several metrics in the place of scores."""

from collections.abc import Sequence

from jaxalign.feedback import gate_metrics
from jaxalign.feedback.gate import MetricChange
from jaxalign.reports import page
from jaxalign.reports.figures import Step, count, gate_picture, signed
from jaxalign.reports.page import escape
from jaxalign.reports.run_files import BASE, Round, Run


__all__ = ["answer", "cell", "names_of"]

_MEANINGS = {
    "unsafe": "unsafe responses to prompts that are not benign",
    "refused_benign": "benign prompts refused, in full or in part",
    "effective": "responses that serve the user, well or partially",
}


def names_of(run: Run) -> list[str]:
    """Return the metrics that the gate looks at; none where it looks at scores."""
    return [*(run.config.gate.metrics or ())]


def answer(run: Run) -> str:
    """Say which rounds were accepted and why, and draw each metric by policy."""
    names, total = names_of(run), len(run.rounds)
    if run.accepted:
        which = ", ".join(str(one.number) for one in run.accepted)
        before, after = (run.held_out[name] for name in (BASE, run.policy))
        found = gate_metrics.changes(before, after, names)
        whole = "; ".join(f"{n} {_way(one)}" for n, one in found.items())
        last = run.accepted[-1].number
        told = (
            f"<b>{len(run.accepted)} of {count(total, 'round')} accepted</b> ({which})."
            f" From the base model to round {last}: {whole}."
        )
    else:
        told = (
            "<b>No round was accepted.</b> The policy is still the base model and "
            "there is no adapter to export."
        )
    reasons = "".join(
        f"<li>Round {one.number} {_word(one)}: {escape(one.decision.reason)}.</li>"
        for one in run.rounds
    )
    drawn = "".join(_picture(run, name) for name in names)
    return f"<p class='answer'>{told}</p><ul>{reasons}</ul>{drawn}"


def _word(one: Round) -> str:
    return "was accepted" if one.decision.accepted else "was <b>rejected</b>"


def _picture(run: Run, name: str) -> str:
    places = {BASE: 0, **{one.name: one.number for one in run.rounds}}
    steps = [_step(one, name, places) for one in run.rounds]
    if not any(steps):
        return ""
    policies = ["base model", *(f"round {one.number}" for one in run.rounds)]
    drawn = page.scrolling(f"{name} by policy", gate_picture(policies, steps, name))
    better = (run.config.gate.metrics or {})[name]
    return (
        f"<figure>{drawn}<figcaption><b>{name}</b>, {better} is better: share of "
        f"{_MEANINGS[name]}, on held-out prompts. A bar is ± one standard error of the "
        "difference, prompt by prompt, from the policy that the round began with. Full "
        "dots and lines: accepted; empty dots and dashes: rejected.</figcaption>"
        "</figure>"
    )


def _step(one: Round, name: str, places: dict[str, int]) -> Step | None:
    change = (one.decision.metrics or {}).get(name)
    if change is None or change.before is None or change.after is None:
        return None
    return Step(
        places[one.origin],
        change.before,
        change.after,
        change.standard_error,
        one.decision.accepted,
    )


def cell(one: Round, name: str) -> str:
    """Show one metric of one round in the table of the rounds."""
    change = (one.decision.metrics or {}).get(name)
    if change is None:
        return "–"
    missing = f", {change.failed:,} without a verdict" if change.failed else ""
    return f"{_way(change)}<br>{count(change.prompts, 'prompt')}{missing}"


def _way(one: MetricChange) -> str:
    if one.before is None or one.after is None or one.difference is None:
        return "not compared"
    return (
        f"{signed(one.before, plus='')} → {signed(one.after, plus='')}, "
        f"{signed(one.difference)}{_ends(one.interval)}"
    )


def _ends(interval: Sequence[float] | None) -> str:
    if interval is None:
        return ""
    return f" (95 %: {' to '.join(signed(end) for end in interval)})"
