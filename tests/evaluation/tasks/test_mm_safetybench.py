"""MM-SafetyBench: its layout, what is safe in which scenario, a whole run."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from jaxalign.errors import UserError
from jaxalign.evaluation.tasks import mm_safetybench
from tests.evaluation.tasks import scripted


SCENARIOS = ("01-Illegal_Activitiy", "08-Political_Lobbying", "10-Legal_Opinion")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    base = tmp_path / "data" / "mm_safetybench"
    (base / "processed_questions").mkdir(parents=True)
    for number, scenario in enumerate(SCENARIOS):
        rows = {
            "0": {
                "Question": f"Plain {number}",
                "Changed Question": f"Changed {number}",
                "Rephrased Question": f"Text {number}",
                "Rephrased Question(SD)": f"Picture {number}",
            }
        }
        path = base / "processed_questions" / f"{scenario}.json"
        path.write_text(json.dumps(rows))
        for place, kind in enumerate(mm_safetybench.KINDS):
            where = base / "imgs" / scenario / kind
            where.mkdir(parents=True)
            Image.new("RGB", (4, 4), (80 * number, 80 * place, 0)).save(where / "0.jpg")
    return tmp_path / "data"


def test_a_whole_run_judges_each_scenario_by_its_rule(
    folder: Path, tmp_path: Path
) -> None:
    def judge(request: Any) -> str | None:
        asked = request.subject.prompt
        if asked == "Text 2":
            return None
        return "unsafe" if asked in ("Picture 0", "Text 1") else "safe"

    (report,), answering, grading = scripted.run(
        *("mm_safetybench", folder, tmp_path / "out"), lambda _: "Sure.", judge
    )
    found = report.metrics
    assert len(answering.seen) == 9
    # One answer is of no grade twice: of SD_TYPO and TYPO.
    assert (found["attack_success"]["value"], found["attack_success"]["n"]) == (
        pytest.approx(3 / 7),
        7,
    )
    assert found["judge_failed"] == 2
    assert found["bounds"] == pytest.approx([3 / 9, 5 / 9])
    kinds = found["topics"][SCENARIOS[0]]["kinds"]
    assert [one["attack_success"]["value"] for one in kinds.values()] == [1.0, 0.0, 0.0]
    assert found["macro"] == pytest.approx((1 / 3 + 2 / 3 + 0) / 3)
    assert found["kinds"]["SD"]["attack_success"]["n"] == 3
    assert found["by_strings"]["attack_success"]["value"] == 1.0
    assert found["defects"] == {"scenarios that are not there, of 13": 10}
    asked = {one.subject.prompt: one.messages[0]["content"] for one in grading.seen}
    systems = [asked[f"Picture {number}"] for number in range(3)]
    assert len(set(systems)) == 3
    shown = {(one.subject.prompt, one.subject.images) for one in answering.seen}
    assert len(shown) == 9


def test_criteria() -> None:
    want = {f"{n:02}": "harm" for n in range(1, 14)}
    want |= {"08": "abstention", "13": "abstention"}
    want |= dict.fromkeys(("10", "11", "12"), "advice")
    got = {n: mm_safetybench.criterion_of(f"{n}-Any") for n in want}
    assert got == want


def test_a_picture_that_is_missing_is_named(folder: Path) -> None:
    base = folder / "mm_safetybench"
    (base / "imgs" / SCENARIOS[1] / "TYPO" / "0.jpg").unlink()
    with pytest.raises(UserError, match=f"no picture {SCENARIOS[1]}/TYPO/0.jpg"):
        mm_safetybench.load(folder)


def test_files_that_are_missing_or_not_as_published_are_refused(
    folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="MM-SafetyBench"):
        mm_safetybench.load(tmp_path)
    path = folder / "mm_safetybench" / "processed_questions" / f"{SCENARIOS[0]}.json"
    path.write_text('{"0": {"Rephrased Question": "?"}}')
    with pytest.raises(UserError, match=r"0 lacks Rephrased Question\(SD\)"):
        mm_safetybench.load(folder)
