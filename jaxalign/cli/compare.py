"""``jaxalign compare OUT_A OUT_B [OUT_C ...]``: paired differences of evaluations.

Each is the ``--out`` of a ``jaxalign eval``, or the directory of one task in it. The
first is the baseline. ``--out PAGE.html`` writes a page, and the same as JSON beside.
"""

from collections.abc import Sequence

from jaxalign.cli import parsing


__all__ = ["run"]


def run(arguments: Sequence[str]) -> int:
    """Parse, compare, print a table, and write the page if one is asked for."""
    from jaxalign.evaluation.compare import CompareConfig, compare, lines_of

    parser = parsing.make_parser("compare", CompareConfig, description=__doc__ or "")
    parser.add_argument(
        "runs", nargs="+", metavar="OUT", help="directories, the baseline first"
    )
    runs, config = parsing.parse_with("runs", parser, arguments, CompareConfig)
    found = compare(runs, config)
    print(*lines_of(found), sep="\n")
    if config.out is not None:
        from jaxalign.reports import comparison

        print(f"page: {comparison.write(config.out, found)}")
    return 0
