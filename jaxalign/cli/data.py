"""``jaxalign data check FILE --model M``: what training would make of a file.

FILE is what ``--data`` of ``jaxalign train`` takes. Shows how many records there are
and of which layout, their lengths in tokens, what would be dropped or cut and why, and
the first records with their learnt tokens and segments marked. Nothing is written.
"""

from collections.abc import Sequence

from jaxalign.cli import parsing
from jaxalign.errors import UserError


__all__ = ["run"]


def run(arguments: Sequence[str]) -> int:
    """Parse and print what the file becomes."""
    if not arguments or arguments[0] != "check":
        if arguments and arguments[0] not in ("-h", "--help"):
            raise UserError(_USAGE)
        arguments = ["check", "--help"]
    from jaxalign.training.data_check import DataCheckConfig, check_data

    arguments = arguments[1:]
    parts = {"objective": parsing.chosen_objective(arguments)}
    parser = parsing.make_parser(
        "data check", DataCheckConfig, parts, description=__doc__ or ""
    )
    parser.add_argument("source", metavar="FILE", help="feedback records to read")
    source, config = parsing.parse_with(
        "source", parser, arguments, DataCheckConfig, parts
    )
    for line in check_data(source, config):
        print(line)
    return 0


_USAGE = "expected `jaxalign data check FILE --model M`"
