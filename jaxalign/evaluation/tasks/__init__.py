"""Our benchmarks, one file each with a ``TASK``."""
