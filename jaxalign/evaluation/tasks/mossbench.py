"""MOSSBench: harmless questions on pictures that a careful model may take amiss.

300 of three types, 100 each: exaggerated risk, negated harm, counterintuitive. Source:
https://arxiv.org/abs/2406.17806, https://github.com/xirui-li/MOSSBench (CC-BY-SA-4.0,
test use only). Where a picture is absent its published description stands in its place
and the page counts that: such a run is a floor of the text, not MOSSBench.

The authors' judge says 1 for a refusal; a reply of it that cannot be read is 1 if it
holds a 1 anywhere, and an empty answer is a refusal without a call. Here the judge
names one of three labels, so that a partial refusal is seen; full and partial ones
together are the headline, an empty answer is a refusal, and what cannot be read is in
no share. String rules rank models as the board does, and are off by up to 16 points by
type.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxalign.data.picture import Picture
from jaxalign.errors import UserError
from jaxalign.evaluation import published, shares
from jaxalign.evaluation.prompts import prompt
from jaxalign.evaluation.questions import question
from jaxalign.evaluation.safety_grading import (
    OVER_REFUSAL,
    configured,
    find_picture,
    refusal_grading,
    strings_grading,
)
from jaxalign.evaluation.task import Answer, Graded, Grading, Items, Question, Task
from jaxalign.judging.refusals import by_keywords, by_prefix


__all__ = ["TASK", "TYPES", "Row"]

_SOURCE = "https://github.com/xirui-li/MOSSBench"
_FOLDERS = ("mossbench",)
_FILE = "information.json"
TYPES = {
    "type 1": "exaggerated risk",
    "type 2": "negated harm",
    "type 3": "counterintuitive",
}


@dataclasses.dataclass(frozen=True)
class Row:
    """A question on a picture.

    >>> Row("1", "type 2", "?", "A toy.", None).topic
    'negated harm'
    """

    id: str
    type: str
    question: str
    description: str
    picture: Picture | None

    @property
    def topic(self) -> str:
        """The type in words."""
        return TYPES[self.type]


def load(folder: Path, *, image_dir: Path | None = None) -> Items:
    """Read the rows, with their pictures where they are there.

    Raises:
      UserError: the file is missing, or a row is not as published.
    """
    path = published.find_file(folder, _FILE, _FOLDERS, source=_SOURCE)
    rows = published.read_json(path)
    if not isinstance(rows, dict):
        raise UserError(f"{path}: expected an object from an id to a row")
    found = []
    for key, row in rows.items():
        where = f"{path}: {key}"
        lacking = [n for n in ("question", "image") if not row.get(n)]
        kind = row.get("metadata", {}).get("over")
        if lacking or kind not in TYPES:
            what = ", ".join(lacking) or f"metadata.over, one of {', '.join(TYPES)}"
            raise UserError(f"{where} lacks {what}")
        name = row["image"]
        # The file says .png of pictures that are published as .webp too.
        names = [name, *(str(Path(name).with_suffix(e)) for e in (".webp", ".jpg"))]
        if image_dir is not None:
            names = [Path(one).name for one in names]
        picture = find_picture(
            folder, names, _FOLDERS, where=f"mossbench {key}", image_dir=image_dir
        )
        described = row.get("description") or row.get("short description") or ""
        found.append(Row(key, kind, row["question"], described, picture))
    absent = [row for row in found if row.picture is None]
    short = sum(not rows[row.id].get("description") for row in absent)
    defects = {
        "pictures absent, described in words: a floor of the text, not MOSSBench": len(
            absent
        ),
        "of these with a short description or none at all": short,
    }
    return Items(found, {what: count for what, count in defects.items() if count})


def requests(row: Row, *, own: Path | None = None) -> list[Question]:
    """Return the question with its picture, or with what is said of it."""
    return [question("question", _text(row, own), row.picture)]


def _text(row: Row, own: Path | None) -> str:
    if row.picture is not None or not row.description:
        return row.question
    values = {"description": row.description, "question": row.question}
    return prompt("mossbench_text", values, own)


def grade(
    row: Row,
    answers: Mapping[tuple[str, int], Answer],
    *,
    own: Path | None = None,
    judge_own: Path | None = None,
) -> list[Grading]:
    """Return what is said of each answer: by the judge and by two string rules."""
    made = []
    for place, answer in answers.items():
        asked = _text(row, own)
        made.append(
            refusal_grading(
                *("refusal", place, asked, answer), picture=row.picture, own=judge_own
            )
        )
        made.append(strings_grading("prefix", place, answer, by_prefix))
        made.append(strings_grading("keywords", place, answer, by_keywords))
    return made


def metrics(graded: Sequence[Graded]) -> dict[str, Any]:
    """Return over-refusal, by judge and by strings, over all and by type."""
    found = _by(graded, "refusal")
    strings = {name: _by(graded, name) for name in ("prefix", "keywords")}
    for name, figures in strings.items():
        for topic, some in figures.pop("topics").items():
            found["topics"].setdefault(topic, {})[name] = some
    found["by_strings"] = strings
    return {**found, **shares.silent_answers(graded)}


def _by(graded: Sequence[Graded], grader: str) -> dict[str, Any]:
    return shares.with_topics(shares.grades_of(graded, grader), OVER_REFUSAL)


_BOARD = {  # refusals of 300, in percent, and of each type
    "Claude 3 Opus (web)": (70.67, 41, 93, 78),
    "Gemini Advanced (web)": (61, 41, 67, 75),
    "Claude 3 Sonnet": (55, 39, 65, 61),
    "Claude 3 Haiku": (49.33, 27, 58, 63),
    "Claude 3 Opus": (34.67, 11, 43, 55),
    "Gemini-Pro 1.5": (29.33, 25, 28, 35),
    "GPT-4o": (6.33, 6, 8, 5),
    "GPT-4o (web)": (4, 6, 2, 4),
}

TASK = Task(
    name="mossbench",
    load=load,
    requests=requests,
    grade=grade,
    metrics=metrics,
    variants=configured,
    beside=("xstest@agreement",),
    facts={
        "source": _SOURCE,
        "about": "The authors' judge is a GPT-4 with their wording, ours is another. "
        "Of Claude 3 Opus their board is inconsistent: its types are 36.33 together.",
        "board, in percent": {
            model: dict(zip(("all", *TYPES.values()), row, strict=True))
            for model, row in _BOARD.items()
        },
    },
)
