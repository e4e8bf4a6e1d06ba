"""``jaxalign store``: look into a store of judgements, and take them out."""

import argparse
from collections.abc import Sequence

from jaxalign.cli import parsing
from jaxalign.errors import UserError


__all__ = ["run"]


def run(arguments: Sequence[str]) -> int:
    """Parse and show or export."""
    from jaxalign.judging import store_report
    from jaxalign.judging.store import Store

    parser = argparse.ArgumentParser(
        prog="jaxalign store", description=__doc__, exit_on_error=False
    )
    commands = parser.add_subparsers(dest="command", metavar="show | export")
    show = commands.add_parser("show", help="count what a store holds")
    show.add_argument("store", help="the --store of jaxalign judge")
    export = commands.add_parser("export", help="write every judgement as JSON Lines")
    export.add_argument("store", help="the --store of jaxalign judge")
    export.add_argument("out", help="file to write")
    options, strange = parsing.parse_words(parser, arguments, _USAGE)
    if strange or options.command is None:
        raise UserError(_USAGE)
    with Store(options.store, create=False) as store:
        if options.command == "show":
            store_report.show(store)
            return 0
        count = store_report.export(store, options.out)
    print(f"exported: {count} judgements to {options.out}")
    return 0


_USAGE = (
    "expected `jaxalign store show STORE.db` or "
    "`jaxalign store export STORE.db OUT.jsonl`"
)
