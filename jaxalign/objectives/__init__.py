"""Objectives: what is minimised, from arrays up to batches."""

from jaxalign.objectives import diagnostics, dpo2d, logps, pairwise, policy


__all__ = ["diagnostics", "dpo2d", "logps", "pairwise", "policy"]
