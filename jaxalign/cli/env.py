"""``jaxalign env``: print versions, devices and kernels for a bug report."""

import importlib.metadata
import os
import platform
from collections.abc import Sequence

from jaxalign.errors import UserError


__all__ = ["run"]

PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "chex",
    "numpy",
    "pillow",
    "transformers",
    "tokenizers",
    "safetensors",
    "jsonargparse",
    "pydantic",
)


def run(arguments: Sequence[str]) -> int:
    """Print what a bug report needs."""
    if arguments:
        raise UserError(f"jaxalign env takes no options: got {arguments[0]}")
    import jax

    from jaxalign import __version__
    from jaxalign.models.attention.choice import available, machine_of

    lines = [
        ("jaxalign", __version__),
        ("python", platform.python_version()),
        ("platform", platform.platform()),
        ("cpu cores", str(os.cpu_count())),
        ("memory", _memory()),
    ]
    for package in PACKAGES:
        try:
            lines.append((package, importlib.metadata.version(package)))
        except importlib.metadata.PackageNotFoundError:
            lines.append((package, "not installed"))
    for device in jax.devices():
        stats = device.memory_stats() or {}
        limit = stats.get("bytes_limit")
        size = f", {limit / 1e9:.1f} GB" if limit else ""
        lines.append((f"device {device.id}", f"{device.device_kind}{size}"))
    for name, state in available(machine_of(jax.devices()[0])).items():
        lines.append((f"attention {name}", state))
    lines.append(("XLA_FLAGS", os.environ.get("XLA_FLAGS", "")))
    lines.append(("JAX_PLATFORMS", os.environ.get("JAX_PLATFORMS", "")))
    for name, value in lines:
        print(f"- {name}: {value}")
    return 0


def _memory() -> str:
    try:
        size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return "unknown"
    return f"{size / 1e9:.1f} GB"
