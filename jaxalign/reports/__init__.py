"""Reports: HTML pages of runs and rounds."""

from typing import TYPE_CHECKING

from jaxalign.lazy import submodules


if TYPE_CHECKING:
    from jaxalign.reports import (
        comparison,
        evaluation,
        page,
        rounds,
        run,
    )

__all__ = [
    "comparison",
    "evaluation",
    "page",
    "rounds",
    "run",
]

__getattr__, __dir__ = submodules(__name__, __all__)
