"""The directory of a run: made once, refused for another run, found again later."""

import contextlib
import dataclasses
import fcntl
import json
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import yaml

from jaxalign import progress
from jaxalign.checkpoints import runs
from jaxalign.configs import to_dict, to_plain
from jaxalign.data.patchers import processor
from jaxalign.errors import UserError
from jaxalign.parallel import multihost
from jaxalign.training.config import TrainConfig, from_dict
from jaxalign.whole_file import write_text


__all__ = ["FREE", "claim", "keep_config", "read_config"]

_MESH = ("mesh.data", "mesh.fsdp", "mesh.tensor")

FREE = ("out", "report_to", "save_total_limit", "data_workers", *_MESH)
"""The options that a run may go on with others of. They change no number of it, but
for the mesh: sums are taken in another order there, which is said."""


def read_config(run: str | Path) -> TrainConfig:
    """Read the config of a run.

    Raises:
      UserError: it is no run directory.
    Example:
      >>> import tempfile
      >>> run = Path(tempfile.mkdtemp())
      >>> files = {"model": "smollm2", "data": "pairs.jsonl", "out": str(run)}
      >>> keep_config(run, TrainConfig(**files, max_steps=10))
      >>> read_config(run).max_steps
      10
    """
    run = Path(run)
    return from_dict(runs.read_settings(run))


@contextlib.contextmanager
def claim(
    config: Any,
    sources: dict[str, str],
    *,
    name: str = runs.CONFIG,
    free: Collection[str] = FREE,
    before: Callable[[Path], dict[str, Any]] | None = None,
) -> Iterator[Path]:
    """Make or reopen the run directory and hold it against other runs.

    Of several processes the first does it for all.

    Args:
      config: the run's, a dataclass with ``out``.
      sources: fingerprints of model and data; how pictures are made into patches.
      name: of the file that keeps the config.
      free: fields that may change when the run goes on.
      before: reads the kept config as nested values; default a training run's.
    Raises:
      UserError: another config's run, changed sources, another process, or other files.
    Example:
      >>> import tempfile
      >>> files = {"model": "smollm2", "data": "pairs.jsonl", "out": tempfile.mkdtemp()}
      >>> with claim(TrainConfig(**files, max_steps=10), {"model": "ab12"}) as run:
      ...     sorted(path.name for path in run.iterdir())
      ['.lock', 'config.yaml', 'sources.json']
    """
    with contextlib.ExitStack() as stack:
        held = _held(config, sources, name, free, before)
        multihost.on_first(lambda: stack.enter_context(held))
        yield Path(config.out)


@contextlib.contextmanager
def _held(
    config: Any,
    sources: dict[str, str],
    name: str,
    free: Collection[str],
    before: Callable[[Path], dict[str, Any]] | None,
) -> Iterator[None]:
    run = Path(config.out)
    if run.exists() and not run.is_dir():
        raise UserError(f"--out {run} is a file: give a directory")
    try:
        run.mkdir(parents=True, exist_ok=True)
        lock_file = (run / ".lock").open("w")
    except OSError as error:
        raise UserError(f"--out {run} cannot be written: {error}") from None
    with lock_file as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"another process is writing to {run}: wait for it, or use another "
                "--out"
            ) from None
        begun = (run / name).is_file()
        kept = json.dumps(sources, indent=2) + "\n"
        strange = [p.name for p in run.iterdir() if not p.name.startswith(".")]
        if (
            strange == [runs.SOURCES]
            and (run / runs.SOURCES).read_bytes() == kept.encode()
        ):
            strange = []  # of this very run, stopped before its config was written
        if strange and not begun:
            raise UserError(
                f"--out {run} is not empty and no run's directory: it has "
                f"{', '.join(sorted(strange)[:3])}. Give a new directory"
            )
        if begun:
            old = to_dict(read_config(run)) if before is None else before(run)
            _refuse_difference(
                run, _filled(old, config), to_dict(config), sources, free
            )
        else:
            # The config comes last: without it the directory is no run yet.
            write_text(run / runs.SOURCES, kept)
            keep_config(run, config, name)
        yield


def _filled(before: dict[str, Any], config: Any) -> dict[str, Any]:
    """Give a kept config the defaults of options that there were not when it was."""
    filled = dict(before)
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name not in filled:
            if field.default is not dataclasses.MISSING:
                filled[field.name] = to_plain(field.default)
            elif field.default_factory is not dataclasses.MISSING:
                filled[field.name] = to_plain(field.default_factory())
        elif dataclasses.is_dataclass(value) and isinstance(filled[field.name], dict):
            filled[field.name] = _filled(filled[field.name], value)
    return filled


def keep_config(run: Path, config: Any, name: str = runs.CONFIG) -> None:
    """Write the config of a run, whole or not at all.

    Args:
      run: its directory.
      config: a dataclass.
      name: of the file.
    Raises:
      OSError: it cannot be written.
    Example:
      >>> import tempfile
      >>> run = Path(tempfile.mkdtemp())
      >>> files = {"model": "smollm2", "data": "pairs.jsonl", "out": str(run)}
      >>> keep_config(run, TrainConfig(**files, max_steps=10))
      >>> runs.read_settings(run)["model"]
      'smollm2'
    """
    write_text(run / name, yaml.safe_dump(to_dict(config), sort_keys=False))


def _refuse_difference(
    run: Path,
    before: dict[str, Any],
    now: dict[str, Any],
    sources: dict[str, str],
    free: Collection[str],
) -> None:
    old, new = _flat(before), _flat(now)
    differing = {
        name: f"{name}: {old.get(name)!r} there, {new.get(name)!r} now"
        for name in sorted({*old, *new})
        if old.get(name) != new.get(name)
    }
    changed = [said for name, said in differing.items() if name not in free]
    if changed:
        raise UserError(
            f"{run} holds a run with another config ({'; '.join(changed[:8])}). Use "
            "the same options to continue it, or another --out"
        )
    were = runs.read_sources(run)
    for name, value in sources.items():
        if name == runs.PICTURES and name in were:
            _compare_pictures(run, were[name], value)
        elif were.get(name) != value:
            raise UserError(
                f"the {name} has changed since {run} was begun, so the run cannot go "
                "on exactly. Restore it, or begin anew with another --out"
            )
    if moved := [differing[name] for name in _MESH if name in differing]:
        progress.say(
            f"{run} goes on with another mesh ({'; '.join(moved)}): from here on its "
            "numbers may differ in their last bits from those of a run without the "
            "change"
        )


def _compare_pictures(run: Path, before: str, now: str) -> None:
    """Refuse other options of pictures than a run has; say where a library changed."""
    found = processor.changes(before, now)
    if found.options:
        raise UserError(
            f"the way in which pictures are made into patches has changed since {run} "
            f"was begun ({'; '.join(found.options)}), so the run cannot go on exactly. "
            "Restore the checkpoint's processor files, or begin anew with another --out"
        )
    if found.versions:
        progress.say_once(
            f"warning: {run} was begun under other versions "
            f"({'; '.join(found.versions)}): pictures' pixels may differ by a few "
            "levels from there on. Install the former versions to go on exactly"
        )


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in values.items():
        if isinstance(value, dict) and name != "aspect_weights":
            flat.update(_flat(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = value
    return flat
