"""report.html: what a run did, in one file that needs nothing else."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxalign.data.records import Completion, Record, Segment, texts_of
from jaxalign.reports import page, thumbnails
from jaxalign.reports.page import escape, is_number
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


def write_report(
    path: str | Path,
    *,
    title: str,
    run: str | Path,
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
    Returns:
      ``path``.
    Raises:
      OSError: a file of the run cannot be read, or the page not be written.
    Example::

      facts, figures = {"model": "smollm2"}, held_out_figures(Path("run"))
      options = {"figures": figures, "examples": [], "facts": facts, "beta": 0.1}
      write_report("report.html", title="2D-DPO", run="run", **options)
    """
    path, run = Path(path), Path(run)
    steps = metrics_lib.read(run / "metrics.jsonl")
    parts = [
        f"<h1>{escape(title)}</h1>",
        "<p class='mute'>",
        " · ".join(f"{escape(k)}: {escape(v)}" for k, v in facts.items()),
        "</p>",
        _figures_table(figures),
        "<h2>Curves</h2>",
        page.curves(steps),
        _diagnostics(steps),
        *_held_out(examples, beta),
        "<h2>Settings</h2><pre>",
        escape((run / "config.yaml").read_text(encoding="utf-8")),
        "</pre>",
    ]
    return page.write(path, title, parts, thumbnails.STYLE)


def held_out_figures(run: Path) -> list[Figures]:
    """Return what a run's evaluations say, at its start and at its end.

    Returns:
      None of them where the run was evaluated less than twice.
    Example:
      >>> import tempfile
      >>> run = Path(tempfile.mkdtemp())
      >>> log = metrics_lib.MetricsLog(run / "metrics.jsonl")
      >>> log.write(0, {"eval_loss": 0.75})
      >>> log.write(9, {"eval_loss": 0.5})
      >>> log.close()
      >>> [tuple(figure[:3]) for figure in held_out_figures(run)]
      [('loss', 0.75, 0.5)]
    """
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
        f"<tr><td>{escape(name)}</td><td class='n'>{find(key):.3f}</td>"
        f"<td class='mute'>{escape(meaning)}</td></tr>"
        for key, name, meaning in shown
        if is_number(find(key))
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
        f"<tr><td>{escape(f.name)}</td><td class='n'>{f.before:.3f}</td>"
        f"<td class='n'><b>{f.after:.3f}</b></td>"
        f"<td class='mute'>{escape(f.meaning)}</td></tr>"
        for f in figures
    )
    return (
        "<h2>Held-out part</h2><table><tr><th></th><th>before</th><th>after</th>"
        f"<th></th></tr>{rows}</table>"
    )


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
    margin = result["rewards"]["margin"]
    sides = "".join(
        _side(name, *_in_one_text(said, segments or ()), result[name], beta, top)
        for name, said, segments in (
            ("chosen", record.chosen, record.chosen_segments),
            ("rejected", record.rejected or "", record.rejected_segments),
        )
    )
    return (
        f"<div class='pair'>{thumbnails.beside(record.images)}"
        f"<p class='prompt'>{escape(thumbnails.words(record.prompt))}</p>"
        f"<p class='mute'>reward margin {margin:+.3f}</p>"
        f"<div class='sides'>{sides}</div></div>"
    )


def _in_one_text(
    said: Completion, segments: Sequence[Segment]
) -> tuple[str, list[Segment]]:
    """Put a completion's turns one below the other, and the segments with them."""
    text, begins = "", []
    for turn in texts_of(said):
        begins.append(len(text))
        text += f"{turn}\n\n"
    moved = [
        Segment(
            start=s.start + begins[s.turn], end=s.end + begins[s.turn], scores=s.scores
        )
        for s in segments
    ]
    return text.removesuffix("\n\n"), moved


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
        pieces.append(escape(text[previous : segment.start]))
        shade = min(1.0, abs(reward) / top) * 0.7
        colour = "--good" if reward >= 0 else "--bad"
        pieces.append(
            f"<span class='segment' title='{reward:+.4f} a token' "
            f"style='background: rgba(var({colour}), {shade:.2f})'>"
            f"{escape(text[segment.start : segment.end])}</span>"
        )
        scores = "".join(
            f"<td class='n'>{segment.scores.get(aspect, float('nan')):g}</td>"
            for aspect in aspects
        )
        rows.append(
            f"<tr><td>{number}</td><td class='n'>{reward:+.4f}</td>{scores}</tr>"
        )
        previous = segment.end
    pieces.append(escape(text[previous:]))
    head = "".join(f"<th>{escape(aspect[:7])}</th>" for aspect in aspects)
    return (
        f"<div><div class='mute'>{name}</div><div>{''.join(pieces)}</div>"
        f"<table class='rows'><tr><th></th><th>learned</th>{head}</tr>{''.join(rows)}"
        "</table></div>"
    )
