"""Decomposers: a response in pieces that a judge can judge, and a score from them."""

__all__ = ()
