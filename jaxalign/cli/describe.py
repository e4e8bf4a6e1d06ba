"""``jaxalign describe``: what an adapter trains and what it costs, before any weights.

Reads config.json alone.
"""

import json
from collections.abc import Sequence

from jaxalign.cli import devices, parsing


__all__ = ["run"]


def run(arguments: Sequence[str]) -> int:
    """Parse and print a table, or with --json one object."""
    from jaxalign.training.describe import DescribeConfig, describe, table

    parts = {"adapter": parsing.chosen_adapter(arguments)}
    parser = parsing.make_parser(
        "describe", DescribeConfig, parts, description=__doc__ or ""
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    as_json, config = parsing.parse_with(
        "json", parser, arguments, DescribeConfig, parts
    )
    devices.set_up_jax()
    found = describe(config)
    print(json.dumps(found) if as_json else table(found))
    return 0
