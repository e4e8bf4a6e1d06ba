"""The three boards through the whole harness: a stub answers, and a stub grades."""

import json
import math
from collections.abc import AsyncIterator, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

from jaxalign.evaluation.config import EvalConfig
from jaxalign.evaluation.harness import evaluate
from jaxalign.judging.judge import JudgeRequest, Verdict


class Stub:
    """Answers, or judges: what ``reply`` says to each request."""

    def __init__(self, name: str, reply: Any):
        self.name, self.reply = name, reply
        self.asked: list[JudgeRequest] = []

    @property
    def settings(self) -> Mapping[str, Any]:
        return {"stub": self.name}

    async def grade(
        self, requests: Iterable[JudgeRequest]
    ) -> AsyncIterator[tuple[int, Verdict]]:
        for number, request in enumerate(requests):
            self.asked.append(request)
            value = self.reply(request)
            if value is None:
                yield number, Verdict(None, "failed", raw="?")
            else:
                yield number, Verdict(value, raw=json.dumps(value))


def answered(request: JudgeRequest) -> dict[str, Any]:
    said = " / ".join(str(m["content"]) for m in request.messages)
    return {"text": f"mine to {said}", "finish_reason": "stop", "top_logprobs": None}


def material(request: JudgeRequest) -> dict[str, Any]:
    text = request.messages[1]["content"]
    return json.loads(text[: text.rindex("}") + 1])


def judged(request: JudgeRequest) -> dict[str, Any] | None:
    shown = material(request)
    if "turns" in shown:  # the second turn is better; of question 2 it fails
        if len(shown["turns"]) == 2:
            return None if "Q2" in shown["turns"][0]["question"] else {"grade": "9"}
        return {"grade": "5"}
    mine = "A" if "mine" in str(shown["A"]) else "B"
    if "instruction" in shown:  # the judge likes the first place a little
        chance = 0.7 if mine == "A" else 0.5
        rest = "B" if mine == "A" else "A"
        ranked = [[mine, math.log(chance)], [rest, math.log(1 - chance)]]
        return {"text": mine, "finish_reason": "length", "top_logprobs": ranked}
    return {"grade": "A>>B" if mine == "A" else "A=B"}


def lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    lines(
        folder / "mt_bench" / "question.jsonl",
        [
            {"question_id": n, "category": "stem", "turns": [f"Q{n}", "More."]}
            for n in (1, 2)
        ],
    )
    uids = [f"u{n}" for n in range(4)]
    lines(
        folder / "arena_hard" / "v0.1_question.jsonl",
        [
            {"uid": uid, "category": "arena-hard-v0.1", "prompt": f"P {uid}"}
            for uid in uids
        ],
    )
    lines(
        folder / "arena_hard" / "v0.1_gpt-4-0314.jsonl",
        [{"uid": u, "messages": [{"content": {"answer": "base"}}]} for u in uids],
    )
    rows = [{"instruction": f"I {n}", "output": "base"} for n in range(8)]
    path = folder / "alpaca_eval" / "alpaca_eval_gpt4_baseline.json"
    path.parent.mkdir()
    path.write_text(json.dumps(rows))
    return folder


def test_three_boards(data: Path, tmp_path: Path) -> None:
    config = EvalConfig(
        tasks=("mt_bench", "arena_hard", "alpaca_eval"),
        out=str(tmp_path / "out"),
        data_dir=str(data),
        model="stub",
    )
    model, judge = Stub("model", answered), Stub("judge", judged)
    reports = {
        one.name: one.metrics for one in evaluate(config, model=model, judge=judge)
    }

    found = reports["mt_bench"]
    assert found["turn_1"]["value"] == 5.0 and found["turn_2"]["value"] == 9.0
    assert found["score"]["value"] == pytest.approx(19 / 3)
    assert found["judge_failed"] == 1
    second = [r for r in model.asked if r.messages[-1]["content"] == "More."]
    assert second[0].messages[1]["content"] == "mine to Q1"

    found = reports["arena_hard"]
    # A tie of weight 1 as B, a clear win of weight 3 as A.
    assert found["score"]["value"] == pytest.approx(3.5 / 4)
    assert found["score"]["n"] == 4 and found["battles"] == 16
    assert found["by_order"]["difference"]["value"] == 0.5

    found = reports["alpaca_eval"]
    assert found["win_rate"]["value"] == pytest.approx(0.6)
    assert found["kind"] == "weighted" and found["wins"] == 8
    assert found["by_order"]["difference"]["value"] == pytest.approx(0.2)
    assert found["length_controlled_win_rate"]["official"] is False

    # The same from the grades alone; and nothing is asked twice.
    asked = len(judge.asked)
    again = evaluate(config, model=model, judge=judge)
    assert [one.metrics for one in again][1:] == [
        reports["arena_hard"] | {"settings": again[1].metrics["settings"]},
        reports["alpaca_eval"] | {"settings": again[2].metrics["settings"]},
    ]
    assert len(judge.asked) == asked + 1  # what failed
    for name in reports:
        given = EvalConfig(
            tasks=(name,),
            out=str(tmp_path / f"grades_{name}"),
            data_dir=str(data),
            grades=str(tmp_path / "out" / name / "grades.jsonl"),
        )
        [report] = evaluate(given)
        for figure in ("score", "win_rate", "by_order", "turn_2"):
            assert report.metrics.get(figure) == reports[name].get(figure)
