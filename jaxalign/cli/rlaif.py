"""``jaxalign rlaif``: rounds of sample, decompose, judge, pair, train and gate."""

from collections.abc import Sequence

from jaxalign.cli import devices, parsing


__all__ = ["run"]


def run(arguments: Sequence[str]) -> int:
    """Parse and run all rounds; 42 asks to be run again (after SIGTERM)."""
    from jaxalign.feedback.config import RLAIFConfig
    from jaxalign.feedback.rounds import rlaif
    from jaxalign.training import progress
    from jaxalign.training.loop import Preempted, Preemption, TrainingDiverged

    parts = {
        "objective": parsing.chosen_objective(arguments),
        "adapter": parsing.chosen_adapter(arguments),
    }
    parser = parsing.make_parser("rlaif", RLAIFConfig, parts, description=__doc__ or "")
    config = parsing.parse(parser, arguments, RLAIFConfig, parts)
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
    print(f"report: {out / 'report.html'}")
    return 0
