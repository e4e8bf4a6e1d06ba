"""A function as the judge, from Python, also inside a running event loop."""

import asyncio
import inspect
import json
import os
import shutil
import signal
import threading
from pathlib import Path
from typing import Any

import jax
import pytest

from jaxalign import event_loops
from jaxalign.errors import UserError
from jaxalign.feedback import candidates, pairing
from jaxalign.feedback.config import (
    GateConfig,
    GenerationOptions,
    RLAIFConfig,
    TrainingOptions,
)
from jaxalign.feedback.decompose import segments
from jaxalign.feedback.judge_file import JudgeFileConfig, judge_file
from jaxalign.feedback.judge_records import judge_records, judge_records_async
from jaxalign.feedback.rounds import rlaif
from jaxalign.feedback.segmenters import SegmenterConfig
from jaxalign.judging.config import JudgeConfig
from jaxalign.judging.make import as_judge
from jaxalign.judging.store import Store
from jaxalign.objectives import policy
from jaxalign.objectives.pairwise import PairwiseConfig
from jaxalign.training import metrics
from tests import synthetic


ASPECTS = ("short",)
CONFIG = JudgeConfig(name="python", aspects=ASPECTS)
ROW = {
    "prompt": "Sky?",
    "chosen": "Blue. Up.",
    "rejected": "Sea.",
    "chosen_segments": [{"start": 0, "end": 5}, {"start": 5, "end": 9}],
    "rejected_segments": [{"start": 0, "end": 4}],
}


def value_of(request: dict[str, Any]) -> dict[str, Any]:
    return {
        "segments": [
            {"short": max(0.0, 4 - len(s["text"]) / 20)} for s in request["segments"]
        ]
    }


def judge(requests: list[dict[str, Any]]) -> list[Any]:
    return [value_of(request) for request in requests]


async def judge_async(requests: list[dict[str, Any]]) -> list[Any]:
    await asyncio.sleep(0)
    return judge(requests)


def in_a_cell(function: Any) -> Any:
    """Call a function as a cell of a notebook does: while a loop runs."""

    async def cell() -> Any:
        return function()

    return asyncio.run(cell())


@pytest.mark.parametrize("own", [judge, judge_async])
@pytest.mark.parametrize("where", [in_a_cell, lambda call: call()])
def test_records_are_judged_by_a_function_in_a_cell_and_outside(own, where) -> None:
    (made,) = where(lambda: judge_records([ROW], own, aspects=ASPECTS))
    assert [s["scores"] for s in made["chosen_segments"]] == [
        {"short": 3.75},
        {"short": 3.8},
    ]
    assert made["rejected_segments"] == [
        {"start": 0, "end": 4, "scores": {"short": 3.8}}
    ]
    assert ROW["rejected_segments"] == [{"start": 0, "end": 4}]  # left as it was


def test_what_is_a_coroutine_is_awaited_and_named_so() -> None:
    async def cell() -> Any:
        return await judge_records_async([ROW], judge, aspects=ASPECTS)

    assert asyncio.run(cell()) == judge_records([ROW], judge, aspects=ASPECTS)


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (lambda r: {"segments": [{"short": 99}] * len(r["segments"])}, "99|maximum|4"),
        (lambda r: {"segments": [{"short": 1}] * (len(r["segments"]) + 1)}, "segments"),
        (lambda r: {"segments": [{"short": float("nan")}]}, "not JSON"),
        (lambda r: {"segments": []}, "segments"),
    ],
)
def test_a_wrong_reply_is_a_failed_attempt_and_is_counted(wrong, reason) -> None:
    calls: list[int] = []

    def own(requests: list[dict[str, Any]]) -> list[Any]:
        calls.append(len(requests))
        return [wrong(r) if r["response"] == "Sea." else value_of(r) for r in requests]

    (made,) = judge_records([ROW], own, aspects=ASPECTS)
    (failure,) = made["judge_failures"]
    assert failure["response"] == "rejected"
    assert "outside the schema" in failure["reason"]
    assert any(word in failure["reason"] for word in reason.split("|"))
    assert "scores" not in made["rejected_segments"][0]
    assert "scores" in made["chosen_segments"][0]
    assert calls == [2, 1, 1, 1, 1, 1]  # six attempts, the later ones by itself


def test_one_reply_too_few_is_no_error_of_zip() -> None:
    (made,) = judge_records([ROW], lambda r: judge(r)[:-1], aspects=ASPECTS)
    reasons = {failure["reason"] for failure in made["judge_failures"]}
    assert any("expected a list of 2 replies, got list of 1" in r for r in reasons) or (
        any("expected a list of 1 replies, got list of 0" in r for r in reasons)
    )


def test_what_is_no_judge_is_refused() -> None:
    untyped: Any = inspect.unwrap(as_judge)  # as where no types are checked
    with pytest.raises(UserError, match="judge: got 'gpt'; expected a function"):
        untyped("gpt")
    with pytest.raises(UserError, match="judge.path must be a Python file.*FUNCTION"):
        judge_file(JudgeFileConfig(data="x.jsonl", out="y.jsonl", judge=CONFIG), None)


@pytest.mark.parametrize("where", [in_a_cell, lambda call: call()])
def test_a_file_is_judged_by_a_function(tmp_path: Path, where) -> None:
    synthetic.write_jsonl(tmp_path / "in.jsonl", [ROW, {**ROW, "prompt": "Sea?"}])
    config = JudgeFileConfig(
        data=str(tmp_path / "in.jsonl"), out=str(tmp_path / "out.jsonl"), judge=CONFIG
    )
    report = where(lambda: judge_file(config, judge))
    assert (report.responses, report.failed, report.asked) == (4, 0, 4)
    lines = (tmp_path / "out.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines][:1] == judge_records(
        [ROW], judge, aspects=ASPECTS
    )
    again = where(lambda: judge_file(config, judge))
    assert again.asked == 0  # the same function is known by the text of its code


def test_another_function_is_another_judge(tmp_path: Path) -> None:
    def own(requests: list[dict[str, Any]]) -> list[Any]:
        return [
            {"segments": [{"short": 1}] * len(request["segments"])}
            for request in requests
        ]

    with Store(tmp_path / "store.db") as store:
        one = judge_records([ROW], judge, aspects=ASPECTS, store=store)
        other = judge_records([ROW], own, aspects=ASPECTS, store=store)
    assert one != other
    assert other[0]["rejected_segments"][0]["scores"] == {"short": 1}


def test_samples_become_pairs_in_a_cell() -> None:
    rows = [
        {
            "index": 0,
            "prompt": "Sky?",
            "completions": [{"text": "Blue."}, {"text": "It is quite long and blue."}],
        }
    ]
    found = candidates.parse_samples(rows, SegmenterConfig())
    decompose = segments.decomposer(ASPECTS, needs_rubrics=False)
    judged = in_a_cell(lambda: candidates.judge_candidates(found, decompose, judge))
    (record,), _ = pairing.pair(
        candidates.scored(judged), pairing.PairingConfig(min_gap=0.5)
    )
    assert record["chosen"] == "Blue."
    assert record["chosen_segments"] == [
        {"start": 0, "end": 5, "scores": {"short": 3.75}}
    ]


def test_a_failure_in_a_cell_comes_out_as_it_is() -> None:
    async def wrong() -> None:
        raise UserError("the very error")

    with pytest.raises(UserError, match="the very error"):
        in_a_cell(lambda: event_loops.run(wrong()))


def test_ctrl_c_in_a_cell_cancels_the_coroutine() -> None:
    ended: list[str] = []

    async def long() -> None:
        threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGUSR1)).start()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            ended.append("cancelled")
            raise

    def interrupt(*_: object) -> None:  # what SIGINT does outside asyncio.run
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGUSR1, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            in_a_cell(lambda: event_loops.run(long()))
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert ended == ["cancelled"]
    assert not [t for t in threading.enumerate() if t.name.startswith("event-loop")]


def test_rounds_take_a_judge_and_a_decomposer_as_objects(tiny_llama, tmp_path) -> None:
    for name, words in (("prompts", ("sky", "sea")), ("held", ("sun",))):
        rows = [{"prompt": f"Tell of the {word}."} for word in words]
        synthetic.write_jsonl(tmp_path / f"{name}.jsonl", rows)
    config = RLAIFConfig(
        model=str(tiny_llama),
        prompts=str(tmp_path / "prompts.jsonl"),
        out=str(tmp_path / "out"),
        judge=CONFIG,
        gate=GateConfig(prompts=str(tmp_path / "held.jsonl"), min_improvement=-9.0),
        rounds=1,
        objective=PairwiseConfig(name="sigmoid"),
        pairing=pairing.PairingConfig(min_gap=0.0),
        generation=GenerationOptions(num_samples=3, max_new_tokens=6, batch_slots=6),
        training=TrainingOptions(max_steps=1, batch_rows=1, row_length=128),
    )
    seen: list[str] = []
    plain = segments.decomposer(ASPECTS, needs_rubrics=False)

    def decomposer(candidate, so_far):
        seen.append(candidate.response)
        return plain(candidate, so_far)

    traced: list[str] = []

    def hinge(tokens, batch):
        traced.append("hinge")
        ratio = policy.pair_logps(tokens, batch).logratios
        return jax.nn.relu(1 - 0.1 * (ratio[..., 0] - ratio[..., 1]))

    objects = {"judge": judge, "decomposer": decomposer, "objective": hinge}
    out = in_a_cell(lambda: rlaif(config, **objects))
    losses = metrics.read(out / "round-1/run/metrics.jsonl")
    # Where policy and reference are one it is 1; that of the config would be ln 2.
    assert traced and losses[1]["loss"] == pytest.approx(1.0)
    for kept in ("rlaif.yaml", "round-1/run/config.yaml"):
        assert "hinge" in (out / kept).read_text()
    assert (out / "export/adapter_model.safetensors").is_file()
    assert seen and (out / "round-1" / "judged.jsonl").is_file()
    rows = list(
        map(json.loads, (out / "round-1/judged.jsonl").read_text().splitlines())
    )
    scores = [c["score"] for row in rows for c in row["candidates"] if c["segments"]]
    assert scores and all(0 <= score <= 4 for score in scores)
    with pytest.raises(UserError, match="the judge has changed"):
        rlaif(config, **{**objects, "judge": lambda requests: [None]})
    with pytest.raises(UserError, match="objective.name: .*hinge.* there, 'sigmoid'"):
        rlaif(config, judge=judge, decomposer=decomposer)
    with pytest.raises(UserError, match="objective.code"):
        rlaif(config, **{**objects, "objective": lambda t, b: 0 * hinge(t, b)})
    # Killed before its adapter was there, the round goes on with what is saved.
    shutil.rmtree(out / "round-1/adapter")
    (out / "round-1/gate.json").unlink()
    before = len(traced)
    rlaif(config, **objects)
    assert (out / "round-1/gate.json").is_file() and len(traced) == before
