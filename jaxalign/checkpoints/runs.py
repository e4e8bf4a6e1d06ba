"""What others read of a run's directory: its options and its sources."""

import json
from pathlib import Path
from typing import Any

from jaxalign.configs import read_yaml
from jaxalign.errors import UserError


__all__ = [
    "ADAPTER_START",
    "CHECKPOINTS",
    "CONFIG",
    "PICTURES",
    "SOURCES",
    "is_run",
    "latest_step",
    "read_settings",
    "read_sources",
    "settings_of",
]

CONFIG = "config.yaml"
SOURCES = "sources.json"
PICTURES = "pictures"
"""Of a run's sources: how pictures were made into patches, see ``Patcher.settings``."""

CHECKPOINTS = "checkpoints"
ADAPTER_START = "adapter_start.safetensors"
"""The adapter's starting values, of which checkpoints have only what is trained."""


def is_run(path: str | Path) -> bool:
    """Tell whether a directory is a run's.

    >>> is_run("/")
    False
    """
    path = Path(path)
    return (path / CONFIG).is_file()


def read_settings(run: str | Path) -> dict[str, Any]:
    """Read the options of a run as plain nested values.

    Raises:
      UserError: it is no run directory.
    Example:
      >>> import tempfile
      >>> run = Path(tempfile.mkdtemp())
      >>> _ = (run / CONFIG).write_text("objective: {name: dpo, beta: 0.2}")
      >>> read_settings(run)["objective"]
      {'name': 'dpo', 'beta': 0.2}
    """
    run = Path(run)
    if not is_run(run):
        raise UserError(
            f"{run} is no run directory: it has no {CONFIG}. Expected the --out of "
            "`jaxalign train`"
        )
    return read_yaml(run / CONFIG)


def settings_of(adapter: str | None) -> dict[str, Any] | None:
    """Return the options of the run that an adapter is, None where it is none.

    >>> settings_of(None) is None
    True
    """
    if adapter is None or not is_run(adapter):
        return None
    return read_settings(adapter)


def latest_step(adapter: str | Path) -> int | None:
    """Return the step of a run's last checkpoint, 0 before the first; None for no run.

    >>> latest_step("/") is None
    True
    """
    if not is_run(adapter):
        return None
    names = [path.name for path in (Path(adapter) / CHECKPOINTS).glob("*")]
    return max((int(name) for name in names if name.isdigit()), default=0)


def read_sources(run: str | Path) -> dict[str, str]:
    """Read the fingerprints of what a run was made from.

    Raises:
      UserError: there is no such file, or it is no JSON.
    Example:
      >>> import tempfile
      >>> run = Path(tempfile.mkdtemp())
      >>> _ = (run / SOURCES).write_text('{"model": "ab12"}')
      >>> read_sources(run)
      {'model': 'ab12'}
    """
    run = Path(run)
    try:
        return json.loads((run / SOURCES).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"{run / SOURCES} cannot be read: {error}") from None
