"""``jaxalign disentangle``: have a judge look for the risks in a file of prompts."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from jaxalign.cli import parsing


if TYPE_CHECKING:
    from jaxalign.feedback.disentangle_file import DisentangleConfig, DisentangleReport

__all__ = ["run", "say"]


def run(arguments: Sequence[str]) -> int:
    """Parse and observe; the last line says how many passes have no answer."""
    from jaxalign.feedback.disentangle_file import (
        DisentangleConfig,
        disentangle_file,
        estimate_disentangling,
    )
    from jaxalign.judging.estimate import lines_of

    description = __doc__ or ""
    parser = parsing.make_parser(
        "disentangle", DisentangleConfig, description=description
    )
    parsing.add_dry_run(parser)
    dry, config = parsing.parse_with("dry_run", parser, arguments, DisentangleConfig)
    if dry:
        print("dry run: nothing is sent, nothing is written")
        print(*lines_of(config.judge, estimate_disentangling(config)), sep="\n")
        print(
            "a prompt that was not looked at yet is taken to hold one risk in its "
            "words and one in its pictures, if it has some"
        )
        return 0
    if config.judge.name == "local":
        from jaxalign.cli import devices

        devices.set_up_jax()
    say(config, disentangle_file(config))
    return 0


def say(config: "DisentangleConfig", report: "DisentangleReport") -> None:
    """Print what disentangling a file came to."""
    known = report.requests - report.asked
    cost = f", cost {report.cost:.4f}" if report.cost else ""
    print(
        f"disentangled: {config.out} ({report.prompts} prompts, {report.requests} "
        f"requests: {report.asked} asked, {known} known from {config.store_path})"
    )
    print(
        f"{report.prompt_tokens} prompt tokens, {report.completion_tokens} completion "
        f"tokens{cost}"
    )
    verifier = (
        f"{report.verified} verified, {report.rejected} rejected, "
        f"{report.unanswered} without the verifier's answer"
    )
    print(
        f"{report.observations} observations: "
        f"{verifier if config.verify else 'none was verified (verify false)'}"
    )
    print(f"{report.failed_passes} failed passes, of {report.failed_prompts} prompts")
