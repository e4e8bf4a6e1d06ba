"""What is set before a command touches a device."""

import os
from pathlib import Path

import jax


__all__ = ["set_up_jax"]


def set_up_jax() -> None:
    """Keep compiled programs on disk, so that the next run starts at once.

    ``JAX_COMPILATION_CACHE_DIR`` chooses the place; an empty value turns it off.
    """
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    place = os.environ.get(
        "JAX_COMPILATION_CACHE_DIR", str(default / "jaxalign" / "xla")
    )
    if place:
        jax.config.update("jax_compilation_cache_dir", place)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
