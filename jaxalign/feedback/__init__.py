"""Feedback: segments, judges, pairs, and the rounds that make and use them."""

__all__ = ()
