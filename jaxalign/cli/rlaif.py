"""``jaxalign rlaif``: rounds of sample, decompose, judge, pair, train and gate."""

from collections.abc import Sequence

from jaxalign.cli import devices, parsing


__all__ = ["run"]


def run(arguments: Sequence[str]) -> int:
    """Parse and run all rounds; 42 asks to be run again (after SIGTERM)."""
    from jaxalign import progress
    from jaxalign.feedback.config import RLAIFConfig
    from jaxalign.feedback.estimate import estimate_rounds
    from jaxalign.feedback.rounds import rlaif, store_path
    from jaxalign.judging.estimate import lines_of
    from jaxalign.judging.store import Store
    from jaxalign.reports import rounds as rounds_report
    from jaxalign.training.loop import TrainingDiverged
    from jaxalign.training.preemption import Preempted, Preemption

    parts = {
        "objective": parsing.chosen_objective(arguments),
        "adapter": parsing.chosen_adapter(arguments),
    }
    parser = parsing.make_parser("rlaif", RLAIFConfig, parts, description=__doc__ or "")
    parsing.add_dry_run(parser)
    dry, config = parsing.parse_with("dry_run", parser, arguments, RLAIFConfig, parts)
    if dry:
        found, counter = estimate_rounds(config)
        print("dry run: nothing is sent, nothing is written")
        print(*lines_of(config.judge, found, counter), sep="\n")
        return 0
    devices.set_up_jax()
    preemption = Preemption()
    preemption.install()
    try:
        out = rlaif(config, preemption=preemption)
    except Preempted:
        progress.say("stopped by SIGTERM: give the same command again to go on")
        return 42
    except TrainingDiverged as error:
        progress.say(f"jaxalign: error: {error}")
        return 1
    with Store(store_path(config)) as store:
        rounds_report.write(out, config, store)
    print(f"report: {out / 'report.html'}")
    return 0
