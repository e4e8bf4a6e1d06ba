"""``jaxalign distill``: answers of a teacher that is told more, and not what it was.

``--context risks`` has the risks in each prompt observed on the way by ``--judge.*``,
``--context FILE.jsonl`` is what ``jaxalign disentangle`` observed, and any other file a
system text. The teacher is a checkpoint (``--teacher``) or an endpoint
(``--endpoint.*``); ``jaxalign train --objective.name sft`` trains on what is written.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from jaxalign.cli import parsing


if TYPE_CHECKING:
    from jaxalign.feedback.distill_file import DistillConfig, DistillReport
    from jaxalign.judging.asking import Usage


__all__ = ["run"]


def run(arguments: Sequence[str]) -> int:
    """Parse and distil; the last lines say what was kept, and why the rest was not."""
    from jaxalign.cli import devices
    from jaxalign.feedback.distill_file import DistillConfig, distill_file

    arguments = parsing.with_judge(arguments)
    parser = parsing.make_parser("distill", DistillConfig, description=__doc__ or "")
    parsing.add_dry_run(parser)
    dry, config = parsing.parse_with("dry_run", parser, arguments, DistillConfig)
    if config.teacher is not None or config.judge.name in ("local", "reward"):
        devices.set_up_jax()
    if dry:
        from jaxalign.feedback.distill_estimate import lines_of_distilling

        print("dry run: nothing is sent, nothing is written")
        print(*lines_of_distilling(config), sep="\n")
        return 0
    _say(config, distill_file(config))
    return 0


def _say(config: "DistillConfig", report: "DistillReport") -> None:
    """Print what distilling a file came to."""
    if report.observed is not None:
        from jaxalign.cli import disentangle

        disentangle.say(config.disentangling, report.observed)
    print(f"teacher: {_used(report.teacher)} (store: {config.store_path})")
    if report.judge.requests:
        print(f"judge: {_used(report.judge)}")
    dropped = sum(report.dropped.values())
    reasons = ", ".join(f"{count} {why}" for why, count in report.dropped.items())
    print(f"dropped: {dropped} of {report.prompts} prompts{reasons and ': '}{reasons}")
    if dropped:
        print(f"dropped prompts and their answers: {config.dropped_path}")
    if report.risky:
        print(
            f"refusals: {report.refusals} of {report.risky} answers to risky prompts "
            f"(at most {config.max_refusal_share:g})"
        )
    if report.risky and report.benign:
        risky, benign = report.mean_lengths
        print(
            f"mean length: {risky:.0f} characters of answers to risky prompts, "
            f"{benign:.0f} to benign ones"
        )
    if report.unbalanced:
        print(
            "warning: these lengths differ by more than max_length_ratio "
            f"{config.max_length_ratio:g}, and dropping half of the longer answers "
            "would not mend it: none was dropped for its length"
        )
    kept = report.prompts - dropped
    unmarked = kept - report.risky - report.benign
    print(
        f"distilled: {config.out} ({kept} records: {report.risky} risky, "
        f"{report.benign} benign, {unmarked} neither)"
    )


def _used(usage: "Usage") -> str:
    cost = f", cost {usage.cost:.4f}" if usage.cost else ""
    return (
        f"{usage.requests} requests: {usage.asked} asked, "
        f"{usage.requests - usage.asked} known; {usage.prompt_tokens} prompt tokens, "
        f"{usage.completion_tokens} completion tokens{cost}"
    )
