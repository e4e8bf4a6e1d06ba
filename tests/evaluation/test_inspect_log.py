"""A task as inspect-ai reads it: plain objects, and its own library where it is."""

import json
import math
import sys
from pathlib import Path

import pytest

from jaxalign.errors import UserError
from jaxalign.evaluation import inspect_log, results, statistics
from tests.evaluation.runs import write_lines, write_task


FIGURE = json.loads(json.dumps(statistics.share(1, 2)._asdict()))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    items = [
        {
            "index": i,
            "asked": {"recognition": "What?", "final": "Where?"},
            "topic": "sea",
            "images": ["data:image/jpeg;base64,AAAA"],
            "references": ["Paris"],
        }
        for i in range(2)
    ]
    task = write_task(
        tmp_path / "qa",
        {"recognition": ["correct", None], "final": ["incorrect", "correct"]},
        metrics={
            "settings": {"model": {"model": "smollm2", "adapter": "run"}, "limit": 2},
            "final": {"CO": FIGURE, "F": {**FIGURE, "value": None}},
            "topics": {"sea": {"final": {"CO": FIGURE}}},
        },
        items=items,
    )
    answers = list(map(json.loads, (task / "answers.jsonl").read_text().splitlines()))
    answers[3] |= {"answer": "", "status": "failed", "reason": "HTTP 500"}
    write_lines(task / "answers.jsonl", answers)
    return tmp_path


def test_a_sample_is_a_question_of_an_item(out) -> None:
    log = inspect_log.log_of(results.read_task(out / "qa"))
    assert [sample["id"] for sample in log["samples"]] == [
        *("0-recognition", "1-recognition", "0-final", "1-final"),
    ]
    first, failed_grade, _, failed_answer = log["samples"]
    assert first["epoch"] == 1 and first["target"] == ["Paris"]
    assert first["input"][0]["content"] == [
        {"type": "image", "image": "data:image/jpeg;base64,AAAA"},
        {"type": "text", "text": "What?"},
    ]
    assert first["output"]["choices"][0]["message"]["content"] == "answer 0"
    assert first["scores"]["recognition"]["value"] == "correct"
    assert first["scores"]["recognition"]["explanation"] == '{"grade": "correct"}'
    assert first["metadata"] == {"index": 0, "question": "recognition", "topic": "sea"}
    # What has no grade is not scored; what has no answer is an error.
    assert math.isnan(failed_grade["scores"]["recognition"]["value"])
    assert failed_grade["scores"]["recognition"]["metadata"] == {
        "status": "judge_failed"
    }
    assert failed_answer["error"]["message"] == "HTTP 500"
    assert log["results"]["completed_samples"] == 3


def test_headline_figures_are_its_scores(out) -> None:
    log = inspect_log.log_of(results.read_task(out / "qa"))
    (score,) = log["results"]["scores"]
    assert score["name"] == "final"
    # A figure of nothing is none; topics are left to our own page.
    assert list(score["metrics"]) == ["CO", "CO_stderr"]
    assert score["metrics"]["CO"]["value"] == 0.5
    assert score["metrics"]["CO"]["metadata"]["n"] == 2
    assert log["eval"]["model"] == "smollm2+run"
    assert log["eval"]["config"] == {"epochs": 1, "limit": 2}


def test_several_answers_are_epochs_and_gradings_of_other_names(tmp_path) -> None:
    task = write_task(tmp_path / "t", {"safe": [1, 0, 1]}, samples=3)
    answers = [
        {"index": 0, "question": "q", "sample": s, "answer": "a", "status": "ok"}
        for s in range(3)
    ]
    write_lines(task / "answers.jsonl", answers)
    log = inspect_log.log_of(results.read_task(task))
    assert [(s["id"], s["epoch"]) for s in log["samples"]] == [(0, 1), (0, 2), (0, 3)]
    assert [s["scores"]["safe"]["value"] for s in log["samples"]] == [1, 0, 1]
    # Of grades alone there are samples too.
    (task / "answers.jsonl").unlink()
    log = inspect_log.log_of(results.read_task(task))
    assert [(s["id"], s["epoch"]) for s in log["samples"]] == [(0, 1), (0, 2), (0, 3)]


def test_without_the_library_it_is_named(out, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "inspect_ai.log", None)
    with pytest.raises(UserError, match="`pip install inspect-ai`"):
        inspect_log.write(out)
    assert not (out / "inspect").exists()


def test_the_library_reads_what_was_written(out) -> None:
    log_lib = pytest.importorskip(
        "inspect_ai.log", reason="inspect-ai is not installed"
    )
    (path,) = inspect_log.write(out)
    log = log_lib.read_eval_log(str(path))
    assert log.status == "success" and log.eval.task == "qa"
    by_id = {sample.id: sample for sample in log.samples}
    assert by_id["0-recognition"].scores["recognition"].value == "correct"
    assert by_id["1-final"].error.message == "HTTP 500"
    assert log.results.scores[0].metrics["CO"].value == 0.5
