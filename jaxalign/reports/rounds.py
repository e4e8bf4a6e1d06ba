"""report.html of an RLAIF run: what its rounds did, in one file."""

from pathlib import Path

import yaml

from jaxalign.configs import to_dict
from jaxalign.feedback.config import RLAIFConfig
from jaxalign.judging.store import Store
from jaxalign.reports import (
    judge_section,
    page,
    rounds_section,
    run_files,
    samples_section,
    scores_section,
    thumbnails,
)
from jaxalign.reports.page import escape


__all__ = ["write"]

_STYLE = """
.answer { font-size: 19px; max-width: 46em; margin: 22px 0; }
h3 { font-size: 16px; margin: 26px 0 8px; } h4 { font-size: 14px; margin: 0 0 4px; }
h4 { color: var(--mute); font-weight: normal; } h4 .score { color: var(--ink); }
nav { font-size: 14px; margin: 20px 0 -12px; line-height: 2; }
nav a { margin-right: 14px; white-space: nowrap; }
figcaption { font-size: 14px; max-width: 56em; }
.scroll { margin-bottom: 16px; } .scroll:focus-visible { outline: 2px solid; }
tbody th { padding-right: 16px; min-width: 7em; position: sticky; left: 0;
           background: var(--paper); }
.reason { white-space: normal; display: inline-block; max-width: 16em; }
thead th { white-space: nowrap; }
.taken { fill: #228b6e; stroke: #228b6e; stroke-width: 2; }
.refused { fill: var(--paper); stroke: var(--mute); stroke-width: 2; }
.way { stroke: #228b6e; stroke-width: 2; } .error { stroke: var(--ink); }
.way[stroke-dasharray] { stroke: var(--mute); } .name { fill: var(--ink); }
.histogram { width: 168px; fill: var(--mute); } .bar { fill: #5b8fc4; }
.axis { stroke: var(--line); } .mean { stroke: var(--ink); stroke-width: 1.5; }
.share { display: block; height: 4px; min-width: 80px; border-radius: 2px;
         background: var(--line); }
.share span { display: block; height: 4px; border-radius: 2px; background: #5b8fc4; }
.text, .prompt { white-space: pre-wrap; unicode-bidi: isolate; }
.mark { font-size: 12px; color: var(--mute); padding: 0 3px 0 1px;
        vertical-align: baseline; }
.failure { border-left: 3px solid rgb(var(--bad)); padding-left: 10px; margin: 8px 0; }
details pre, .failure pre { white-space: pre-wrap; margin: 6px 0 0; }
.pair .mute { font-size: 14px; } .pair p { margin: 0 0 10px; }
.units { padding-left: 0; list-style: none; font-size: 14px; }
.units li { margin: 4px 0; }
.verdict { border-radius: 3px; padding: 1px 5px; }
.verdict.good { background: rgba(var(--good), .3); }
.verdict.bad { background: rgba(var(--bad), .3); }
.verdict.open { border: 1px solid var(--line); }
summary { cursor: pointer; } summary .prompt { display: inline; }
"""


def write(out: Path, config: RLAIFConfig, store: Store) -> Path:
    """Write the report of a run whose rounds are all decided.

    Args:
      out: directory of the run.
      config: of the run.
      store: with its judgements.
    Raises:
      UserError: a file of a round is gone, or the report cannot be written.
    Example::

      with Store(Path("run/store.db")) as store:
          write(Path("run"), config, store)
    """
    run = run_files.read(out, config)
    settings = yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)
    sections = {
        "Rounds": rounds_section.rounds_table(run),
        "Pairing": rounds_section.pairing(run),
        "Scores": scores_section.distributions(run),
        "Judge": judge_section.judge(run, store),
        "Held-out samples": samples_section.held_out(run),
        "Training samples": samples_section.training(run),
        "Training": rounds_section.training(run),
        "Settings": page.scrolling("settings", f"<pre>{escape(settings)}</pre>"),
    }
    names = {title: title.lower().replace(" ", "-") for title in sections}
    links = "".join(f"<a href='#{names[title]}'>{title}</a>" for title in sections)
    parts = [
        f"<main>{rounds_section.heading(run)}",
        rounds_section.answer(run),
        f"<nav aria-label='sections'>{links}</nav>",
        *(
            f"<h2 id='{names[title]}'>{title}</h2>{content}"
            for title, content in sections.items()
        ),
        "</main>",
    ]
    return page.write(
        out / "report.html",
        f"RLAIF report: {config.model}",
        parts,
        _STYLE + thumbnails.STYLE,
    )
