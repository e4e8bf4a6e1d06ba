"""Judges: what asks for a verdict, and what gives one."""

__all__ = ()
