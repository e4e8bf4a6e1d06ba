"""Evaluation: scoring records, reports."""

from jaxalign.evaluation import score


__all__ = ["score"]
