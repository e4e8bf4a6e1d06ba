"""``jaxalign judge``: have the segments of a file of records scored."""

from collections.abc import Sequence

from jaxalign.cli import parsing


__all__ = ["run"]


def run(arguments: Sequence[str]) -> int:
    """Parse and judge; the last line says how many responses have no verdict."""
    from jaxalign.feedback.judge_file import JudgeFileConfig, estimate_file, judge_file
    from jaxalign.judging.estimate import lines_of

    parser = parsing.make_parser("judge", JudgeFileConfig, description=__doc__ or "")
    parsing.add_dry_run(parser)
    dry, config = parsing.parse_with("dry_run", parser, arguments, JudgeFileConfig)
    if dry:
        print("dry run: nothing is sent, nothing is written")
        print(*lines_of(config.judge, estimate_file(config)), sep="\n")
        return 0
    if config.judge.name in ("local", "reward"):
        from jaxalign.cli import devices

        devices.set_up_jax()
    report = judge_file(config)
    known = report.requests - report.asked
    cost = f", cost {report.cost:.4f}" if report.cost else ""
    print(
        f"judged: {config.out} ({report.responses} responses, {report.requests} "
        f"requests: {report.asked} asked, {known} known from {config.store_path})"
    )
    print(
        f"{report.prompt_tokens} prompt tokens, {report.completion_tokens} completion "
        f"tokens{cost}"
    )
    if report.agreement.pairs:
        equal, pairs, distance = report.agreement
        print(
            f"agreement of votes: {equal / pairs:.3f} of pairs equal, mean distance "
            f"{distance / pairs:.3f} ({report.failed_votes} votes failed)"
        )
    print(f"{report.failed} failed responses")
    return 0
