"""Training: optimiser, step, loop, metrics."""

from typing import TYPE_CHECKING

from jaxalign.lazy import submodules


if TYPE_CHECKING:
    from jaxalign.training import loop, metrics, optimizer, step

__all__ = ["loop", "metrics", "optimizer", "step"]

__getattr__, __dir__ = submodules(__name__, __all__)
