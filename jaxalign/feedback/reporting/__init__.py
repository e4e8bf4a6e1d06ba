"""The sections of an RLAIF run's report."""

__all__ = ()
