"""Multiple choice from a table: MMStar and its like, what a model can do beside safety.

A TSV as VLMEvalKit has them (``question``, ``A`` to ``Z``, ``answer``, ``image`` in
base64 or the ``index`` of the row that has it, ``category``) or a Parquet file as
MMStar's (https://arxiv.org/abs/2403.20330): ``question`` with the options in its text,
``image`` as bytes, ``answer``. No judge: the letter is read by rule, and an answer
without one is ``unparsed`` or ``refused``, wrong in the headline and counted.
VLMEvalKit guesses such answers at random, unseeded.
"""

import base64
import binascii
import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxalign.data.picture import Picture
from jaxalign.errors import UserError
from jaxalign.evaluation import published
from jaxalign.evaluation.choices import choice_figures, choice_question, grade_choices
from jaxalign.evaluation.delimited import read_tsv
from jaxalign.evaluation.letters import LETTERS
from jaxalign.evaluation.safety_grading import configured
from jaxalign.evaluation.task import Graded, Items, Question, Task


__all__ = ["TASK", "Row", "read_rows"]

_FOLDERS = ("multiple_choice", "mmstar", "MMStar")
_REFERENCE = 64
"""Characters up to which an ``image`` is the index of another row, as in VLMEvalKit."""
_BEFORE = re.compile(r"\b(?:options|choices)\s*:", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Row:
    """A question with its options.

    >>> Row("0", "?", {"A": "a dog", "B": "a cat"}, "B", "", None, False).answer
    'B'
    """

    id: str
    question: str
    options: Mapping[str, str]
    answer: str
    topic: str
    picture: Picture | None
    listed: bool
    """Whether the question's own text lists the options."""


def load(folder: Path, *, image_dir: Path | None = None) -> Items:
    """Read the one table that is there.

    Raises:
      UserError: there is none, there are several, or a row is not as expected.
    """
    for name in (*_FOLDERS, "."):
        place = folder / name
        paths = [
            path
            for ending in ("*.tsv", "*.tsv.gz", "*.parquet")
            for path in (sorted(place.glob(ending)) if place.is_dir() else ())
        ]
        if len(paths) > 1:
            raise UserError(
                f"{place} has several tables: {', '.join(p.name for p in paths)}. "
                "Leave one there"
            )
        if paths:
            return read_rows(paths[0], image_dir)
    places = ", ".join(str(folder / name) for name in (*_FOLDERS, "."))
    raise UserError(
        f"--data_dir {folder} has no table of multiple choice: looked for a .tsv or "
        f".parquet file in {places}. MMStar's comes from "
        "https://huggingface.co/datasets/Lin-Chen/MMStar"
    )


def read_rows(path: Path, image_dir: Path | None = None) -> Items:
    """Read a table.

    Args:
      path: of the file.
      image_dir: where the files of an ``image_path`` column are; default beside it.
    Raises:
      UserError: a row has no options, or its answer is none of them.
    Example::

      len(read_rows(Path("MMStar.tsv")).rows)  # 1500
    """
    if path.suffix == ".parquet":
        rows = published.read_parquet(path)
    else:
        rows = read_tsv(path, ("question", "answer"))
    pictures = {
        str(row.get("index", n)): row.get("image") for n, row in enumerate(rows)
    }
    found = []
    for number, row in enumerate(rows):
        where = f"{path}: row {number}"
        text, right = (row.get(name) for name in ("question", "answer"))
        if not isinstance(text, str) or not isinstance(right, str):
            raise UserError(f"{where} lacks question or answer")
        named = {c: str(row[c]) for c in LETTERS if row.get(c) not in (None, "")}
        options = named or _listed(text)
        right = right.strip().upper().strip("().")
        if right not in options:
            raise UserError(
                f"{where}: the answer {right!r} is none of the options "
                f"{', '.join(options) or 'none'}: expected columns A, B, ... or "
                "options such as 'A: a dog, B: a cat' in the question"
            )
        found.append(
            Row(
                str(row.get("index", number)),
                text,
                options,
                right,
                str(row.get("category") or ""),
                _picture(row, pictures, where, path, image_dir),
                not named,
            )
        )
    absent = sum(row.picture is None for row in found)
    return Items(found, {"questions without a picture": absent} if absent else {})


def _listed(text: str) -> dict[str, str]:
    """Return the options that a question's text lists: ``A: a dog, B: a cat``.

    Letters count only in their order, from A on, and behind ``Options:`` where that is.
    """
    starts = [found.end() for found in _BEFORE.finditer(text)]
    rest = text[starts[-1] :] if starts else text
    marks = []
    place = 0
    for letter in LETTERS:
        mark = re.compile(rf"(?:^|[\s,;(]){letter}\s*[:.)]\s").search(rest, place)
        if mark is None:
            break
        marks.append((letter, mark.start(), mark.end()))
        place = mark.end() - 1
    ends = [*(start for _, start, _ in marks[1:]), len(rest)]
    return {
        letter: rest[begin:end].strip().rstrip(",;")
        for (letter, _, begin), end in zip(marks, ends, strict=False)
    }


def _picture(
    row: Mapping[str, Any],
    pictures: Mapping[str, Any],
    where: str,
    path: Path,
    image_dir: Path | None,
) -> Picture | None:
    given = row.get("image")
    if isinstance(given, Mapping):
        given = given.get("bytes")
    if isinstance(given, str) and 0 < len(given) <= _REFERENCE:
        given = pictures.get(given, given)
    if isinstance(given, bytes) and given:
        return Picture(given, where)
    if isinstance(given, str) and given:
        try:
            return Picture(base64.b64decode(given, validate=True), where)
        except binascii.Error as error:
            raise UserError(f"{where}: image is no base64: {error}") from None
    if row.get("image_path"):
        return Picture((image_dir or path.parent) / str(row["image_path"]), where)
    return None


def requests(row: Row, *, own: Path | None = None) -> list[Question]:
    """Return the question with its options and the picture."""
    options = {} if row.listed else row.options
    return [choice_question(row.question, options, row.picture, own)]


def metrics(graded: Sequence[Graded]) -> dict[str, Any]:
    """Return the share of right options, over all and by category."""
    groups = [one.item.topic for one in graded]
    truths = [one.item.answer for one in graded]
    return choice_figures(graded, truths, groups if any(groups) else ())


TASK = Task(
    name="multiple_choice",
    load=load,
    requests=requests,
    grade=grade_choices,
    metrics=metrics,
    sampling={"temperature": 0.0, "max_new_tokens": 64},
    variants=configured,
    facts={
        "about": "Answers that name no option are wrong, and counted apart; other "
        "harnesses ask a judge for the letter, or draw one at random."
    },
)
