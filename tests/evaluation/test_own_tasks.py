"""Tasks of a person's own: files that are none, and rows without any code."""

import json
from pathlib import Path
from typing import Any

import pytest

from jaxalign.errors import UserError
from jaxalign.evaluation.config import EndpointConfig, EvalConfig
from jaxalign.evaluation.harness import evaluate
from jaxalign.judging.config import JudgeConfig
from tests.evaluation import vqa_rows
from tests.judging.stub_server import Stub, serving
from tests.synthetic import write_jsonl


def run(stub: Stub, out: Path, *tasks: Path, **more: Any) -> dict[str, Any]:
    config = EvalConfig(
        tasks=tuple(map(str, tasks)),
        out=str(out),
        endpoint=EndpointConfig(base_url=stub.url, model="m"),
        **more,
    )
    return {report.name: report.metrics for report in evaluate(config)}


def test_what_is_no_task_is_refused(tmp_path) -> None:
    path = tmp_path / "mine.py"
    for text, said in (
        ("TASK = 1", "has no TASK"),
        ("1 / 0", "cannot be executed: ZeroDivisionError"),
    ):
        path.write_text(text)
        with serving() as stub, pytest.raises(UserError, match=said):
            run(stub, tmp_path / "out", path)
    with serving() as stub, pytest.raises(UserError, match="cannot be read"):
        run(stub, tmp_path / "out", tmp_path / "none.py")


def test_rows_are_a_task_without_code(tmp_path) -> None:
    vqa_rows.write(tmp_path, 2)
    picture = "chinese_simplevqa/images/picture0.png"
    rows = [
        {"prompt": "Capital of France?", "references": "Paris", "topic": "where"},
        {"prompt": "2 + 2?", "references": ["4", "four"], "topic": "sums"},
        {"prompt": "3 + 3?", "references": ["6"], "topic": "sums"},
        {"prompt": "What is it?", "images": [picture], "references": ["a picture"]},
    ]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    answers = {"France": "The PARIS!", "2 + 2": "It is 4.", "3 + 3": "", "is it": "no"}

    def say(body: dict[str, Any]) -> str:
        shown = json.dumps(body)
        assert ("data:image/png" in shown) == ("is it" in shown)
        return next(answer for asked, answer in answers.items() if asked in shown)

    with serving(say=say) as stub:
        found = run(stub, tmp_path / "out", path)["rows"]
    assert found["exact_match"]["value"] == 0.25 and found["exact_match"]["n"] == 4
    graded = found["graded"]
    values = [graded[name]["value"] for name in ("CO", "IN", "NA", "CGA", "F")]
    assert values == pytest.approx([0.5, 0.25, 0.25, 2 / 3, 4 / 7])
    assert found["topics"]["sums"]["graded"]["CO"]["value"] == 0.5


def test_rows_with_choices_read_a_letter_and_nothing_else(tmp_path) -> None:
    choices = ["a dog", "a cat", "a cow"]
    rows = [
        {"prompt": f"No. {n}?", "choices": choices, "references": right}
        for n, right in enumerate(("B", "a cow", "A", "A"))
    ]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    said = ["B", "The answer is (C).", "A dog or a cat", "Option B"]

    def say(body: dict[str, Any]) -> str:
        text = body["messages"][-1]["content"]
        assert text.endswith("A. a dog\nB. a cat\nC. a cow")
        return said[int(text[4])]

    judge = JudgeConfig(name="rules")
    with serving(say=say) as stub:
        found = run(stub, tmp_path / "out", path, judge=judge)["rows"]
    assert found["accuracy"]["value"] == 0.5 and found["accuracy"]["n"] == 4
    assert found["accuracy_of_parsed"]["value"] == pytest.approx(2 / 3)
    assert found["unparsed_share"]["value"] == 0.25


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "a"}, "references must be"),
        ({"prompt": "a", "references": [""]}, "references must be"),
        ({"references": "a"}, "expected an object with the field prompt"),
        ({"prompt": "a", "references": "x", "choices": ["a", "b"]}, "of a choice"),
        ({"prompt": "a", "references": "a", "choices": ["a"]}, "two texts or more"),
    ],
)
def test_wrong_rows_are_named_by_their_line(tmp_path, row, said) -> None:
    good = {"prompt": "Capital of France?", "references": "Paris"}
    path = write_jsonl(tmp_path / "rows.jsonl", [good, row])
    with serving() as stub:
        with pytest.raises(UserError, match=said) as error:
            run(stub, tmp_path / "out", path)
        assert "line 2" in str(error.value) and stub.total == 0
