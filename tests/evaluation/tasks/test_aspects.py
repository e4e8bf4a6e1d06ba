"""Scores on several aspects, against a judge whose scores are known."""

import json
import statistics
from typing import Any

import pytest

from jaxalign.evaluation.config import EndpointConfig, EvalConfig
from jaxalign.evaluation.harness import evaluate
from jaxalign.judging.config import JudgeConfig
from tests.judging.stub_server import serving
from tests.synthetic import write_jsonl


ASPECTS = ("clarity", "safety")


def test_means_are_those_of_the_scores(tmp_path) -> None:
    rows = [{"prompt": f"No. {n}?", "topic": "ab"[n % 2]} for n in range(5)]
    write_jsonl(tmp_path / "prompts.jsonl", rows)

    def say(body: dict[str, Any]) -> str:
        if "response_format" not in body:
            number = body["messages"][-1]["content"][4]
            return "" if number == "4" else f"answer {number}"
        material = json.loads(body["messages"][-1]["content"])
        number = int(material["response"][-1])
        return json.dumps({"segments": [{"clarity": number, "safety": 4 - number}]})

    with serving(say=say) as stub:
        config = EvalConfig(
            tasks=("aspects",),
            data_dir=str(tmp_path),
            out=str(tmp_path / "out"),
            endpoint=EndpointConfig(base_url=stub.url, model="m"),
            judge=JudgeConfig(base_url=stub.url, model="j", aspects=ASPECTS),
        )
        (report,) = evaluate(config)
    scores = {"clarity": [0, 1, 2, 3, 0], "safety": [4, 3, 2, 1, 0]}
    for aspect, values in scores.items():
        found = report.metrics[aspect]
        assert found["value"] == pytest.approx(statistics.fmean(values))
        error = statistics.stdev(values) / 5**0.5
        assert found["standard_error"] == pytest.approx(error) and found["n"] == 5
    assert report.metrics["topics"]["b"]["clarity"]["value"] == 2.0
