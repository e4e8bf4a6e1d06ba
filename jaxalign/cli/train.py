"""``jaxalign train``: train on feedback records."""

from collections.abc import Sequence
from pathlib import Path

from jaxalign.cli import devices, parsing


__all__ = ["run"]


def run(arguments: Sequence[str]) -> int:
    """Parse and train; 42 asks to be run again (after SIGTERM)."""
    from jaxalign import progress
    from jaxalign.objectives.objective import beta_of
    from jaxalign.parallel import multihost
    from jaxalign.reports import run as run_report
    from jaxalign.training import config as config_lib
    from jaxalign.training.loop import TrainingDiverged
    from jaxalign.training.preemption import Preempted, Preemption
    from jaxalign.training.run import train

    parts = {
        "objective": parsing.chosen_objective(arguments),
        "adapter": parsing.chosen_adapter(arguments),
    }
    parser = parsing.make_parser(
        "train", config_lib.TrainConfig, parts, description=__doc__ or ""
    )
    parsing.add_distributed(parser)
    distributed, config = parsing.parse_with(
        "distributed", parser, arguments, config_lib.TrainConfig, parts
    )
    devices.set_up_jax(distributed)
    preemption = Preemption()
    preemption.install()
    try:
        out = train(config, preemption=preemption)
    except Preempted:
        progress.say("stopped by SIGTERM: give the same command again to go on")
        return 42
    except TrainingDiverged as error:
        progress.say(f"jaxalign: error: {error}")
        return 1
    if not multihost.is_first():
        return 0
    run_report.write_report(
        out / "report.html",
        title=f"jaxalign: {config.objective.name} on {Path(config.model).name}",
        run=out,
        figures=run_report.held_out_figures(out),
        examples=(),
        facts={"data": Path(config.data).name, "adapter": config.adapter.name},
        beta=beta_of(config.objective),
    )
    print(f"trained: {out}")
    return 0
