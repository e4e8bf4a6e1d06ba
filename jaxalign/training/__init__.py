"""Training: optimiser, step, loop, metrics."""

from typing import TYPE_CHECKING

from jaxalign.lazy import submodules


if TYPE_CHECKING:
    from jaxalign.training import (
        config,
        data_check,
        describe,
        evaluation,
        loop,
        metrics,
        optimizer,
        publish,
        reference,
        run,
        run_directory,
        setup,
        start,
        step,
    )

__all__ = [
    "config",
    "data_check",
    "describe",
    "evaluation",
    "loop",
    "metrics",
    "optimizer",
    "publish",
    "reference",
    "run",
    "run_directory",
    "setup",
    "start",
    "step",
]

__getattr__, __dir__ = submodules(__name__, __all__)
