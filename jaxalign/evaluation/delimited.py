"""Tables of text: CSV and TSV as benchmarks publish them."""

import csv
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxalign.errors import UserError
from jaxalign.evaluation.published import read_text


__all__ = ["read_csv", "read_tsv"]


def read_csv(path: Path, columns: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Return the rows of a CSV file with a header, by column.

    Args:
      path: of the file, plain or gzip.
      columns: that it must have.
    Raises:
      UserError: it cannot be read, lacks a column, or a row is shorter or longer than
        the header.
    Example::

      read_csv(Path("xstest_prompts.csv"), ("id", "type", "prompt"))[0]["id"]
    """
    return _read(path, columns, csv.excel)


def read_tsv(path: Path, columns: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Return the rows of a file with tabs between columns, see :func:`read_csv`.

    Example::

      read_tsv(Path("MMStar.tsv"), ("question", "answer"))[0]["answer"]
    """
    return _read(path, columns, csv.excel_tab)


def _read(
    path: Path, columns: Sequence[str], dialect: type[csv.Dialect]
) -> list[dict[str, Any]]:
    csv.field_size_limit(min(sys.maxsize, 1 << 31))  # pictures in base64
    lines = csv.DictReader(io.StringIO(read_text(path), newline=""), dialect=dialect)
    lacking = [name for name in columns if name not in (lines.fieldnames or ())]
    if lacking:
        raise UserError(
            f"{path} lacks the column {', '.join(lacking)}: it has "
            f"{', '.join(lines.fieldnames or ['none'])}"
        )
    found = []
    try:
        for number, row in enumerate(lines, 1):
            if None in row or None in row.values():
                raise UserError(
                    f"{path}: row {number} has not as many fields as the header: "
                    f"expected {len(lines.fieldnames or ())}"
                )
            found.append(row)
    except csv.Error as error:
        raise UserError(f"{path} is no table of text: {error}") from None
    return found
