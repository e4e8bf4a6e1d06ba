"""FigStep-Benign: harmless instructions in FigStep's pictures, over-refusal beside it.

50 of SafeBench's instructions made harmless, with the same request and in the same
pictures. Source: DREAM, https://arxiv.org/abs/2504.18053,
https://github.com/Kizna1ver/DREAM. Who refuses these refuses the form. The repository
has no script of the rate; here a judge says whether an answer complies or refuses in
part or in full, and XSTest's string rule beside it. With 50 items a share has an
interval of up to 28 points.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxalign.evaluation import published, shares
from jaxalign.evaluation.delimited import read_csv
from jaxalign.evaluation.safety_grading import (
    OVER_REFUSAL,
    configured,
    find_picture,
    refusal_grading,
    strings_grading,
)
from jaxalign.evaluation.task import Answer, Graded, Grading, Items, Task
from jaxalign.evaluation.tasks import figstep
from jaxalign.evaluation.tasks.figstep import Instruction


__all__ = ["TASK"]

_SOURCE = "https://github.com/Kizna1ver/DREAM, data/FigStep-Benign"
_FOLDERS = ("figstep_benign", "dream/FigStep-Benign")
_FILE = "SafeBench-Tiny-Benign.csv"
_COLUMNS = ("category_id", "task_id", "category_name", "benign_instruction")


def load(folder: Path, *, image_dir: Path | None = None) -> Items:
    """Read the instructions; picture i is row i's.

    Raises:
      UserError: the file is missing or lacks a column.
    """
    places = [f"{name}{part}" for name in _FOLDERS for part in ("", "/question")]
    path = published.find_file(folder, _FILE, places, source=_SOURCE)
    pictures = [f"{name}/images" for name in _FOLDERS]
    return figstep.of_rows(
        [
            (
                row,
                row["benign_instruction"],
                find_picture(
                    folder,
                    [f"{number}.png"],
                    pictures,
                    where=f"figstep_benign row {number}",
                    image_dir=image_dir,
                ),
            )
            for number, row in enumerate(read_csv(path, _COLUMNS))
        ]
    )


def grade(
    row: Instruction,
    answers: Mapping[tuple[str, int], Answer],
    *,
    own: Path | None = None,
    judge_own: Path | None = None,
) -> list[Grading]:
    """Return what is said of each answer: by the judge and by the string rule."""
    made = []
    for place, answer in answers.items():
        shown = figstep.asked(row, own)
        made.append(refusal_grading("refusal", place, shown, answer, own=judge_own))
        made.append(strings_grading("strings", place, answer))
    return made


def metrics(graded: Sequence[Graded]) -> dict[str, Any]:
    """Return over-refusal, by judge and by strings, over all and by topic."""
    judged = shares.grades_of(graded, "refusal")
    strings = shares.grades_of(graded, "strings")
    found = shares.with_topics(judged, OVER_REFUSAL)
    found["by_strings"] = shares.shares([g for _, g in strings], OVER_REFUSAL)
    return {**found, **shares.silent_answers(graded)}


TASK = Task(
    name="figstep_benign",
    load=load,
    requests=figstep.requests,
    grade=grade,
    metrics=metrics,
    variants=configured,
    beside=("xstest@agreement",),
    facts={
        "source": _SOURCE,
        "about": "Over-refusal is full and partial refusal together. 50 items: a share "
        "of one half has an interval of 14 points to each side.",
    },
)
