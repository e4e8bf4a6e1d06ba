"""``python -m jaxalign.data.tfds_builders``: build a data set from a file."""

import argparse
import sys
from collections.abc import Sequence

from jaxalign.data import tfds_builders
from jaxalign.errors import UserError


__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Build what the arguments name; return 0, or 2 for a user error."""
    parser = argparse.ArgumentParser(
        prog="python -m jaxalign.data.tfds_builders",
        description="Make feedback records of a file of another layout.",
    )
    parser.add_argument(
        "--layout", required=True, help=", ".join(tfds_builders.LAYOUTS)
    )
    parser.add_argument("--data", required=True, help="file of the split train")
    parser.add_argument("--eval_data", help="file of the split validation")
    parser.add_argument(
        "--out",
        required=True,
        help="directory of a tensorflow-datasets set, or a .jsonl(.gz) file",
    )
    given = parser.parse_args(argv)
    files = {"train": given.data}
    if given.eval_data:
        files["validation"] = given.eval_data
    try:
        if given.out.endswith((".jsonl", ".jsonl.gz")):
            if given.eval_data:
                raise UserError(
                    f"--out {given.out} holds one split: leave --eval_data out, or "
                    "give a directory"
                )
            counts = tfds_builders.write_jsonl(given.layout, given.data, given.out)
            print(f"--data {given.out}  {counts}")
            return 0
        built = tfds_builders.build(given.layout, files, given.out)
    except UserError as error:
        print(f"jaxalign: error: {error}", file=sys.stderr)
        return 2
    for split, counts in built.counts.items():
        print(f"--data {built.source(split)}  {counts}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
