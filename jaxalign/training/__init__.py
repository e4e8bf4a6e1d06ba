"""Training: optimiser, step, loop, metrics."""

from jaxalign.training import loop, metrics, optimizer, step


__all__ = ["loop", "metrics", "optimizer", "step"]
