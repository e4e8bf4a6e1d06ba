"""Directories of adapters that rounds make: whole, or not there."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxalign import progress


__all__ = ["adapter_of", "export", "policy_name", "whole"]


def policy_name(policy: int | None) -> str:
    """Return what a policy is called by the round that made it; None is the base.

    >>> policy_name(2), policy_name(None)
    ('round-2', 'base')
    """
    return "base" if policy is None else f"round-{policy}"


def adapter_of(out: Path, policy: int | None) -> Path | None:
    """Return where a policy's adapter is; the base has none.

    >>> adapter_of(Path("run"), 1).as_posix()
    'run/round-1/adapter'
    """
    return None if policy is None else out / policy_name(policy) / "adapter"


def export(source: Path | None, out: Path) -> None:
    """Copy the adapter of the last accepted round, if any was, to ``out``/export."""
    if source is None:
        progress.say("no round was accepted: there is no adapter to export")
        return
    target = out / "export"
    if not target.exists() or not _same_files(source, target):
        shutil.rmtree(target, ignore_errors=True)
        whole(target, lambda part: shutil.copytree(source, part))


def _same_files(one: Path, other: Path) -> bool:
    names = [sorted(p.relative_to(x) for p in x.rglob("*")) for x in (one, other)]
    return names[0] == names[1] and all(
        (one / name).read_bytes() == (other / name).read_bytes()
        for name in names[0]
        if (one / name).is_file()
    )


def whole(target: Path, make: Callable[[Path], Any]) -> None:
    """Make a directory that appears under its name when it is complete."""
    part = target.with_name(f".{target.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    make(part)
    part.rename(target)
