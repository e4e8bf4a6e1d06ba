"""A model that sees, in this process and behind its own endpoint: the same figures."""

import json
from pathlib import Path
from typing import Any

import pytest

from jaxalign.evaluation.config import EndpointConfig, EvalConfig, GenerationConfig
from jaxalign.evaluation.harness import evaluate
from tests import vision_models
from tests.evaluation import vqa_rows
from tests.generation.scenes import serving


SHORT = GenerationConfig(max_new_tokens=6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("data")
    vqa_rows.write(place, 5)
    return place


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return vision_models.write("qwen2_5_vl", tmp_path_factory.mktemp("sees"))


def run(folder: Path, out: Path, **more: Any) -> tuple[dict[str, Any], list[Any]]:
    given = {"tasks": ("chinese_simplevqa",), "generation": SHORT, **more}
    config = EvalConfig(data_dir=str(folder), out=str(out), **given)
    (report,) = evaluate(config)
    text = (out / report.name / "answers.jsonl").read_text(encoding="utf-8")
    return dict(report.metrics), [json.loads(line) for line in text.splitlines()]


def test_the_endpoint_says_what_the_model_says(folder, model, tmp_path) -> None:
    mine, answers = run(folder, tmp_path / "a", model=str(model))
    with serving(model, batch_slots=4, max_length=600) as served:
        endpoint = EndpointConfig(base_url=f"{served.url}/v1", model="tiny")
        theirs, told = run(folder, tmp_path / "b", endpoint=endpoint)
    assert answers == told and any(answer["answer"] for answer in answers)
    for name in ("recognition", "final", "joint", "given", "topics"):
        assert mine[name] == theirs[name], name
    # Pictures reach the model: without them it says something else.
    _, blind = run(folder, tmp_path / "c", model=str(model), conditions=("text_only",))
    assert [a["answer"] for a in blind] != [a["answer"] for a in answers]


def test_a_run_goes_on_without_loading_what_is_known(
    folder, model, tmp_path, monkeypatch
) -> None:
    out = tmp_path / "out"
    some, _ = run(folder, out, model=str(model), limit=2)
    whole, answers = run(folder, out, model=str(model))
    assert some["n"] == 2 and whole["n"] == 5
    monkeypatch.setattr("jaxalign.generation.text_model.load", None)
    again, told = run(folder, out, model=str(model))
    assert told == answers and again["settings"]["tokens"]["answers"]["calls"] == 0


def test_samples_do_not_depend_on_what_else_is_asked(folder, model, tmp_path) -> None:
    options = {"model": str(model), "num_samples": 3, "best_of": "likelihood"}
    _, together = run(folder, tmp_path / "a", **options)
    _, some = run(folder, tmp_path / "b", **options, limit=2)
    known = {(a["index"], a["question"], a["sample"]): a["answer"] for a in together}
    assert len(known) == 5 * 2 * 3 and len(set(known.values())) > 5
    for answer in some:
        place = answer["index"], answer["question"], answer["sample"]
        assert known[place] == answer["answer"]
