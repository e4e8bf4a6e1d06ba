"""ChineseSimpleVQA's rows as they are published, and their pictures."""

import base64
import dataclasses
import functools
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxalign.data.picture import Picture
from jaxalign.errors import UserError
from jaxalign.evaluation import published
from jaxalign.evaluation.task import Items


__all__ = ["VQARow", "load"]

_SOURCE = "https://huggingface.co/datasets/OpenStellarTeam/Chinese-SimpleVQA"
_FILES = ("chinese_simplevqa.jsonl", "chinese_simple_vqa.jsonl")
_PARQUET = "chinese_simplevqa.parquet"
_FOLDERS = ("chinese_simplevqa",)
_TEXTS = (
    *("ID", "recognition_question", "recognition_answer"),
    *("final_question", "final_answer", "Topic"),
)
_TWINS = {"文学与神话与神话": "文学与神话"}
"""Subtopics that are another one, mistyped."""


@dataclasses.dataclass(frozen=True)
class VQARow:
    """A picture with its two questions.

    >>> VQARow(("Q", "A"), ("Q2", "B"), "T|S", "", None).topic
    'T'
    """

    recognition: tuple[str, str]
    """Question and answer."""
    final: tuple[str, str]
    subject: str
    """``topic|subtopic``."""
    caption: str
    picture: Picture | None
    address: str = ""
    """Of the picture; twelve are of two rows."""

    @property
    def topic(self) -> str:
        """The first part of the subject."""
        return self.subject.partition("|")[0]

    @property
    def references(self) -> tuple[str, str]:
        """Both answers, for the page."""
        return self.recognition[1], self.final[1]


def load(
    folder: Path,
    *,
    condition: str = "seen",
    seed: int = 0,
    image_dir: Path | None = None,
) -> Items:
    """Read the rows.

    Args:
      folder: the data directory.
      condition: whether pictures are needed, and whose.
      seed: of the pictures' shuffle.
      image_dir: where pictures are, in the place of ``images``.
    Raises:
      UserError: the file is missing, a row lacks a field, or a picture is not there.
    """
    rows = _read(folder)
    found: list[VQARow] = []
    defects = {"duplicate ids": len(rows) - len({row["ID"] for row in rows})}
    merged = empty = 0
    for number, row in enumerate(rows):
        topic, _, subtopic = row["Topic"].partition("|")
        merged += subtopic in _TWINS
        empty += not row.get("desc")
        found.append(
            VQARow(
                (row["recognition_question"], row["recognition_answer"]),
                (row["final_question"], row["final_answer"]),
                f"{topic}|{_TWINS.get(subtopic, subtopic)}",
                row.get("desc") or "",
                _picture(row, number, folder, image_dir, condition),
                row.get("image_url") or str(number),
            )
        )
    defects |= {"mistyped subtopics": merged, "empty captions": empty}
    if condition == "shuffled":
        found = _shuffled(found, seed)
    return Items(found, {name: count for name, count in defects.items() if count})


def _read(folder: Path) -> list[dict[str, Any]]:
    for name in _FILES:
        if (path := published.find(folder, name, _FOLDERS)) is not None:
            rows = published.read_jsonl(path)
            break
    else:
        path = published.find(folder, _PARQUET, _FOLDERS)
        if path is None:
            path = published.find_file(folder, _FILES[0], _FOLDERS, source=_SOURCE)
        rows = published.read_parquet(path)
    for number, row in enumerate(rows):
        lacking = [n for n in _TEXTS if not isinstance(row.get(n), str) or not row[n]]
        if lacking:
            raise UserError(
                f"{path}: row {number}: expected a text in {', '.join(lacking)}"
            )
    return rows


def _picture(
    row: Mapping[str, Any],
    number: int,
    folder: Path,
    image_dir: Path | None,
    condition: str,
) -> Picture | None:
    if condition == "blank":
        return Picture(_white(), f"row {number}, blank")
    if condition not in ("seen", "shuffled"):
        return None
    where = f"chinese_simplevqa row {number}"
    if row.get("image_base64"):
        return Picture(base64.b64decode(row["image_base64"]), where)
    name = row.get("matched_image") or f"{row['ID']}.jpg"
    if image_dir is not None:
        return Picture(image_dir / name, where)
    path = published.find(folder, f"images/{name}", _FOLDERS)
    if path is None:
        raise UserError(
            f"{where}: there is no picture images/{name} in {folder} (looked for in "
            f"{folder / _FOLDERS[0]} too). The pictures come from {_SOURCE}; without "
            "them give --conditions text_only"
        )
    return Picture(path, where)


@functools.cache
def _white() -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (336, 336), "white").save(file, "PNG")
    return file.getvalue()


def _shuffled(rows: Sequence[VQARow], seed: int) -> list[VQARow]:
    """Give every row the picture of another, of another address.

    A cyclic shift of a random order; where both rows show the same, one further.
    """
    order = np.random.default_rng([seed, len(rows)]).permutation(len(rows))
    made: dict[int, VQARow] = {}
    for place, index in enumerate(order):
        for step in range(1, len(rows)):
            other = rows[order[(place + step) % len(rows)]]
            if other.address != rows[index].address:
                made[int(index)] = dataclasses.replace(
                    rows[index], picture=other.picture
                )
                break
        else:
            raise UserError("shuffled: all rows show the same picture")
    return [made[index] for index in range(len(rows))]
