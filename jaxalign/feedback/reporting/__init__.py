"""The sections of an RLAIF run's report."""

__all__: list[str] = []
