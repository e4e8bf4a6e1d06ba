"""Parts of a command's input that are worked on apart, by processes that share nothing.

Part i of n has rows i, i + n, i + 2 n, ... of the whole. No part has more than one row
more than another, and where a file is sorted, by length, source or topic, each has as
much of everything: what many machines do together takes as long as the slowest of them.
A row keeps its place in the whole, and what depends on that, such as its seed.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

from jaxalign.errors import UserError


__all__ = ["WHOLE", "Shard", "check_parts", "parse"]

_FORM = re.compile(r"(\d{1,9})/(\d{1,9})")


class Shard(NamedTuple):
    """Part ``part``, from 0, of ``parts``.

    >>> str(Shard(0, 3)), [*Shard(1, 3).rows(8)], len(Shard(8, 9).rows(8))
    ('0/3', [1, 4, 7], 0)
    """

    part: int
    parts: int

    def __str__(self) -> str:
        """Return it as people write it."""
        return f"{self.part}/{self.parts}"

    def rows(self, total: int) -> range:
        """Return which of so many rows are in it."""
        return range(self.part, total, self.parts)


WHOLE = Shard(0, 1)
"""All there is."""


def parse(text: str | None) -> Shard | None:
    """Read ``--shard i/n``.

    Raises:
      UserError: it is not of that form, or there is no such part.

    >>> parse("2/3"), parse(None)
    (Shard(part=2, parts=3), None)
    """
    if text is None:
        return None
    form = "expected i/n, part i (from 0) of n, such as 0/3"
    match = _FORM.fullmatch(text)
    if match is None:
        raise UserError(f"--shard {text!r} is no part of anything: {form}")
    index, count = map(int, match.groups())
    if count == 0:
        raise UserError(f"--shard {text}: there are no parts: {form}")
    if index >= count:
        raise UserError(
            f"--shard {text}: the {count} part(s) are 0/{count} to "
            f"{count - 1}/{count}: {form}"
        )
    return Shard(index, count)


def check_parts(parts: Sequence[tuple[Shard, object]]) -> None:
    """Refuse parts that do not make a whole.

    Args:
      parts: each with its name, for messages.
    Raises:
      UserError: they are parts of different wholes, or one is missing or there twice.
    Example:
      >>> check_parts([(Shard(1, 2), "b.jsonl"), (Shard(0, 2), "a.jsonl")])
    """
    first, name = parts[0]
    named: dict[Shard, object] = {}
    for shard, other in parts:
        if shard.parts != first.parts:
            raise UserError(
                f"{name} is part {first} and {other} part {shard}: expected the parts "
                "of one whole"
            )
        if shard in named:
            raise UserError(
                f"{named[shard]} and {other} are both part {shard}: give each part once"
            )
        named[shard] = other
    missing = [
        str(part)
        for part in (Shard(number, first.parts) for number in range(first.parts))
        if part not in named
    ]
    if missing:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise UserError(
            f"{len(missing)} of {first.parts} parts are missing: "
            f"{', '.join(missing[:5])}{more}. Give all of them; which is not made yet "
            "is made by the same command with that --shard"
        )
