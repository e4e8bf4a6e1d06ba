"""Files of AlpacaEval: answers to compare with, difficulties, annotations."""

import csv
import hashlib
import io
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxalign.errors import UserError
from jaxalign.evaluation import published, run_files
from jaxalign.evaluation.boards import length_control
from jaxalign.evaluation.boards.length_control import Gamed
from jaxalign.evaluation.task import Answer, Grade, Graded, Items


__all__ = ["ORDERS", "TEMPLATE", "Instruction", "load", "read_grades", "shown_first"]

_FOLDERS = ("alpaca_eval",)
_SOURCE = "the data set tatsu-lab/alpaca_eval on Hugging Face"
_OUTPUTS = (
    "alpaca_eval_gpt4_baseline.json",
    "annotations.json",
    "model_outputs.json",
    "alpaca_eval.json",
)
TEMPLATE = "alpaca_eval_clf.txt"
"""The authors' judge template."""

ORDERS = ("model_first", "baseline_first")
"""Which answer the judge is shown first; names of gradings."""

_INSTRUCTIONS = "c5770d532bf3f697768ed9a57a05d8b58b2617321ca65070620f059676e7c99a"
_BASELINE = "bad88f78813905feaf410970e7b78bb3a641bd256c48bb12e01174c2eb464d25"
"""Digests of the board's 805 instructions, and of its baseline's answers."""

_ANNOTATOR = "weighted_alpaca_eval_gpt4_turbo"
"""Whose annotations drew the order as :func:`shown_first` does."""


class Instruction(NamedTuple):
    """An item: an instruction, and the answer to compare with."""

    instruction: str
    baseline: str
    generator: str = ""
    """Whose answer the baseline is."""
    difficulty: float | None = None
    gamed: Gamed | None = None
    """For the length-controlled fit, the same of all items."""
    official: bool = False
    """Whether the items are the board's 805, with its baseline."""
    template: str | None = None
    """The authors' judge template; None for ours."""


def shown_first(instruction: str) -> bool:
    """Return whether the original shows the model's answer first.

    AlpacaEval draws one order an instruction, by a generator that the instruction
    seeds.

    >>> shown_first("What is 2 + 2?")
    False
    """
    generator = random.Random(f"is_switched_outputs{instruction}0")
    return generator.choices([False, True])[0]


def load(folder: Path, *, official: bool = False) -> Items:
    """Return the instructions with the baseline's answers.

    Args:
      folder: the data directory.
      official: with the authors' judge template, ``alpaca_eval_clf.txt``.
    Raises:
      UserError: a file is missing, or is not as published.
    Example::

      load(Path("data")).rows[0].instruction
    """
    path = _outputs_file(folder)
    rows = [_row(path, row) for row in _list(path)]
    template = None
    if official:
        source = "tatsu-lab/alpaca_eval, evaluators_configs/alpaca_eval_clf_gpt4_turbo"
        found = published.find_file(folder, TEMPLATE, _FOLDERS, source=source)
        template = published.read_text(found)
    ours = _digest([row.instruction for row in rows]) == _INSTRUCTIONS
    same = ours and _digest([row.baseline for row in rows]) == _BASELINE
    difficulty, gamed = _features(folder) if ours else (None, None)
    return Items(
        [
            row._replace(
                difficulty=None if difficulty is None else float(difficulty[number]),
                gamed=gamed,
                official=same,
                template=template,
            )
            for number, row in enumerate(rows)
        ]
    )


def _outputs_file(folder: Path) -> Path:
    for name in _OUTPUTS:
        if (path := published.find(folder, name, _FOLDERS)) is not None:
            return path
    for place in (folder / "alpaca_eval", folder):
        if found := sorted(place.glob("*annotations.json*")):
            return found[0]
    return published.find_file(folder, _OUTPUTS[0], _FOLDERS, source=_SOURCE)


def _list(path: Path) -> list[Any]:
    rows = published.read_json(path)
    if not isinstance(rows, list):
        raise UserError(f"{path} must be a list of objects: got {type(rows).__name__}")
    return rows


def _row(path: Path, row: Any) -> Instruction:
    match row:
        case {"instruction": str(instruction), "output_1": str(output)}:
            return Instruction(instruction, output, str(row.get("generator_1", "")))
        case {"instruction": str(instruction), "output": str(output)}:
            return Instruction(instruction, output, str(row.get("generator", "")))
    raise UserError(
        f"{path}: every object must have instruction, and output_1 or output, as "
        "AlpacaEval writes annotations and model outputs"
    )


def _digest(texts: Sequence[str]) -> str:
    """Return the SHA-256 of texts in their order."""
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()


def _features(folder: Path) -> tuple[np.ndarray | None, Gamed | None]:
    """Return difficulties and gamed rows, as far as the files tell them."""
    if (path := published.find(folder, "lc_features.csv", _FOLDERS)) is not None:
        table = _columns(path)
        difficulty = table["instruction_difficulty"]
        lengths = (table[f"len_{name}"] for name in ("baseline", "concise", "verbose"))
        return difficulty, length_control.gamed(difficulty, *lengths)
    name = "instruction_difficulty.csv"
    if (path := published.find(folder, name, _FOLDERS)) is not None:
        difficulty = _columns(path)["instruction_difficulty"]
        return difficulty, length_control.likely_gamed(difficulty)
    return None, None


def _columns(path: Path) -> dict[str, np.ndarray]:
    rows = list(csv.DictReader(io.StringIO(published.read_text(path))))
    try:
        found = {
            name: np.array([float(row[name]) for row in rows])
            for name in (rows[0] if rows else {})
            if name
        }
    except (TypeError, ValueError):
        found = {}
    if len(rows) != 805 or "instruction_difficulty" not in found:
        raise UserError(
            f"{path} must have 805 rows of numbers with a column "
            f"instruction_difficulty: got {len(rows)} rows with {sorted(found)}. It "
            f"comes from {_SOURCE}"
        )
    return found


def read_grades(path: Path, items: Items) -> list[Graded]:
    """Return grades from AlpacaEval's ``annotations.json``, or from a ``grades.jsonl``.

    Raises:
      UserError: instructions that are not the items', one twice, or several models.
    Example::

      read_grades(Path("annotations.json.gz"), load(Path("data")))
    """
    if path.name.removesuffix(".gz").endswith(".jsonl"):
        return run_files.read_grades(path, items)
    places = {item.instruction: index for index, item in enumerate(items.rows)}
    found: dict[int, Graded] = {}
    models, strange = set(), 0
    for row in _list(path):
        match row:
            case {
                "instruction": str(instruction),
                "output_1": str(baseline),
                "output_2": str(answer),
                "preference": _,
            }:
                index = places.get(instruction)
            case _:
                raise UserError(
                    f"{path}: an annotation must have instruction, output_1, output_2 "
                    "and preference"
                )
        models.add(row.get("generator_2"))
        if index is None:
            strange += 1
        elif index in found:
            raise UserError(f"{path} has the instruction of item {index} twice")
        else:
            found[index] = _annotated(index, items.rows[index], baseline, answer, row)
    if strange:
        raise UserError(
            f"{path}: {strange} of {strange + len(found)} instructions are not among "
            f"the {len(items.rows)} of --data_dir. They must be equal character by "
            "character"
        )
    if len(models) > 1:
        raise UserError(
            f"{path} has answers of several models, keep those of one: "
            f"{', '.join(sorted(map(str, models)))}"
        )
    return [found[index] for index in sorted(found)]


def _annotated(
    index: int, item: Instruction, baseline: str, answer: str, row: Mapping[str, Any]
) -> Graded:
    if baseline != item.baseline:
        item = item._replace(baseline=baseline, official=False)
    name = "preference"
    if row.get("annotator") == _ANNOTATOR:
        name = ORDERS[0 if shown_first(item.instruction) else 1]
    given = row["preference"]
    known = isinstance(given, int | float) and not isinstance(given, bool)
    grade = Grade(None, "unparsed")
    if known and (given == 0 or 1 <= given <= 2):
        grade = Grade(0.5 if given == 0 else float(given) - 1)  # 0: a draw, of old
    answers = {("answer", 0): Answer(answer)}
    return Graded(index, item, answers, {(name, 0): grade})
