"""Our benchmarks, one file each with a ``TASK``; see ``task_files.known``."""

__all__ = []  # they are found by their files
