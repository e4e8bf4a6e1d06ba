"""report.html: what a run did, in one file that needs nothing else."""

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxalign.data.records import Record, Segment
from jaxalign.training import metrics as metrics_lib


__all__ = ["Example", "Figures", "held_out_figures", "write_report"]


class Figures(NamedTuple):
    """One figure of the held-out part, before and after."""

    name: str
    before: float
    after: float
    meaning: str


class Example(NamedTuple):
    """A held-out record with what the model gives its segments."""

    record: Record
    result: Mapping[str, Any]
    """As ``evaluation.score`` yields it."""


_STYLE = """
:root { --ink: #1c2430; --mute: #647084; --line: #dfe4ea; --paper: #fff;
        --good: 34, 139, 110; --bad: 200, 66, 62; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e9f0; --mute: #98a3b3; --line: #333d4a; --paper: #151a21; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 32px 20px 80px; max-width: 1080px; color: var(--ink);
       background: var(--paper); font: 16px/1.55 system-ui, sans-serif; }
h1 { font-size: 28px; margin: 0 0 4px; } h2 { font-size: 20px; margin: 44px 0 12px; }
.mute, figcaption, th { color: var(--mute); font-weight: normal; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: 6px 12px 6px 0; vertical-align: top;
         border-bottom: 1px solid var(--line); }
td.n { font-variant-numeric: tabular-nums; white-space: nowrap; }
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(300px, 1fr));
          gap: 24px; }
figure { margin: 0; } svg { width: 100%; height: auto; display: block; }
.pair { border-top: 1px solid var(--line); padding: 18px 0; }
.sides { display: grid; grid-template-columns: 1fr 1fr; gap: 28px; }
@media (max-width: 720px) { .sides { grid-template-columns: 1fr; } }
.prompt { white-space: pre-wrap; margin: 0 0 12px; font-weight: 600; }
.segment { white-space: pre-wrap; padding: 1px 2px; border-radius: 3px; }
.rows { margin-top: 8px; font-size: 13px; }
.rows td, .rows th { padding: 2px 8px 2px 0; }
pre { overflow-x: auto; font-size: 13px; background: rgba(127, 127, 127, .08);
      padding: 12px; border-radius: 6px; }
.scale { display: inline-block; width: 120px; height: 10px; border-radius: 5px;
  background: linear-gradient(90deg, rgba(var(--bad), .7), transparent,
  rgba(var(--good), .7)); }
"""

_CURVES = (
    ("loss", "loss", "mean loss of a pair"),
    ("rewards/margins", "reward margin", "β × (log-ratio chosen − rejected), nats"),
    ("rewards/accuracies", "accuracy", "share of pairs whose chosen answer is ahead"),
    ("segments/accuracy", "segment accuracy", "share of segment couples in order"),
    ("logps/chosen", "log-probability of chosen answers", "nats an answer"),
    ("grad_norm", "gradient norm", "before clipping"),
)


def write_report(
    path: Path,
    *,
    title: str,
    run: Path,
    figures: Sequence[Figures],
    examples: Sequence[Example],
    facts: Mapping[str, str],
    beta: float,
) -> Path:
    """Write the report of a run.

    Args:
      path: file to write.
      title: heading.
      run: run directory, for its curves and config.
      figures: held-out figures before and after.
      examples: held-out records with their segments' learned rewards.
      facts: what was run, for the heading.
      beta: temperature, by which log-ratios become rewards.
    """
    steps = metrics_lib.read(run / "metrics.jsonl")
    parts = [
        "<!doctype html><html lang='en'><meta charset='utf-8'>",
        "<meta name='viewport' content='width=device-width, initial-scale=1'>",
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style>",
        f"<h1>{html.escape(title)}</h1>",
        "<p class='mute'>",
        " · ".join(f"{html.escape(k)}: {html.escape(v)}" for k, v in facts.items()),
        "</p>",
        _figures_table(figures),
        "<h2>Curves</h2><div class='curves'>",
        *(_curve(steps, *curve) for curve in _CURVES),
        "</div>",
        _diagnostics(steps),
        *_held_out(examples, beta),
        "<h2>Settings</h2><pre>",
        html.escape((run / "config.yaml").read_text(encoding="utf-8")),
        "</pre></html>\n",
    ]
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text("".join(parts), encoding="utf-8")
    temporary.replace(path)
    return path


def held_out_figures(run: Path) -> list[Figures]:
    """Return what a run's evaluations say, at its start and at its end."""
    steps = metrics_lib.read(run / "metrics.jsonl")
    evaluated = [step for step, values in steps.items() if "eval_loss" in values]
    if len(evaluated) < 2:
        return []
    before, after = steps[evaluated[0]], steps[evaluated[-1]]
    return [
        Figures(name, before[key], after[key], meaning)
        for key, name, meaning in _HELD_OUT
        if key in before and key in after
    ]


_HELD_OUT = (
    (
        "eval_segments/accuracy",
        "segment accuracy",
        "share of (chosen, rejected) segment couples that the learned reward a "
        "token orders as their scores do; 0.5 is chance",
    ),
    (
        "eval_rewards/margins",
        "reward margin",
        "β × (log-ratio of the chosen − of the rejected answer)",
    ),
    ("eval_rewards/accuracies", "accuracy", "share of pairs with a positive margin"),
    ("eval_loss", "loss", "mean over the held-out pairs"),
)

_DIAGNOSTICS = (
    (
        "logps/chosen_drop",
        "fall of the chosen answers",
        "nats an answer below the reference. Growing with the margin it is likelihood "
        "displacement: add a supervised term, raise beta or lower the learning rate",
    ),
    (
        "kl/data",
        "KL to the reference",
        "nats a token, estimated on the data's answers. Large: raise beta",
    ),
    (
        "rewards/longer_preferred",
        "longer answer preferred",
        "share of pairs; compare with the next line. Higher: length is being learned "
        "(r_dpo, ld_dpo, simpo and mean1 correct for it)",
    ),
    ("tokens/longer_chosen", "longer answer chosen", "share of pairs in the data"),
    (
        "segments/contradictory",
        "contradictory segment pairs",
        "share whose chosen segment is scored no higher. Many: skip_contradictory",
    ),
    (
        "segments/zero_weights",
        "selected segments of weight 0",
        "share without any gradient. Many: rejected_weight inverted or uniform",
    ),
    (
        "segments/drift_selected",
        "drift of selected tokens",
        "mean |log-ratio| of tokens that the loss moves",
    ),
    (
        "segments/drift_unselected",
        "drift of the other tokens",
        "mean |log-ratio| of tokens that it does not. Large: add dpo_weight",
    ),
)


def _diagnostics(steps: Mapping[int, Mapping[str, Any]]) -> str:
    """Show the last value of what warns, of the held-out part where there is one."""
    last: dict[str, Any] = {}
    for values in steps.values():
        last.update(values)

    def find(key: str) -> Any:
        return last.get(f"eval_{key}", last.get(key))

    aspects = sorted(
        {
            key.removeprefix("eval_")
            for key in last
            if key.removeprefix("eval_").startswith("segments/accuracy/")
        }
    )
    shown = [
        *_DIAGNOSTICS,
        *(
            (
                key,
                f"segment accuracy, {key.rsplit('/', 1)[1]}",
                "couples ordered as this aspect's scores order them; 0.5 is chance",
            )
            for key in aspects
        ),
    ]
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td><td class='n'>{find(key):.3f}</td>"
        f"<td class='mute'>{html.escape(meaning)}</td></tr>"
        for key, name, meaning in shown
        if _number(find(key))
    )
    return f"<h2>Diagnostics</h2><table>{rows}</table>" if rows else ""


def _held_out(examples: Sequence[Example], beta: float) -> list[str]:
    if not examples:
        return []
    top = _top(examples, beta)
    return [
        "<h2>Held-out answers</h2>",
        "<p>Each segment is coloured by the reward that the model learned for it: "
        "β × (log π − log π<sub>ref</sub>) a token. "
        f"<span class='mute'>−{top:.3f}</span> <span class='scale'></span> "
        f"<span class='mute'>+{top:.3f}</span>. The table beside it has the given "
        "scores.</p>",
        *(_pair(example, beta, top) for example in examples),
    ]


def _figures_table(figures: Sequence[Figures]) -> str:
    if not figures:
        return ""
    rows = "".join(
        f"<tr><td>{html.escape(f.name)}</td><td class='n'>{f.before:.3f}</td>"
        f"<td class='n'><b>{f.after:.3f}</b></td>"
        f"<td class='mute'>{html.escape(f.meaning)}</td></tr>"
        for f in figures
    )
    return (
        "<h2>Held-out part</h2><table><tr><th></th><th>before</th><th>after</th>"
        f"<th></th></tr>{rows}</table>"
    )


def _curve(
    steps: Mapping[int, Mapping[str, Any]], name: str, title: str, unit: str
) -> str:
    train = [(s, v[name]) for s, v in steps.items() if _number(v.get(name))]
    held = [
        (s, v[f"eval_{name}"])
        for s, v in steps.items()
        if _number(v.get(f"eval_{name}"))
    ]
    points = [*train, *held]
    if len(points) < 2:
        return ""
    low, high = min(y for _, y in points), max(y for _, y in points)
    pad = (high - low) * 0.08 or abs(high) * 0.1 or 1.0
    low, high = low - pad, high + pad
    last = max(s for s, _ in points) or 1
    width, height, left, bottom = 360, 190, 46, 24

    def place(step: int, value: float) -> str:
        x = left + (width - left - 8) * step / last
        y = 8 + (height - bottom - 8) * (1 - (value - low) / (high - low))
        return f"{x:.1f},{y:.1f}"

    grid = "".join(
        f"<line x1='{left}' x2='{width - 8}' y1='{y}' y2='{y}' stroke='var(--line)'/>"
        f"<text x='{left - 6}' y='{y + 4}' text-anchor='end'>{value:.3g}</text>"
        for value, y in (
            (value, float(place(0, value).split(",")[1]))
            for value in (low + pad, (low + high) / 2, high - pad)
        )
    )
    lines = (
        f"<polyline fill='none' stroke='#8a96a8' stroke-width='1.5' points='"
        f"{' '.join(place(*p) for p in train)}'/>"
        f"<polyline fill='none' stroke='#228b6e' stroke-width='2.5' points='"
        f"{' '.join(place(*p) for p in held)}'/>"
    )
    dots = "".join(
        "<circle r='3.5' fill='#228b6e' cx='{}' cy='{}'/>".format(*place(*p).split(","))
        for p in held
    )
    return (
        f"<figure><svg viewBox='0 0 {width} {height}' font-size='11' "
        f"fill='var(--mute)' role='img' aria-label='{html.escape(title)}'>"
        f"{grid}{lines}{dots}"
        f"<text x='{width - 8}' y='{height - 6}' text-anchor='end'>step {last}</text>"
        f"</svg><figcaption><b>{html.escape(title)}</b>: {html.escape(unit)} "
        "(grey training, green held out)</figcaption></figure>"
    )


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _rewards(side: Mapping[str, Any], beta: float) -> list[float]:
    return [
        beta * (s["logp"] - s["ref_logp"]) / max(1, s["tokens"])
        for s in side["segments"]
    ]


def _top(examples: Sequence[Example], beta: float) -> float:
    """Return the end of the colour scale: the 95th percentile of all rewards."""
    values = sorted(
        abs(reward)
        for example in examples
        for side in ("chosen", "rejected")
        for reward in _rewards(example.result[side], beta)
    )
    return max(1e-6, values[int(0.95 * (len(values) - 1))]) if values else 1.0


def _pair(example: Example, beta: float, top: float) -> str:
    record, result = example
    prompt = record.prompt
    if not isinstance(prompt, str):
        prompt = "\n".join(f"{m.role}: {m.content}" for m in prompt)
    margin = result["rewards"]["margin"]
    sides = "".join(
        _side(name, text, segments or (), result[name], beta, top)
        for name, text, segments in (
            ("chosen", record.chosen, record.chosen_segments),
            ("rejected", record.rejected or "", record.rejected_segments),
        )
    )
    return (
        f"<div class='pair'><p class='prompt'>{html.escape(prompt)}</p>"
        f"<p class='mute'>reward margin {margin:+.3f}</p>"
        f"<div class='sides'>{sides}</div></div>"
    )


def _side(
    name: str,
    text: str,
    segments: Sequence[Segment],
    result: Mapping[str, Any],
    beta: float,
    top: float,
) -> str:
    rewards = _rewards(result, beta)
    pieces, rows, previous = [], [], 0
    aspects = sorted({aspect for segment in segments for aspect in segment.scores})
    for number, (segment, reward) in enumerate(zip(segments, rewards, strict=True), 1):
        pieces.append(html.escape(text[previous : segment.start]))
        shade = min(1.0, abs(reward) / top) * 0.7
        colour = "--good" if reward >= 0 else "--bad"
        pieces.append(
            f"<span class='segment' title='{reward:+.4f} a token' "
            f"style='background: rgba(var({colour}), {shade:.2f})'>"
            f"{html.escape(text[segment.start : segment.end])}</span>"
        )
        scores = "".join(
            f"<td class='n'>{segment.scores.get(aspect, float('nan')):g}</td>"
            for aspect in aspects
        )
        rows.append(
            f"<tr><td>{number}</td><td class='n'>{reward:+.4f}</td>{scores}</tr>"
        )
        previous = segment.end
    pieces.append(html.escape(text[previous:]))
    head = "".join(f"<th>{html.escape(aspect[:7])}</th>" for aspect in aspects)
    return (
        f"<div><div class='mute'>{name}</div><div>{''.join(pieces)}</div>"
        f"<table class='rows'><tr><th></th><th>learned</th>{head}</tr>{''.join(rows)}"
        "</table></div>"
    )
