"""``jaxalign score``: write log-probabilities, losses and rewards of records."""

from collections.abc import Sequence

from jaxalign.cli import devices, parsing


__all__ = ["run"]


def run(arguments: Sequence[str]) -> int:
    """Parse and score."""
    from jaxalign.evaluation.score import ScoreConfig, score

    parts = {"objective": parsing.chosen_objective(arguments)}
    parser = parsing.make_parser("score", ScoreConfig, parts, description=__doc__ or "")
    config = parsing.parse(parser, arguments, ScoreConfig, parts)
    devices.set_up_jax()
    print(f"scored: {score(config)}")
    return 0
