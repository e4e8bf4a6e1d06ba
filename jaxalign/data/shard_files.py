"""Files of parts (``--shard i/n``): what each says of itself, and the one they make.

Beside a part's file lies ``<name>.settings.json``: the options and the data that its
lines are of, under ``shard`` which part it is of how many and how many lines it has
when it is complete, and under ``again`` the command that goes on with it.
"""

import contextlib
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from jaxalign.errors import UserError
from jaxalign.shards import Shard, check_parts, parse
from jaxalign.whole_file import check_target, whole, write_text, writing


__all__ = [
    "AGAIN",
    "SHARD",
    "ShardFile",
    "begin",
    "differing",
    "join_lines",
    "read_part",
    "read_set",
    "said_of",
    "settings_of",
]

SHARD, AGAIN = "shard", "again"
_KEPT = "the parts are as they were, and the same command joins them"


class ShardFile(NamedTuple):
    """A part that a command has made, or begun."""

    path: Path
    shard: Shard
    lines: int
    """That it has when it is complete."""
    settings: Mapping[str, Any]
    """What every part of this whole is made with."""
    again: str
    """The command that goes on with it."""


def settings_of(out: Path) -> Path:
    """Return where the settings of a file lie.

    >>> settings_of(Path("out.jsonl")).name
    'out.jsonl.settings.json'
    """
    return out.with_name(f"{out.name}.settings.json")


def said_of(out: Path) -> dict[str, Any] | None:
    """Return what a file was made with; None where that is not known."""
    try:
        found = json.loads(settings_of(out).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return the names of the settings that differ.

    >>> differing({"seed": 0, "again": "x"}, {"seed": 1, "shard": {}})
    ['seed', 'shard']
    """
    names = sorted((before.keys() | now.keys()) - {AGAIN})
    return [name for name in names if before.get(name) != now.get(name)]


def begin(
    out: Path,
    shard: Shard | None,
    settings: Mapping[str, Any],
    *,
    lines: int,
    again: str,
) -> None:
    """Say which part a file will be, or see that it is the one that was begun.

    For files that are written whole. Of what is no part nothing is said.

    Args:
      out: the file.
      shard: which part it is; None for the whole.
      settings: that its lines depend on.
      lines: of the complete part.
      again: the command that goes on with it.
    Raises:
      UserError: there is another part, the whole, or a file of something else.
    Example:
      >>> begin(Path("out.jsonl"), None, {}, lines=8, again="jaxalign judge ...")
    """
    before = said_of(out)
    told = None if before is None else before.get(SHARD)
    if shard is None:
        if told is not None:
            raise UserError(
                f"--out {out} is part {told['part']} of something: give another --out, "
                "or its --shard"
            )
        return
    now = {**settings, SHARD: {"part": str(shard), "lines": lines}}
    now = json.loads(json.dumps(now))
    if before is None or told is None:
        if out.exists() or before is not None:
            raise UserError(
                f"--out {out} is there and was made without --shard: give another "
                f"--out, or remove {out.name}"
            )
    elif changed := differing(before, now):
        raise UserError(
            f"--out {out} was begun with other settings: {', '.join(changed)}. Give "
            f"another --out, or remove {settings_of(out).name}"
            f"{f' and {out.name}' if out.exists() else ''}"
        )
    with writing(f"--out {out}", "nothing was asked"):
        out.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({**now, AGAIN: again}, indent=2)
        write_text(settings_of(out), text)


def read_part(path: Path) -> ShardFile:
    """Return what a part's file is, complete or not.

    Raises:
      UserError: it is no part.
    Example::

      read_part(Path("a.jsonl")).shard
    """
    said = said_of(path)
    try:
        told = {} if said is None else said[SHARD]
        shard = parse(told["part"])
        again = str(said[AGAIN]) if said is not None else ""
        lines = int(told["lines"])
    except (KeyError, TypeError, ValueError):
        shard, lines, again = None, 0, ""
    if said is None or shard is None:
        raise UserError(
            f"{path} is no part of anything: expected the --out of a command with "
            f"--shard i/n, and {settings_of(path).name} beside it, as the command "
            "writes it"
        )
    settings = {k: v for k, v in said.items() if k not in (SHARD, AGAIN)}
    return ShardFile(path, shard, lines, settings, again)


def read_set(paths: Sequence[Path]) -> list[ShardFile]:
    """Return the parts of a whole in their order, given in any.

    Raises:
      UserError: one is no part, missing, twice there, made with other settings than
        the first, or not complete.
    Example::

      read_set([Path("a.jsonl"), Path("b.jsonl")])[0].shard
    """
    found = [read_part(path) for path in paths]
    check_parts([(one.shard, one.path) for one in found])
    for one in found:
        if changed := differing(found[0].settings, one.settings):
            raise UserError(
                f"{one.path} was made with other settings than {found[0].path}: "
                f"{', '.join(changed)}. Parts of one whole differ in nothing but "
                "--shard"
            )
    for one in found:
        count = _lines(one.path)
        if count != one.lines:
            raise UserError(
                f"{one.path}, part {one.shard}, has {count} of {one.lines} lines. "
                f"This goes on with it: `{one.again}`"
            )
    found.sort(key=lambda one: one.shard)
    total = sum(one.lines for one in found)
    for one in found:
        if one.lines != len(one.shard.rows(total)):
            raise UserError(
                f"{one.path}, part {one.shard}, has {one.lines} of {total} lines, and "
                f"should have {len(one.shard.rows(total))}: the parts were made of "
                "different data. Make them again"
            )
    return found


def join_lines(out: Path, parts: Sequence[ShardFile]) -> int:
    """Write the lines of all parts in the order of the whole; return how many.

    Args:
      out: the file; one that holds just these lines stays.
      parts: see :func:`read_set`.
    Raises:
      UserError: there is a file with other lines, or it cannot be written.
    Example::

      join_lines(Path("out.jsonl"), read_set([Path("a.jsonl"), Path("b.jsonl")]))
    """
    check_target(out)
    total = sum(one.lines for one in parts)
    with contextlib.ExitStack() as stack:
        try:
            files = [stack.enter_context(_open(one.path)) for one in parts]
        except OSError as error:
            raise UserError(f"the parts cannot be read: {error}") from None
        lines = (files[row % len(files)].readline() for row in range(total))
        if not out.exists():
            with whole(out, _KEPT) as file:
                file.writelines(lines)
            return total
        with _open(out) as there:
            same = all(a == b for a, b in itertools.zip_longest(lines, there))
    if not same:
        raise UserError(
            f"{out} is there and holds something else than these parts: give another "
            "OUT, or remove it"
        )
    return total


def _lines(path: Path) -> int:
    """Count a file's whole lines; 0 where it is not there yet."""
    if not path.exists():
        return 0
    try:
        with path.open("rb") as file:
            blocks = iter(lambda: file.read(1 << 20), b"")
            return sum(block.count(b"\n") for block in blocks)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def _open(path: Path) -> TextIO:
    # Of what ends a line in Unicode, only this one does in JSON Lines.
    return path.open(encoding="utf-8", newline="\n")
