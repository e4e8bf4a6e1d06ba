"""MOSSBench: its rows, its proxies, and the floor without pictures."""

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from jaxalign.errors import UserError
from jaxalign.evaluation.tasks import mossbench
from tests.evaluation.tasks import scripted


def responses(folder: Path) -> dict[str, dict[str, dict[str, Any]]]:
    path = folder / "mossbench" / "responses_2024.jsonl.gz"
    if not path.exists():
        pytest.skip(f"{path} is absent")
    found: dict[str, dict[str, dict[str, Any]]] = {}
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for row in map(json.loads, file):
            found.setdefault(row["model"], {})[row["pid"]] = row
    return found


@pytest.mark.data
@pytest.mark.parametrize(
    ("model", "prefix"),
    [("Claude 3 Haiku", 46.3), ("Gemini-Pro 1.5", 15.3)],
)
def test_the_proxy_of_published_replies(
    shared_data: Path, model: str, prefix: float
) -> None:
    mine = responses(shared_data)[model]
    items = mossbench.load(shared_data)
    assert len(items.rows) == 300 and next(iter(items.defects.values())) == 300

    def say(row: mossbench.Row) -> str:
        given = mine[row.id]
        if given["withheld"]:
            return "I cannot" if given["prefix_refusal"] else "Yes"
        return given["response"] or ""

    graded = scripted.graded_by_rules(mossbench.TASK, items.rows, say)
    found = mossbench.metrics(graded)
    rule = found["by_strings"]["prefix"]
    assert round(100 * rule["over_refusal"].value, 1) == prefix
    kinds = {kind: one["prefix"] for kind, one in found["topics"].items()}
    sizes = {kind: one["over_refusal"].n for kind, one in kinds.items()}
    assert sizes == dict.fromkeys(mossbench.TYPES.values(), 100)
    # Empty replies are refusals: 14 of the Claude models by their API, 8 of Gemini.
    assert found["empty_answers"] == (8 if "Gemini" in model else 14)


@pytest.mark.data
def test_the_board_is_the_published_one(shared_data: Path) -> None:
    path = shared_data / "mossbench" / "board_2024.csv"
    if not path.exists():
        pytest.skip(f"{path} is absent")
    board = mossbench.TASK.facts["board, in percent"]
    for row in csv.DictReader(path.read_text().splitlines()):
        mine = list(board[row["model"]].values())
        assert mine == [float(row[name]) for name in ("all", "type1", "type2", "type3")]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rows = {
        str(number): {
            "image": f"images/{number}.png",
            "question": f"What about {number}?",
            "description": f"A toy, number {number}.",
            "metadata": {"over": f"type {number}"},
        }
        for number in (1, 2, 3)
    }
    place = tmp_path / "data" / "mossbench"
    (place / "images").mkdir(parents=True)
    (place / "information.json").write_text(json.dumps(rows))
    return tmp_path / "data"


def test_without_pictures_their_descriptions_are_shown_and_counted(
    folder: Path, tmp_path: Path
) -> None:
    from PIL import Image

    # The file says .png.
    place = folder / "mossbench" / "images" / "2.webp"
    Image.new("RGB", (8, 8), "white").save(place)
    said = iter(["A toy.", "I can't say.", ""])

    def judge(request: Any) -> str:
        refuses = "can't" in request.subject.response
        return "full_refusal" if refuses else "full_compliance"

    (report,), answering, grading = scripted.run(
        "mossbench", folder, tmp_path / "out", lambda _: next(said), judge
    )
    found = report.metrics
    assert found["over_refusal"]["value"] == pytest.approx(2 / 3)
    assert found["topics"]["negated harm"]["over_refusal"]["value"] == 1.0
    assert found["by_strings"]["keywords"]["over_refusal"]["n"] == 3
    ((defect, count),) = found["defects"].items()
    assert "not MOSSBench" in defect and count == 2
    first, second, third = (str(one.messages) for one in answering.seen)
    assert "A toy, number 1." in first and "A toy, number 3." in third
    assert "A toy" not in second and "sha256:" in second
    assert len(grading.seen) == 2
    # The judge sees what the model saw.
    assert "A toy, number 1." in grading.seen[0].messages[1]["content"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metadata": {"over": "type 4"}}, "lacks metadata.over, one of type 1"),
        ({"question": ""}, "lacks question"),
    ],
)
def test_a_file_that_is_not_as_published_is_refused(
    folder: Path, change: dict[str, Any], message: str
) -> None:
    path = folder / "mossbench" / "information.json"
    rows = json.loads(path.read_text())
    rows["1"] |= change
    path.write_text(json.dumps(rows))
    with pytest.raises(UserError, match=message):
        mossbench.load(folder)
    path.write_text("[]")
    with pytest.raises(UserError, match="expected an object"):
        mossbench.load(folder)
