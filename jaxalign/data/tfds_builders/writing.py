"""Building data sets from files of a layout, with counts of what was dropped."""

import contextlib
import gzip
import hashlib
import io
import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxalign.data.layouts.table import check_name
from jaxalign.data.tfds_builders.sources import Counts, records_of
from jaxalign.errors import UserError


__all__ = ["Built", "build", "write_jsonl"]


class Built(NamedTuple):
    """A data set on disk."""

    directory: Path
    counts: dict[str, Counts]
    """By split."""

    def source(self, split: str) -> str:
        """Return what ``--data`` takes to read a split."""
        return f"tfds:{self.directory}:{split}"


def build(layout: str, files: Mapping[str, str | Path], out: str | Path) -> Built:
    """Build a tensorflow-datasets set (array_record) of feedback records.

    All rows are read and checked before anything is written, and the set appears
    whole or not at all.

    Args:
      layout: a key of ``LAYOUTS``.
      files: the source of each split, such as ``{"train": "train.jsonl.gz"}``.
      out: directory to put it in; the set lies in a folder of it by name and version.
    Raises:
      UserError: see :func:`~jaxalign.data.tfds_builders.sources.convert`; or a split
        gives no record, or the set is there already.
    """
    check_name(layout)
    if not files:
        raise UserError('no file to build from: give files={"train": path}')
    from jaxalign.data.tfds_builders.builders import BUILDERS

    builder = BUILDERS[layout]
    folder = Path(out) / builder.name / str(builder.VERSION)
    _refuse_present(folder)
    names = {split: str(source) for split, source in files.items()}
    try:
        made = builder(data_dir=str(out), files=names)
        # It says that it downloads, which it does not, and makes a folder for it.
        with (
            contextlib.redirect_stdout(io.StringIO()),
            tempfile.TemporaryDirectory() as downloads,
        ):
            made.download_and_prepare(download_dir=downloads)
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error}") from None
    return Built(folder, made.counts)


def write_jsonl(layout: str, source: str | Path, out: str | Path) -> Counts:
    """Write the feedback records of a source as JSON Lines.

    Encoded images, which JSON cannot hold, become files of a folder beside it,
    ``NAME_images``, one for equal images; ``images`` has their paths from there.

    Args:
      layout: a key of ``LAYOUTS``.
      source: a file of that layout.
      out: a ``.jsonl`` or ``.jsonl.gz`` file that is not there yet.
    Raises:
      UserError: see :func:`build`.
    """
    check_name(layout)
    out = Path(out)
    pictures = out.with_name(f"{out.name.split('.jsonl')[0]}_images")
    for path in (out, pictures):
        _refuse_present(path)
    counts = Counts()
    drafts = pictures.with_name(f"{pictures.name}.tmp")
    temporary = out.with_name(f"{out.name}.tmp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        opened: Any = gzip.open if out.suffix == ".gz" else open
        with opened(temporary, "wt", encoding="utf-8") as file:
            for record in records_of(layout, source, counts):
                if images := record.get("images"):
                    record["images"] = [
                        _as_file(image, drafts, pictures.name)
                        if isinstance(image, bytes)
                        else image
                        for image in images
                    ]
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
        if drafts.exists():
            drafts.rename(pictures)
        temporary.replace(out)
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error}") from None
    finally:
        temporary.unlink(missing_ok=True)
        shutil.rmtree(drafts, ignore_errors=True)
    return counts


def _as_file(image: bytes, folder: Path, name: str) -> str:
    """Write an encoded image, named by what it holds; return its path by ``name``."""
    from PIL import Image

    with Image.open(io.BytesIO(image)) as opened:
        kind = str(opened.format).lower()
    file = f"{hashlib.sha256(image).hexdigest()[:24]}.{kind}"
    folder.mkdir(exist_ok=True)
    if not (folder / file).exists():
        (folder / file).write_bytes(image)
    return f"{name}/{file}"


def _refuse_present(out: Path) -> None:
    if out.exists():
        raise UserError(f"{out} is there already. Remove it, or give another --out")
