"""Multiple choice from tables: options, letters, the three states."""

import base64
import io
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from jaxalign.errors import UserError
from jaxalign.evaluation.task import Answer, Grade
from jaxalign.evaluation.tasks import multiple_choice
from tests.evaluation.tasks import scripted


def png(colour: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), colour).save(file, "PNG")
    return file.getvalue()


def tsv(folder: Path, rows: list[list[str]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "table.tsv"
    path.write_text("\n".join("\t".join(row) for row in rows) + "\n")
    return path


HEAD = ["index", "image", "question", "A", "B", "C", "answer", "category"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    picture = base64.b64encode(png("red")).decode()
    rows = [
        HEAD,
        ["0", picture, "Which colour?", "red", "blue", "", "A", "colour"],
        ["1", "0", "Which is it not?", "red", "blue", "pink", "B", "colour"],
        ["2", "0", "How many?", "1", "2", "3", "A", "number"],
        ["3", "0", "And now?", "1", "2", "3", "C", "number"],
    ]
    tsv(tmp_path / "data" / "mmstar", rows)
    return tmp_path / "data"


def test_a_whole_run_counts_what_names_no_option(folder: Path, tmp_path: Path) -> None:
    said = iter(["A", "The answer is (B).", "I'm sorry, I cannot tell.", "A or B"])
    (report,), answering, grading = scripted.run(
        *("multiple_choice", folder, tmp_path / "out"),
        lambda _: next(said),
        lambda _: None,
    )
    found = report.metrics
    assert (found["accuracy"]["value"], found["accuracy"]["n"]) == (0.5, 4)
    assert found["accuracy_of_parsed"]["value"] == 1.0
    assert found["accuracy_of_parsed"]["n"] == 2
    assert found["unparsed_share"]["value"] == found["refused_share"]["value"] == 0.25
    assert found["letters"] == {
        "chosen": {"A": 1, "B": 1, "refused": 1, "unparsed": 1},
        "right": {"A": 2, "B": 1, "C": 1},
    }
    assert found["topics"]["colour"]["accuracy"]["value"] == 1.0
    assert not grading.seen and "defects" not in found
    first, second = answering.seen[:2]
    # Rows refer to the picture of another.
    assert first.subject.images == second.subject.images != ()
    assert "A. red\nB. blue\n" in str(first.messages[0]["content"][1]["text"]) + "\n"
    assert "C." not in first.messages[0]["content"][1]["text"]


def test_mmstar_s_parquet_lists_its_options_in_the_text(tmp_path: Path) -> None:
    text = "Which?\nOptions: A: a white car, B: a B-movie, red, C: The sky., D: Yes"
    rows = [
        {"index": n, "question": text, "image": png("red"), "answer": "C"}
        for n in range(2)
    ]
    (tmp_path / "mmstar").mkdir()
    path = tmp_path / "mmstar" / "val.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    items = multiple_choice.load(tmp_path)
    row = items.rows[0]
    assert row.options == {
        "A": "a white car",
        "B": "a B-movie, red",
        "C": "The sky.",
        "D": "Yes",
    }
    assert row.picture.read() == png("red") and not items.defects
    (asked,) = multiple_choice.requests(row)
    assert asked.messages[0]["content"][1]["text"].count("a white car") == 1


@pytest.mark.parametrize(
    ("answer", "want"),
    [
        (Answer("C"), "C"),
        (Answer("", "empty"), "unparsed"),
        (Answer("B", "refused"), "refused"),
        (Answer("As an AI, I do not choose."), "refused"),
        (Answer("Both"), "unparsed"),
    ],
)
def test_states(answer: Answer, want: str) -> None:
    row = multiple_choice.Row(
        "0", "?", dict(zip("ABC", "xyz", strict=True)), "C", "", None, False
    )
    (one,) = multiple_choice.TASK.grade(row, {("question", 0): answer})
    assert one.by == Grade(want)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (["0", "", "Which?", "a", "b", "", "C", ""], "'C' is none of the options A, B"),
        (["0", "", "Which?", "", "", "", "A", ""], "none of the options none"),
        (["0", "??" * 40, "Which?", "a", "b", "", "A", ""], "image is no base64"),
    ],
)
def test_a_row_that_cannot_be_asked_is_refused(
    tmp_path: Path, row: list[str], message: str
) -> None:
    tsv(tmp_path / "multiple_choice", [HEAD, row])
    with pytest.raises(UserError, match=message):
        multiple_choice.load(tmp_path)


def test_no_table_and_several_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no table of multiple choice"):
        multiple_choice.load(tmp_path)
    place: Any = tmp_path / "mmstar"
    tsv(place, [HEAD])
    (place / "other.tsv").write_text("question\tanswer\n")
    with pytest.raises(UserError, match="several tables: other.tsv, table.tsv"):
        multiple_choice.load(tmp_path)
