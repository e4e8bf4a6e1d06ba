"""Responses side by side, their segments coloured by their scores."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxalign.data.records import Segment
from jaxalign.feedback.candidates import JudgedPrompt
from jaxalign.feedback.decompose.decomposition import Unit
from jaxalign.reports import page, shown_samples, thumbnails
from jaxalign.reports.figures import count, signed
from jaxalign.reports.page import escape
from jaxalign.reports.run_files import BASE, Round, Run, judged_of
from jaxalign.reports.shown_samples import Shown


__all__ = ["held_out", "training"]

_MOST = 12
_RAW = 400


class _Scale(NamedTuple):
    """The scores at the ends of the colours."""

    low: float
    high: float

    @classmethod
    def of(cls, run: Run) -> "_Scale":
        """Return 0 to 4, or what a checkpoint's scores fill of it."""
        if run.config.judge.name not in ("local", "reward"):
            return cls(0.0, 4.0)
        groups = [*(one.judged for one in run.rounds), *run.held_out.values()]
        means = sorted(
            _mean(s) for group in groups for j in judged_of(group) for s in j.segments
        )
        if not means:
            return cls(0.0, 4.0)
        last = len(means) - 1
        return cls(means[int(0.05 * last)], means[math.ceil(0.95 * last)])

    def colour(self, score: float) -> str:
        """Return the CSS colour of a score."""
        half = (self.high - self.low) / 2 or 1.0
        place = (score - (self.low + self.high) / 2) / half
        shade = min(1.0, abs(place)) * 0.6
        return f"rgba(var({'--good' if place >= 0 else '--bad'}), {shade:.2f})"


def held_out(run: Run) -> str:
    """Show held-out prompts completed before and after."""
    pair = _policies(run)
    if pair is None:
        return "<p>No round got as far as the gate.</p>"
    before, after = (run.held_out[name] for name in pair)
    scale = _Scale.of(run)
    names = [_policy(name) for name in pair]
    places = shown_samples.held_out_places(before, after, _MOST)
    parts = [
        f"<p>Left the {escape(names[0])}, right {escape(names[1])}: {len(places)} of "
        f"{len(before):,} prompts by their change: the largest gains, some with hardly "
        "any, the largest losses, and what has no score on one side. "
        f"{_legend(run, scale)}</p>"
    ]
    for place in places:
        one, other = before[place], after[place]
        gain = shown_samples.change(one, other)
        told = (
            "not compared: one side has no score"
            if gain is None
            else f"change {signed(gain)}"
        )
        several = len(one.texts)
        if several > 1:
            told += f" of the mean of {several} completions; the first one is shown"
        sides = [
            _side(name, Shown(x.texts[0], x.judged[0]), scale)
            for name, x in zip(names, (one, other), strict=True)
        ]
        shown = _pictures(run, one, run.config.gate.prompts)
        parts.append(_pair(one.prompt, shown, told, sides))
    return "".join(parts)


def _policies(run: Run) -> tuple[str, str] | None:
    """Return the ends of the run, or the last comparison if nothing was accepted."""
    if run.accepted:
        return BASE, run.policy
    compared = [one for one in run.rounds if one.compared]
    return (compared[-1].origin, compared[-1].name) if compared else None


def _policy(name: str) -> str:
    return "base model" if name == BASE else name.replace("-", " ")


def training(run: Run) -> str:
    """Show training prompts with their best candidate and their worst."""
    scale = _Scale.of(run)
    parts = [
        "<p>The best and the worst candidate of some prompts: large gaps, then all "
        f"sizes, then a failure. {_legend(run, scale)}</p>"
    ]
    for one in run.rounds:
        places = shown_samples.training_places(
            one.judged, max(2, _MOST // len(run.rounds))
        )
        parts.append(f"<h3>Round {one.number}</h3>")
        parts += [_candidates(run, one, place, scale) for place in places]
        if not places:
            parts.append("<p class='mute'>No prompt has a candidate with a score.</p>")
    return "".join(parts)


def _candidates(run: Run, one: Round, place: int, scale: _Scale) -> str:
    asked = one.judged[place]
    found = shown_samples.extremes(asked)
    assert found is not None  # as training_places promises
    best, worst = found
    if best.judged.score is None or worst.judged.score is None:
        told = "one candidate has no score"
    else:
        paired = (best.text, worst.text) in one.pairs
        told = (
            f"gap {signed(best.judged.score - worst.judged.score, plus='')}, "
            f"{'a training pair' if paired else 'not a training pair'}"
        )
    told = f"prompt {place + 1}, {count(len(asked.texts), 'candidate')}; {told}"
    last = "worst" if worst.judged.score is not None else "failed"
    sides = [_side("best", best, scale), _side(last, worst, scale)]
    shown = _pictures(run, asked, run.config.prompts)
    return _pair(asked.prompt, shown, told, sides)


def _pictures(run: Run, one: JudgedPrompt, source: str) -> str:
    return thumbnails.of_row(one.prompt, one.columns, source, run.config.image_dir)


def _legend(run: Run, scale: _Scale) -> str:
    if not any(j.segments for one in run.rounds for j in judged_of(one.judged)):
        return "Below each text stands what the judge found in it."
    return (
        "Segments are coloured by the mean of their aspects, which stands behind them: "
        f"<span class='mute'>{scale.low:.2g}</span> <span class='scale'></span> "
        f"<span class='mute'>{scale.high:.2g}</span>."
    )


def _pair(prompt: Any, pictures: str, told: str, sides: Sequence[str]) -> str:
    text = thumbnails.words(prompt)
    return (
        f"<section class='pair'>{pictures}{page.folded(text, escape(text), 'prompt')}"
        f"<p class='mute'>{told}</p><div class='sides'>{''.join(sides)}</div></section>"
    )


def _side(name: str, shown: Shown, scale: _Scale) -> str:
    judged = shown.judged
    score = "no score" if judged.score is None else signed(judged.score, plus="")
    marked = _marked(shown.text, judged.segments, scale)
    parts = [
        f"<h4>{escape(name)} <span class='score'>{score}</span></h4>",
        page.folded(shown.text, marked, "text")
        if shown.text.strip()
        else "<p class='mute'>an empty text</p>",
    ]
    if judged.failure is not None:
        parts.append(
            f"<div class='failure'><b>✗ failed</b> ({judged.failure.kind}): "
            f"{escape(judged.failure.reason)}{_raw(judged.failure.raw)}</div>"
        )
    if judged.units:
        parts.append(_units(judged.units))
    if judged.segments:
        parts.append(_table(shown.text, judged.segments))
    return f"<div>{''.join(parts)}</div>"


def _raw(raw: str | None) -> str:
    if raw is None:
        return ""
    cut = raw[:_RAW] + ("…" if len(raw) > _RAW else "")
    return f"<pre>{escape(cut)}</pre>"


def _marked(text: str, segments: Sequence[Segment], scale: _Scale) -> str:
    pieces, at = [], 0
    for segment in segments:
        score = _mean(segment)
        every = ", ".join(f"{a} {_short(v)}" for a, v in segment.scores.items())
        pieces.append(
            f"{escape(text[at : segment.start])}<span class='segment' "
            f"title='{escape(every)}' style='background: {scale.colour(score)}'>"
            f"{escape(text[segment.start : segment.end])}</span>"
            f"<sub class='mark'>{_short(score)}</sub>"
        )
        at = segment.end
    return "".join([*pieces, escape(text[at:])])


def _mean(segment: Segment) -> float:
    return math.fsum(segment.scores.values()) / len(segment.scores)


def _short(score: float) -> str:
    return f"{round(score, 2) + 0.0:g}".replace("-", "−")


def _table(text: str, segments: Sequence[Segment]) -> str:
    aspects = sorted({aspect for segment in segments for aspect in segment.scores})
    if len(aspects) < 2:
        return ""
    rows = [
        [
            f"{number}. {escape(' '.join(text[s.start : s.end].split())[:28])}",
            *(_cell(s.scores, aspect) for aspect in aspects),
        ]
        for number, s in enumerate(segments, 1)
    ]
    content = page.table(
        "scores of the segments", ("", *(escape(a) for a in aspects)), rows
    )
    return (
        f"<details class='rows'><summary>scores by aspect</summary>{content}</details>"
    )


def _cell(scores: Mapping[str, float], aspect: str) -> str:
    return _short(scores[aspect]) if aspect in scores else "–"


_AGAINST = {
    *("rejected", "unhandled", "incorrect"),
    *("unsafe", "full_refusal", "partial_refusal", "ineffective"),
}
_FOR = {
    *("supported", "handled", "correct"),
    *("safe", "full_compliance", "very", "partially"),
}


def _units(units: Sequence[Unit]) -> str:
    """List what a candidate was taken apart into."""
    items = []
    for unit in units:
        found = unit.verdict or "no verdict"
        kind = "bad" if found in _AGAINST else "good" if found in _FOR else "open"
        labels = ", ".join(f"{k}: {_label(v)}" for k, v in unit.labels.items())
        items.append(
            f"<li><span class='verdict {kind}'>{escape(found)}</span> "
            f"{escape(unit.text)} <span class='mute'>{escape(labels)}</span></li>"
        )
    return f"<ul class='units'>{''.join(items)}</ul>"


def _label(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
