"""What is set before a command touches a device."""

import os
from pathlib import Path

import jax


__all__ = ["set_up_jax"]


def set_up_jax(distributed: str = "off") -> None:
    """Join the other processes, and keep compiled programs so that runs start at once.

    ``JAX_COMPILATION_CACHE_DIR`` chooses the place; an empty value turns it off. Only
    what took half a second to compile is kept, unless
    ``JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS`` says otherwise.

    Args:
      distributed: ``--distributed``, see ``parallel.multihost.initialise``.
    """
    if distributed != "off":
        from jaxalign.parallel import multihost

        multihost.initialise(distributed)
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    place = os.environ.get(
        "JAX_COMPILATION_CACHE_DIR", str(default / "jaxalign" / "xla")
    )
    if place:
        jax.config.update("jax_compilation_cache_dir", place)
        least = os.environ.get("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
        jax.config.update("jax_persistent_cache_min_compile_time_secs", float(least))
