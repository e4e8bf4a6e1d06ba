"""``jaxalign eval``: a model's figures on benchmarks, with intervals."""

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jaxalign.cli import parsing


if TYPE_CHECKING:
    from jaxalign.evaluation.config import EvalConfig
    from jaxalign.evaluation.run_files import TaskReport

__all__ = ["run", "say"]

_SEVERAL = ("--tasks", "--conditions")
_LEFT = {*("settings", "topics", "subtopics", "joint", "upstream", "facts", "samples")}
"""Figures that are left to the page."""


def run(arguments: Sequence[str]) -> int:
    """Parse and evaluate; the exit status is 0 however many calls failed."""
    from jaxalign.cli import devices
    from jaxalign.evaluation import inspect_log
    from jaxalign.evaluation.config import EvalConfig
    from jaxalign.evaluation.harness import evaluate

    arguments = _with_lists(parsing.with_judge(arguments))
    parser = parsing.make_parser("eval", EvalConfig, description=__doc__ or "")
    parsing.add_dry_run(parser)
    dry, config = parsing.parse_with("dry_run", parser, arguments, EvalConfig)
    devices.set_up_jax()
    if dry:
        from jaxalign.evaluation.estimate import lines_of_run

        print("dry run: nothing is sent, nothing is written")
        print(*lines_of_run(config), sep="\n")
        return 0
    if config.log_format == "inspect":
        inspect_log.library()
    say(config, evaluate(config))
    return 0


def say(config: "EvalConfig", reports: Sequence["TaskReport"]) -> None:
    """Print the figures, and write the page and the log; of a part there are none."""
    from jaxalign.evaluation import inspect_log
    from jaxalign.reports import evaluation

    for report in reports:
        print(f"{report.name}: {report.metrics['n']} items")
        if lines := _lines(report.metrics):
            print(*lines, sep="\n")
    if config.shard is not None:
        print(
            f"evaluated: {config.out}, part {config.shard}; `jaxalign join OUT` with "
            "all parts behind it gives the figures"
        )
    else:
        if config.log_format == "inspect":
            paths = inspect_log.write(config.out)
            print(*(f"log: {path}" for path in paths), sep="\n")
        page = evaluation.write(config.out)
        print(f"evaluated: {config.out} (page: {page})")
    for report in reports:
        if not report.failed_answers and not report.failed_gradings:
            continue
        warning = "warning: " if report.failed_share > evaluation.MOST_FAILED else ""
        print(
            f"{warning}{report.name}: {report.failed_answers} of {report.answers} "
            f"answers and {report.failed_gradings} of {report.gradings} judgements "
            "failed; the same command asks for them again"
        )


def _with_lists(arguments: Sequence[str]) -> list[str]:
    """Return arguments in which ``a,b`` after a flag of several names is a list."""
    found = list(arguments)
    for place, argument in enumerate(found):
        flag, equals, value = argument.partition("=")
        if flag not in _SEVERAL:
            continue
        if equals:
            found[place] = f"{flag}={_listed(value)}"
        elif place + 1 < len(found):
            found[place + 1] = _listed(found[place + 1])
    return found


def _listed(value: str) -> str:
    if value.startswith("["):
        return value
    return json.dumps([name.strip() for name in value.split(",") if name.strip()])


def _lines(metrics: Mapping[str, Any]) -> list[str]:
    """Return the figures as lines, those of topics left to the page."""
    from jaxalign.evaluation.results import leaves

    return [
        f"  {'.'.join(path)}: {_figure(leaf)}"
        for path, leaf in leaves(metrics)
        if len(path) <= 2 and not {*path} & _LEFT
    ]


def _figure(figure: Mapping[str, Any]) -> str:
    if figure["value"] is None:
        return "no items"
    ends = figure["interval"]
    shown = "" if ends is None else f" [{ends[0]:.4f}, {ends[1]:.4f}]"
    return f"{figure['value']:.4f}{shown} (n = {figure['n']})"
