"""``jaxalign fetch``: get a small real model without a hub."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from jaxalign.cli import parsing


__all__ = ["FetchConfig", "run"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FetchConfig:
    """What to get and where to put it.

    Attributes:
      out: directory to write.
    """

    out: str


def run(arguments: Sequence[str]) -> int:
    """Parse and fetch."""
    from jaxalign.checkpoints import fetch

    parser = parsing.make_parser("fetch", FetchConfig, description=__doc__ or "")
    parser.add_argument("name", help=f"one of {', '.join(fetch.ASSETS)}")
    name, config = parsing.parse_with("name", parser, arguments, FetchConfig)
    print(f"fetched: {fetch.fetch(name, Path(config.out))}")
    return 0
