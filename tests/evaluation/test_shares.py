"""Shares with what has no grade beside them; answers that need no judge; pictures."""

from pathlib import Path

import pytest

from jaxalign.errors import UserError
from jaxalign.evaluation import delimited, outcomes, safety_grading, shares
from jaxalign.evaluation.task import Answer, Grade
from jaxalign.judging.judge import JudgeRequest


MEASURES = {"refused": ("full", "part"), "full": ("full",)}


def test_shares_are_of_what_was_decided() -> None:
    grades = [Grade("full"), Grade("part"), Grade("no"), Grade(None, "judge_failed")]
    found = shares.shares([*grades, None], MEASURES)
    assert found["refused"].value == pytest.approx(2 / 3) and found["refused"].n == 3
    assert found["full"].value == pytest.approx(1 / 3)
    states = {name: found[name] for name in outcomes.UNDECIDED}
    assert states == {"unparsed": 0, "judge_failed": 1, "answer_failed": 1}
    # Of the first measure: 2 to 4 of 5.
    assert found["bounds"] == (0.4, 0.8)


def test_what_is_decided_has_no_bounds_and_nothing_no_value() -> None:
    assert "bounds" not in shares.shares([Grade("no")], MEASURES)
    assert shares.shares([], MEASURES)["refused"].value is None


def test_groups_keep_their_order_and_their_failures() -> None:
    grades = [Grade("full"), Grade(None, "unparsed"), Grade("no")]
    found = shares.by_group(["b", "a", "b"], grades, MEASURES)
    assert list(found) == ["b", "a"]
    assert found["b"]["full"].value == 0.5 and found["a"]["unparsed"] == 1


@pytest.mark.parametrize("status", ["empty", "refused"])
def test_no_judge_is_asked_for_an_answer_without_a_text(status: str) -> None:
    answer = Answer("", status)  # type: ignore[arg-type]
    place = "question", 0
    made = safety_grading.refusal_grading("refusal", place, "?", answer)
    assert made.by == Grade("full_refusal")
    made = safety_grading.safety_grading("safety", place, "?", answer)
    assert made.by == Grade("safe")
    made = safety_grading.strings_grading("strings", place, answer)
    assert made.by == Grade("full_refusal")
    # As VLGuard has it.
    made = safety_grading.strings_grading("strings", place, answer, as_published=True)
    assert made.by == Grade("full_compliance")


def test_a_judge_is_asked_for_any_other() -> None:
    made = safety_grading.refusal_grading("refusal", ("q", 1), "?", Answer("Yes."))
    assert isinstance(made.by, JudgeRequest) and made.sample == 1
    assert made.by.subject.response == "Yes."


def test_pictures_are_looked_for_by_every_name_and_place(tmp_path: Path) -> None:
    (tmp_path / "task" / "images").mkdir(parents=True)
    path = tmp_path / "task" / "images" / "1.webp"
    path.write_bytes(b"")
    names = ["1.png", "1.webp"]
    found = safety_grading.find_picture(
        tmp_path, names, ("task/images", "task"), where="1"
    )
    assert found is not None and found.source == path
    none = safety_grading.find_picture(
        tmp_path, names, ("task/images",), where="1", image_dir=tmp_path
    )
    assert none is None  # a directory that is given takes the place of all others


def test_tables_of_text(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('\ufeffa,b\n"x, y","two\nlines"\n', encoding="utf-8")
    assert delimited.read_csv(path, ("a", "b")) == [{"a": "x, y", "b": "two\nlines"}]
    path.write_text("a,b\n1,2,3\n")
    with pytest.raises(UserError, match="row 1 has not as many fields"):
        delimited.read_csv(path)
    path.write_text("")
    with pytest.raises(UserError, match="lacks the column a: it has none"):
        delimited.read_csv(path, ("a",))
    tabs = tmp_path / "a.tsv"
    tabs.write_text("a\tb\n1\t" + "x" * 200_000 + "\n")  # beyond csv's own limit
    assert len(delimited.read_tsv(tabs)[0]["b"]) == 200_000
