"""``jaxalign segment IN OUT``: cut the responses of feedback records into segments.

IN is a .jsonl, .jsonl.gz or .parquet file of feedback records or
tfds:NAME_OR_DIRECTORY:SPLIT; OUT a .jsonl file, written whole or not at all: the same
records with chosen_segments and rejected_segments (or completion_segments), half-open
code-point offsets without scores, for ``jaxalign judge`` to add.
"""

from collections.abc import Sequence
from pathlib import Path

from jaxalign.cli import parsing
from jaxalign.errors import UserError


__all__ = ["run"]


def run(arguments: Sequence[str]) -> int:
    """Parse and segment; the last line says how many segments there are."""
    from jaxalign.feedback.segmenters.files import SegmentConfig, segment_file

    parser = parsing.make_parser("segment", SegmentConfig, description=__doc__ or "")
    parser.add_argument("files", nargs="*", metavar="IN OUT", help="see above")
    files, config = parsing.parse_with("files", parser, arguments, SegmentConfig)
    if len(files) != 2:
        raise UserError(
            "expected two files, jaxalign segment IN OUT: got "
            f"{', '.join(files) or 'none'}"
        )
    source, out = files
    report = segment_file(source, Path(out), config)
    print(f"segmented: {out}")
    print(f"{report.responses} responses, {report.segments} segments")
    return 0
