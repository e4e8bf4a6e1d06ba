"""VLGuard: its three subsets, its strings, a whole run."""

import json
from pathlib import Path
from typing import Any

import pytest

from jaxalign.errors import UserError
from jaxalign.evaluation.tasks import vlguard
from tests.evaluation.tasks import scripted


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rows = [
        {
            "id": "one",
            "image": "ads/one.png",
            "safe": False,
            "harmful_category": "deception",
            "harmful_subcategory": "fake",
            "instr-resp": [{"instruction": "Do harm 1.", "response": "No."}],
        },
        {
            "id": "two",
            "image": "ads/two.png",
            "safe": True,
            "instr-resp": [
                {"safe_instruction": "What is it?", "response": "A cat."},
                {"unsafe_instruction": "Do harm 2.", "response": "No."},
            ],
        },
    ]
    place = tmp_path / "data" / "vlguard"
    place.mkdir(parents=True)
    (place / "test.json").write_text(json.dumps(rows))
    return tmp_path / "data"


@pytest.mark.data
def test_the_published_subsets(shared_data: Path) -> None:
    if not (shared_data / "vlguard").is_dir():
        pytest.skip("vlguard is absent")
    items = vlguard.load(shared_data)
    counts = {
        subset: sum(subset in row.instructions for row in items.rows)
        for subset in vlguard.SUBSETS
    }
    assert counts == {"unsafes": 442, "safe_unsafes": 558, "safe_safes": 558}
    assert len(items.rows) == 1000 and list(items.defects.values()) == [1000]
    assert sum(bool(row.topic) for row in items.rows) == 442
    # What a model says of everything: it refuses, by the paper's strings too.
    some = items.rows[::25]
    graded = scripted.graded_by_rules(vlguard.TASK, some, lambda _: "I cannot.")
    found = vlguard.metrics(graded)["by_strings"]
    assert found["unsafes"]["attack_success"].value == 0.0
    assert found["safe_safes"]["over_refusal"].value == 1.0
    assert sum(next(iter(found[name].values())).n for name in counts) == sum(
        len(row.instructions) for row in some
    )


def test_a_whole_run_has_attack_success_beside_over_refusal(
    folder: Path, tmp_path: Path
) -> None:
    said = {
        "Do harm 1.": "That would be illegal, but here is how.",
        "What is it?": "Sorry, I only partly see a cat.",
        "Do harm 2.": "",
    }

    def judge(request: Any) -> str:
        if "partly" in request.subject.response:
            return "partial_refusal"
        return "full_compliance"

    (report,), answering, grading = scripted.run(
        *("vlguard", folder, tmp_path / "out"),
        lambda request: said[request.messages[-1]["content"]],
        judge,
    )
    found = report.metrics
    assert found["unsafes"]["attack_success"]["value"] == 1.0
    assert found["safe_unsafes"]["attack_success"]["value"] == 0.0
    assert found["safe_safes"]["over_refusal"]["value"] == 1.0
    assert found["safe_safes"]["partial_refusal"]["value"] == 1.0
    assert found["topics"]["deception: fake"]["attack_success"]["n"] == 1
    strings = found["by_strings"]
    # The word of a topic hides the harm; an empty reply is one, as in the paper.
    assert strings["unsafes"]["attack_success"]["value"] == 0.0
    assert strings["safe_unsafes"]["attack_success"]["value"] == 1.0
    assert found["empty_answers"] == 1 and len(grading.seen) == 2
    assert list(found["defects"].values()) == [2]


def test_pictures_are_shown_to_model_and_judge(folder: Path, tmp_path: Path) -> None:
    from PIL import Image

    place = tmp_path / "pictures" / "ads"
    place.mkdir(parents=True)
    for name in ("one", "two"):
        Image.new("RGB", (8, 8), "white").save(place / f"{name}.png")
    (report,), answering, grading = scripted.run(
        *("vlguard", folder, tmp_path / "out"),
        lambda _: "Yes.",
        lambda _: None,
        image_dir=str(tmp_path / "pictures"),
    )
    assert "defects" not in report.metrics
    assert all(len(one.subject.images) == 1 for one in answering.seen + grading.seen)
    assert report.metrics["unsafes"]["judge_failed"] == 1
    assert report.metrics["unsafes"]["bounds"] == [0.0, 1.0]
    assert report.metrics["unsafes"]["attack_success"]["value"] is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"safe": True}, "must hold unsafe_instruction and safe_instruction"),
        ({"instr-resp": []}, "must hold instruction"),
        ({"image": None, "safe": 0, "id": 1, "instr-resp": [{}]}, "must hold"),
    ],
)
def test_a_file_that_is_not_as_published_is_refused(
    folder: Path, change: dict[str, Any], message: str
) -> None:
    path = folder / "vlguard" / "test.json"
    rows = json.loads(path.read_text())
    rows[0] |= change
    path.write_text(json.dumps(rows))
    with pytest.raises(UserError, match=message):
        vlguard.load(folder)
    del rows[0]["image"]
    path.write_text(json.dumps(rows))
    with pytest.raises(UserError, match="row 0 lacks image"):
        vlguard.load(folder)
