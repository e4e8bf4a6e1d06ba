"""``jaxalign score``: write log-probabilities, losses and rewards of records."""

from collections.abc import Sequence

from jaxalign.cli import devices, parsing


__all__ = ["run"]


def run(arguments: Sequence[str]) -> int:
    """Parse and score."""
    from jaxalign.evaluation.score import ScoreConfig, score
    from jaxalign.parallel import multihost

    parts = {"objective": parsing.chosen_objective(arguments)}
    parser = parsing.make_parser("score", ScoreConfig, parts, description=__doc__ or "")
    parsing.add_distributed(parser)
    distributed, config = parsing.parse_with(
        "distributed", parser, arguments, ScoreConfig, parts
    )
    devices.set_up_jax(distributed)
    out = score(config)
    if multihost.is_first():
        print(f"scored: {out}")
    return 0
