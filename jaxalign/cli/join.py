"""``jaxalign join OUT PART [PART ...]``: one file or evaluation of what --shard made.

Each PART is the ``--out`` of ``generate``, ``judge``, ``disentangle`` or ``eval`` with
``--shard i/n``, all n of them in any order; the stores beside them are joined too. What
comes out is what the command makes without ``--shard``.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jaxalign.cli import parsing
from jaxalign.errors import UserError


if TYPE_CHECKING:
    from jaxalign.judging.store_joining import JoinedStores

__all__ = ["run"]

_USAGE = "expected `jaxalign join OUT PART [PART ...]`"


def run(arguments: Sequence[str]) -> int:
    """Parse and join; files and directories are told apart by what is there."""
    from jaxalign.evaluation.joining import join_evaluations, join_files

    parser = argparse.ArgumentParser(
        prog="jaxalign join", description=__doc__, exit_on_error=False
    )
    parser.add_argument("out", metavar="OUT", help="file or directory to write")
    parser.add_argument(
        "parts", metavar="PART", nargs="+", help="made with --shard i/n"
    )
    options, strange = parsing.parse_words(parser, arguments, _USAGE)
    if strange:
        raise UserError(f"unknown option {strange[0]}: {_USAGE}")
    if any(Path(part).is_dir() for part in options.parts):
        from jaxalign.cli import eval as evaluating

        found = join_evaluations(options.out, options.parts)
        evaluating.say(found.config, found.reports)
        print(f"joined: {options.out} ({found.parts} parts{_told(found.store)})")
        return 0
    made = join_files(options.out, options.parts)
    told = "" if made.store is None else _told(made.store)
    print(f"joined: {options.out} ({made.lines} lines of {made.parts} parts{told})")
    return 0


def _told(store: "JoinedStores") -> str:
    """Say what the joined store holds."""
    other = ""
    if store.differing:
        other = (
            f", {store.differing} of which two parts were told something else on: the "
            "first part's is kept there, and each line is as its own part made it"
        )
    return f", a store of {store.verdicts} answers and verdicts{other}"
