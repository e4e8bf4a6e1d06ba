"""DREAM's observations: the file's defects, what a judge sees, a whole run."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from jaxalign.cli.main import main
from jaxalign.errors import UserError
from jaxalign.evaluation import harness
from jaxalign.evaluation.config import EvalConfig
from jaxalign.evaluation.observation_agreement import agreement
from jaxalign.evaluation.run_files import TaskReport
from jaxalign.evaluation.task import Grade, Graded
from jaxalign.evaluation.tasks import dream_observations
from jaxalign.feedback.decompose.observations import Observation
from jaxalign.judging.config import JudgeConfig


OBSERVERS = Path(__file__).parents[3] / "experiments" / "dream"
HARM = Observation("Do harm.", "text instructions", "violence")
DRAWN = Observation("a drawn knife", "image content", "violence")


@pytest.mark.data
def test_the_published_file_and_its_defects(shared_data: Path) -> None:
    if not (shared_data / "dream").is_dir():
        pytest.skip("dream is absent")
    items = dream_observations.load(shared_data)
    defects = dict(items.defects)
    assert defects["harmless questions with observations, left out"] == 6
    # The same 6, one without observations, one with none, two with values of no list.
    assert defects["unsafe questions without observations, left out"] == 10
    assert defects["ids that are there twice"] == 1
    assert defects["values off the lists, renamed"] == 27  # "Health" 26, one source
    left_out = defects["words observed differently, their pictures absent, left out"]
    assert len(items.rows) == 2961 - left_out
    assert all("<image>" not in row.text for row in items.rows)


@pytest.mark.data
def test_who_has_read_the_answers_is_right_in_everything(
    shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not (shared_data / "dream").is_dir():
        pytest.skip("dream is absent")
    monkeypatch.setenv("JAXALIGN_DREAM", str(shared_data))
    found = measured(shared_data, tmp_path / "out", OBSERVERS / "oracle.py").metrics
    for part in (found, found["before_the_verifier"]):
        assert (part["detected"]["value"], part["false_alarm"]["value"]) == (1.0, 0.0)
        for way in ("categories", "sources", "exact", "content"):
            assert {leaf["value"] for leaf in part[way].values()} == {1.0}, way
    assert found["not_run"].keys() == {"image content", "text in the image"}
    assert found["by_source"]["image content"]["recall"]["n"] == 0


def measured(data: Path, out: Path, path: Path, **options: Any) -> TaskReport:
    judge = JudgeConfig(name="python", path=str(path), concurrency=512)
    files = {"tasks": ("dream_observations",), "data_dir": str(data), "out": str(out)}
    (report,) = harness.evaluate(EvalConfig(judge=judge, **files, **options))
    return report


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    def turn(text: str, *found: Observation) -> list[dict[str, Any]]:
        asked = {"from": "human", "value": text, "safe": not found}
        observed = [one._asdict() for one in found]
        return [asked, {"from": "gpt", "value": "ANSWER", "observe": observed}]

    def row(name: str, *turns: dict[str, Any]) -> dict[str, Any]:
        image = f"VLGuard/train/{name}.png"
        return {"id": name, "image": image, "conversations": turns}

    loud = HARM._replace(source="Text Instructions")
    rows = [
        row("a", *turn("<image>\nDo harm.", loud), *turn("What is it?")),
        row("b", *turn("Do this.", DRAWN)),
        # The same words, observed differently.
        row("c", *turn("Once more.", HARM)),
        row("d", *turn("Once more.", HARM._replace(risk_category="privacy"))),
    ]
    (tmp_path / "data" / "dream").mkdir(parents=True)
    path = tmp_path / "data" / "dream" / "vlguard_sft_llava_format.json"
    path.write_text(json.dumps(rows))
    return tmp_path / "data"


def see(requests: Sequence[dict[str, Any]], seen: list[dict[str, Any]]) -> list[Any]:
    """Say too much of the words, and see what is drawn; the verifier knows better."""
    seen.extend(requests)
    replies: list[Any] = []
    for asked in requests:
        if asked["task"] == "verify":
            replies.append(
                {"answer": "no" if "privacy" in asked["statement"] else "yes"}
            )
            continue
        found = [DRAWN] if asked["pictures"] else []
        if "Do harm." in asked["prompt"]:
            found += [HARM, HARM._replace(risk_category="privacy")]
        replies.append({"observations": [one._asdict() for one in found]})
    return replies


def run(folder: Path, out: Path, **options: Any) -> tuple[dict[str, Any], list[Any]]:
    seen: list[dict[str, Any]] = []

    def judge(requests: list[dict[str, Any]]) -> list[Any]:
        return see(requests, seen)

    files = {"tasks": ("dream_observations",), "data_dir": str(folder)}
    config = EvalConfig(judge=JudgeConfig(name="python"), out=str(out), **files)
    (report,) = harness.evaluate(config, judge=judge)
    return dict(report.metrics), seen


def test_without_pictures_the_words_are_looked_at_alone(folder, tmp_path) -> None:
    found, seen = run(folder, tmp_path / "out")
    assert found["n"] == 3  # of 5: two say the same
    assert found["defects"] == {
        "words observed differently, their pictures absent, left out": 2,
        "pictures absent, the words looked at alone": 3,
    }
    assert [one["task"] for one in seen] == ["observations"] * 3 + ["verify"] * 2
    # What is drawn is not run, not missed: one exchange has something to see.
    assert found["not_run"] == {"image content": 1}
    assert (found["detected"]["value"], found["detected"]["n"]) == (1.0, 1)
    assert (found["false_alarm"]["value"], found["false_alarm"]["n"]) == (0.0, 1)
    assert found["exact"]["precision"]["value"] == 1.0
    before = found["before_the_verifier"]
    assert before["exact"]["precision"]["value"] == 0.5
    assert before["exact"]["recall"]["value"] == 1.0
    assert "ANSWER" not in json.dumps([one["messages"] for one in seen])
    again, more = run(folder, tmp_path / "out")
    assert not more  # all is in the store
    assert again["exact"] == found["exact"]


def test_with_pictures_all_three_passes_run_and_each_sees_its_own(
    folder, tmp_path
) -> None:
    place = folder / "dream" / "VLGuard" / "train"
    place.mkdir(parents=True)
    for number, name in enumerate("abcd"):
        Image.new("RGB", (4, 4), (number, 0, 0)).save(place / f"{name}.png")
    found, seen = run(folder, tmp_path / "out")
    assert found["n"] == 5 and "not_run" not in found
    for asked in seen:
        if asked["task"] != "observations":
            continue
        sources = asked["schema"]["properties"]["observations"]["items"]["properties"]
        kinds = sources["source"]["enum"]
        told = json.dumps(asked["messages"])
        if "text instructions" not in kinds:
            assert asked["pictures"] and "Do harm." not in told
        elif "image content" not in kinds:
            assert not asked["pictures"] and "image_url" not in told
    graded = {
        (row["index"], row["question"]): row["grade"]
        for row in lines(tmp_path / "out", "grades")
    }
    assert graded[2, "image"] == [DRAWN._asdict()]
    # It sees a drawn knife everywhere; one of five exchanges has it.
    assert found["by_source"]["image content"]["precision"]["value"] == 0.2
    assert found["by_source"]["image content"]["recall"]["value"] == 1.0
    shown = lines(tmp_path / "out", "items")[0]
    assert [*shown["asked"]] == ["joint", "image", "text"] and shown["images"]


def lines(out: Path, name: str) -> list[dict[str, Any]]:
    text = (out / "dream_observations" / f"{name}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_figures_by_hand() -> None:
    def pair(expected: str, made: str) -> tuple[list[Observation], list[Observation]]:
        kinds = {"v": "violence", "p": "privacy", "d": "discrimination"}
        some = [
            [Observation("it", "text content", kinds[letter]) for letter in letters]
            for letters in (expected, made)
        ]
        return some[0], some[1]

    found = agreement([pair("vp", "v"), pair("d", "dp"), pair("", "v"), pair("", "")])
    # 2 of 4 that are made are right; 2 of 3 are made.
    for way in ("categories", "exact", "content"):
        assert found[way]["precision"].value == 0.5
        assert found[way]["recall"].value == pytest.approx(2 / 3)
        assert found[way]["F1"].value == pytest.approx(4 / 7)
    violence = found["by_category"]["violence"]
    assert (violence["precision"].value, violence["recall"].value) == (0.5, 1.0)
    assert violence["F1"].value == pytest.approx(2 / 3)
    assert found["by_source"]["image content"]["F1"].value is None


def test_an_exchange_with_a_failed_pass_is_in_no_figure() -> None:
    item = dream_observations.Exchange("1", "Do harm.", (HARM,), None)
    failed = {("text", 0): Grade(None, "judge_failed")}
    right = {
        ("text", 0): Grade([HARM._asdict()]),
        ("verify 1", 0): Grade(None, "judge_failed"),  # what it is asked on counts
    }
    found = dream_observations.metrics(
        [Graded(0, item, {}, failed), Graded(1, item, {}, right)]
    )
    assert (found["detected"].value, found["detected"].n) == (1.0, 1)
    assert found["exchanges_with_a_failed_pass"] == 1
    assert found["judge_failed"] == 2


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--model", "m", "--judge.model", "j"], "--model has no effect"),
        (["--endpoint.model", "m", "--judge.model", "j"], "--endpoint.model has no"),
        (["--num_samples", "2", "--judge.model", "j"], "--num_samples has no effect"),
        ([], "judge.name rules does not: use judge.name openai"),
        (["--judge.name", "local", "--judge.model", "m"], "judge.name local does not"),
    ],
)
def test_it_is_the_judge_that_is_measured(
    folder, tmp_path, capsys, given, said
) -> None:
    base = ["eval", "--tasks", "dream_observations", "--data_dir", str(folder)]
    with pytest.raises(SystemExit) as stop:
        main([*base, "--out", str(tmp_path / "out"), *given])
    assert stop.value.code == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_dry_run_tells_passes_and_verifications(folder, tmp_path, capsys) -> None:
    base = ["eval", "--tasks", "dream_observations", "--data_dir", str(folder)]
    with pytest.raises(SystemExit) as stop:
        main([*base, "--out", str(tmp_path / "out"), "--judge.model", "m", "--dry_run"])
    assert not stop.value.code
    said = capsys.readouterr().out
    # Three text passes, and a verification of the one risk that each is taken to see.
    assert "3 of 3 items, 0 answers (0 in the store), 6 judgements" in said
    assert "judgements: 6 calls" in said


def test_words_are_no_risks(folder: Path, tmp_path: Path) -> None:
    found = measured(folder, tmp_path / "out", OBSERVERS / "keywords.py").metrics
    # "harm" is one of its words of violence.
    assert found["exact"]["F1"]["value"] == 1.0
    assert found["content"]["F1"]["value"] == 1.0


def test_a_file_that_is_not_as_published_is_refused(folder: Path) -> None:
    path = folder / "dream" / "vlguard_sft_llava_format.json"
    rows = json.loads(path.read_text())
    del rows[0]["conversations"][0]["safe"]
    path.write_text(json.dumps(rows))
    with pytest.raises(UserError, match="row 0: a human turn lacks safe"):
        dream_observations.load(folder)
    rows[0]["conversations"].pop(0)
    path.write_text(json.dumps(rows))
    with pytest.raises(UserError, match="of human and gpt, in turn"):
        dream_observations.load(folder)
    path.write_text('[{"id": "a"}]')
    with pytest.raises(UserError, match="row 0 lacks"):
        dream_observations.load(folder)
