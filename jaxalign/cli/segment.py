"""``jaxalign segment IN OUT``: cut the responses of feedback records into segments.

IN is a .jsonl, .jsonl.gz or .parquet file of feedback records or
tfds:NAME_OR_DIRECTORY:SPLIT; OUT a .jsonl file, written whole or not at all: the same
records with chosen_segments and rejected_segments (or completion_segments), half-open
code-point offsets without scores, for ``jaxalign judge`` to add.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from jaxalign.cli import parsing
from jaxalign.feedback.segmenters.segment_file import SegmentConfig, segment_file


__all__ = ["run"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Command(SegmentConfig):
    """The options and the second of the two files."""

    out: str


def run(arguments: Sequence[str]) -> int:
    """Parse and segment; the last line says how many segments there are."""
    parser = parsing.make_parser("segment", SegmentConfig, description=__doc__ or "")
    parser.add_argument("source", metavar="IN", help="feedback records to read")
    parser.add_argument("out", metavar="OUT", help=".jsonl file to write")
    source, config = parsing.parse_with("source", parser, arguments, _Command)
    report = segment_file(source, Path(config.out), config)
    print(f"segmented: {config.out}")
    print(f"{report.responses} responses, {report.segments} segments")
    return 0
