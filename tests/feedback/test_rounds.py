"""Rounds of RLAIF on a tiny checkpoint: their files, and that kills change nothing."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from jaxalign.cli.main import main
from jaxalign.data import records
from jaxalign.feedback import gate
from jaxalign.feedback.candidates import JudgedPrompt, from_lines
from jaxalign.feedback.decompose.decomposition import Judged
from jaxalign.judging.config import ASPECTS
from tests import synthetic
from tests.judging import stub_server
from tests.judging.test_reward_judge import write_reward


STAGES = (
    ".samples.jsonl.part",
    "samples.jsonl",
    "judged.jsonl",
    "pairs.jsonl",
    "run/checkpoints/2",
    ".adapter.part",
    "adapter",
    "gate.json",
)


@pytest.fixture(scope="module")
def setting(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a function that writes a config and returns its path."""
    folder = tmp_path_factory.mktemp("rlaif")
    words = ("river", "answer", "seven", "blue", "not")
    for name, count in (("train", 5), ("held", 3)):
        rows = [{"prompt": f"{name} the {words[n]} is: "} for n in range(count)]
        synthetic.write_jsonl(folder / f"{name}.jsonl", rows)

    def config(out: Path, **changes: Any) -> Path:
        values = {
            "model": str(tiny_llama),
            "prompts": str(folder / "train.jsonl"),
            "out": str(out),
            "rounds": 2,
            "generation": {"num_samples": 3, "max_new_tokens": 12, "batch_slots": 4},
            "judge": {"name": "local", "model": str(tiny_llama)},
            "pairing": {"min_gap": 0.0001, "max_pairs_per_prompt": 1},
            "adapter": {"name": "lora", "rank": 2},
            "optimizer": {"learning_rate": 0.01},
            "training": {
                "max_steps": 4,
                "batch_rows": 1,
                "row_length": 128,
                "save_steps": 2,
            },
            "gate": {"prompts": str(folder / "held.jsonl"), "min_improvement": 0.0},
            **changes,
        }
        path = folder / f"{out.name}.yaml"
        path.write_text(yaml.safe_dump(values))
        return path

    return config


def run(config: Path) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(["rlaif", "--config", str(config)])
    return int(stopped.value.code or 0)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def done(setting: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of a run that nobody disturbed."""
    out = tmp_path_factory.mktemp("runs") / "done"
    assert run(setting(out)) == 0
    return out


def test_a_run_has_the_files_that_people_look_for(done: Path) -> None:
    policy = "base"
    for number in (1, 2):
        here = done / f"round-{number}"
        samples = lines(here / "samples.jsonl")
        assert [line["index"] for line in samples] == list(range(5))
        assert all(len(line["completions"]) == 3 for line in samples)
        judged = from_lines(here / "judged.jsonl")
        assert [list(one.texts) for one in judged] == [
            [c["text"] for c in line["completions"]] for line in samples
        ]
        for one in judged:
            for text, verdict in zip(one.texts, one.judged, strict=True):
                if not text.strip():
                    assert verdict.failure is not None and verdict.score is None
                    continue
                cells = [s.scores["likelihood"] for s in verdict.segments]
                assert verdict.score == pytest.approx(np.mean(cells))
                assert all(0 < cell <= 4 for cell in cells)
        pairs = records.read(here / "pairs.jsonl")
        assert 1 <= len(pairs) <= 5
        scores = {
            (json.dumps(one.prompt), text): verdict.score
            for one in judged
            for text, verdict in zip(one.texts, one.judged, strict=True)
        }
        for row in lines(here / "pairs.jsonl"):
            best, worst = (
                scores[json.dumps(row["prompt"]), row[side]]
                for side in ("chosen", "rejected")
            )
            assert best - worst >= 0.0001
            mine = [
                np.mean(list(segment["scores"].values()))
                for segment in row["chosen_segments"]
            ]
            assert best == pytest.approx(np.mean(mine))
        decided = json.loads((here / "gate.json").read_text())
        assert decided["round"] == number and decided["from"] == policy
        assert decided["accepted"] == (decided["improvement"] > 0)
        before, after = (
            from_lines(done / "gate" / f"{name}_judged.jsonl")
            for name in (policy, f"round-{number}")
        )
        assert decided["prompts"] + decided["failed"] == len(before) == len(after) == 3
        assert (here / "adapter" / "adapter_model.safetensors").is_file()
        if decided["accepted"]:
            policy = f"round-{number}"
    page = (done / "report.html").read_text()
    assert page.startswith("<!doctype html>")
    export = done / "export" / "adapter_model.safetensors"
    assert export.is_file() == (policy != "base")
    if policy != "base":
        trained = done / policy / "adapter" / "adapter_model.safetensors"
        assert export.read_bytes() == trained.read_bytes()


def test_nothing_is_done_twice(done: Path, setting: Any) -> None:
    def state() -> dict[str, tuple[int, int]]:
        kept = [p for p in done.rglob("*") if p.is_file() and "store" not in p.name]
        return {
            str(p): (p.stat().st_mtime_ns, p.stat().st_size)
            for p in kept
            if p.name not in ("report.html", ".lock")
        }

    before = state()
    assert run(setting(done)) == 0
    assert state() == before


def test_the_second_round_goes_on_from_the_accepted_one(
    done: Path, tiny_llama: Path
) -> None:
    first = json.loads((done / "round-1" / "gate.json").read_text())
    config = yaml.safe_load((done / "round-2" / "run" / "config.yaml").read_text())
    if first["accepted"]:
        assert config["adapter"] == {
            "name": "peft",
            "path": str(done / "round-1" / "adapter"),
            "dropout": 0.0,
        }
    else:
        assert config["adapter"]["name"] == "lora"
    assert config["seed"] == 2 and config["model"] == str(tiny_llama)


def start(config: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.Popen(
        [sys.executable, "-m", "jaxalign.cli.main", "rlaif", "--config", str(config)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=environment,
        start_new_session=True,
    )


def test_kills_at_every_stage_change_nothing(
    done: Path, setting: Any, tmp_path: Path
) -> None:
    """kill -9 as soon as each stage's file is there, then the same command again."""
    out = tmp_path / "killed"
    config = setting(out)
    for stage in STAGES:
        process = start(config)
        target = out / "round-1" / stage
        limit = time.monotonic() + 240
        while not target.exists() and process.poll() is None:
            assert time.monotonic() < limit, f"no {stage}"
            time.sleep(0.005)
        # A stage may be over before it is seen: then its later file is there.
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        error = process.communicate()[1].decode()
        assert process.returncode in (0, -signal.SIGKILL), error[-2000:]
    process = start(config)
    error = process.communicate(timeout=400)[1].decode()
    assert process.returncode == 0, error[-2000:]
    for name in (
        *(f"round-{n}/samples.jsonl" for n in (1, 2)),
        *(f"round-{n}/judged.jsonl" for n in (1, 2)),
        *(f"round-{n}/pairs.jsonl" for n in (1, 2)),
        *(f"round-{n}/adapter/adapter_model.safetensors" for n in (1, 2)),
        *(f"round-{n}/gate.json" for n in (1, 2)),
    ):
        assert (out / name).read_bytes() == (done / name).read_bytes(), name


def test_a_run_is_not_gone_on_with_as_another(
    done: Path, setting: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    config = setting(done, pairing={"min_gap": 1.0})
    assert run(config) == 2
    assert "pairing.min_gap: 0.0001 there, 1.0 now" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda v: v["gate"].update(prompts=v["prompts"]), "5 of 5 prompts are also"),
        (lambda v: v["generation"].update(num_samples=1), "num_samples must be at"),
        (lambda v: v.update(adapter={"name": "none"}), "rlaif trains an adapter"),
        (lambda v: v.update(decomposer={"name": "claims"}), "write texts"),
        (lambda v: v.update(decomposer={"name": "hops"}), "scores whole responses"),
        (lambda v: v.update(judge={"name": "rules"}), "only decomposer.name hops"),
        (lambda v: v.update(round=3), "unknown option round"),
        (lambda v: v["judge"].update(model="nowhere"), "nowhere"),
        (lambda v: v.update(objective={"name": "tis_dpo"}), "token weights"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_made(
    setting: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[Any], None],
    message: str,
) -> None:
    out = tmp_path / "wrong"
    config = setting(out)
    values = yaml.safe_load(config.read_text())
    change(values)
    config.write_text(yaml.safe_dump(values))
    assert run(config) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert not (out / "round-1" / "samples.jsonl").exists()
    shutil.rmtree(out, ignore_errors=True)


def test_a_round_without_pairs_is_rejected(setting: Any, tmp_path: Path) -> None:
    out = tmp_path / "apart"
    assert run(setting(out, rounds=1, pairing={"min_gap": 3.99})) == 0
    decided = json.loads((out / "round-1" / "gate.json").read_text())
    assert decided["accepted"] is False and decided["improvement"] is None
    assert "no pair" in decided["reason"]
    assert not (out / "round-1" / "run").exists() and not (out / "export").exists()
    assert "no pair" in (out / "report.html").read_text()


def test_an_endpoint_judges_and_what_it_fails_is_in_no_pair(
    setting: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores by the text, every fifth response refused; two votes, five aspects."""

    def varied(schema: Any) -> Any:
        count = schema["properties"]["segments"]["minItems"]
        names = list(schema["properties"]["segments"]["items"]["properties"])
        chance = random.Random(len(asked))
        return {
            "segments": [
                {name: chance.randrange(5) for name in names} for _ in range(count)
            ]
        }

    asked: list[str] = []

    def behave(question: str, before: int, body: Any) -> str:
        asked.append(question)
        if zlib.crc32(question.encode()) % 5 == 0:
            return "refusal"
        return "503" if before == 0 and len(asked) % 7 == 0 else "ok"

    monkeypatch.setenv("OPENAI_API_KEY", "sk-test-of-rounds")
    monkeypatch.setattr(stub_server, "fitting", varied)
    out = tmp_path / "endpoint"
    with stub_server.serving(behave) as stub:
        judge = {"name": "openai", "model": "m", "base_url": stub.url, "votes": 2}
        config = setting(out, rounds=1, judge={**judge, "concurrency": 4})
        assert run(config) == 0
        calls = stub.total
        assert run(config) == 0
        assert stub.total == calls
    found = from_lines(out / "round-1" / "judged.jsonl")
    failed = {
        text
        for one in found
        for text, verdict in zip(one.texts, one.judged, strict=True)
        if verdict.failure is not None
    }
    assert any("refus" in str(v.failure) for one in found for v in one.judged)
    rows = lines(out / "round-1" / "pairs.jsonl")
    assert rows
    for row in rows:
        assert not failed & {row["chosen"], row["rejected"]}
        assert row["chosen_score"] - row["rejected_score"] >= 0.0001
        for segment in row["chosen_segments"] + row["rejected_segments"]:
            assert set(segment["scores"]) == set(ASPECTS)
    for path in out.rglob("*"):
        assert not path.is_file() or b"sk-test-of-rounds" not in path.read_bytes()


def judged(*prompts: list[float | None]) -> list[JudgedPrompt]:
    from jaxalign.feedback.decompose.decomposition import Failure

    lost = Failure("judge", "no reply")
    return [
        JudgedPrompt(
            "p",
            tuple("t" for _ in scores),
            tuple(
                Judged(None, failure=lost) if score is None else Judged(score)
                for score in scores
            ),
        )
        for scores in prompts
    ]


def test_the_gate_compares_prompt_by_prompt() -> None:
    # Means before: 2, 1; after: 3, 1.5 (one failed sample left out); gains 1 and 0.5.
    found = gate.decide(
        judged([1.0, 3.0], [1.0], [None], [2.0]),
        judged([3.0], [1.5, None], [4.0], [None]),
        min_improvement=0.75,
    )
    assert found.accepted and found.improvement == 0.75
    assert (found.before, found.after) == (1.5, 2.25)
    # The standard deviation of 1 and 0.5 is 0.25 sqrt(2); over sqrt(2).
    assert found.standard_error == pytest.approx(0.25)
    assert (found.prompts, found.failed) == (2, 2)
    worse = gate.decide(judged([2.0]), judged([2.0]))
    assert not worse.accepted and worse.improvement == 0.0
    nothing = gate.decide(judged([None]), judged([1.0]))
    assert not nothing.accepted and nothing.improvement is None


@pytest.mark.parametrize(
    ("least", "change", "accepted", "reason"),
    [
        (-0.5, -0.25, True, "within gate.min_improvement"),
        (-0.5, -0.5, True, "within gate.min_improvement"),
        (-0.5, 0.0, True, "within gate.min_improvement"),
        (-0.5, 0.25, True, "the policy improved"),
        (-0.5, -0.75, False, "worse than gate.min_improvement allows"),
        (0.0, 0.0, False, "did not improve enough"),
        (0.0, 0.25, True, "the policy improved"),
    ],
)
def test_a_gate_below_zero_is_a_tolerance(least, change, accepted, reason) -> None:
    found = gate.decide(judged([2.0]), judged([2.0 + change]), min_improvement=least)
    assert found.accepted == accepted and found.improvement == change
    assert reason in found.reason and found.min_improvement == least


def test_a_judge_of_whom_nothing_can_be_read_stops_the_run(
    setting: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The same run goes on when the endpoint is asked in another form."""
    monkeypatch.setenv("OTHER_KEY", "sk-other-of-rounds")

    def behave(_: str, __: int, body: Any) -> str:
        return "prose" if "response_format" in body else "ok"

    with stub_server.serving(behave) as stub:
        judge = {"name": "openai", "model": "m", "base_url": stub.url, "votes": 2}
        judge |= {"max_attempts": 2, "key_variable": "OTHER_KEY"}
        # All scores are equal: there is nothing to train on.
        options = {"rounds": 1, "generation": {"num_samples": 5, "max_new_tokens": 12}}
        out = tmp_path / "stopped"
        assert run(setting(out, judge=judge, **options)) == 2
        said = capsys.readouterr().err
        assert "none of the first 20 requests" in said and "sk-other" not in said
        assert not (out / "round-1" / "judged.jsonl").exists()
        sampled = (out / "round-1" / "samples.jsonl").read_bytes()
        mended = {**judge, "response_format": "json_object"}
        assert run(setting(out, judge=mended, **options)) == 2
        mended = {**judge, "response_format": "none"}
        assert run(setting(out, judge=mended, **options)) == 0
    assert (out / "round-1" / "samples.jsonl").read_bytes() == sampled
    judged = from_lines(out / "round-1" / "judged.jsonl")
    assert all(
        verdict.failure is None or not text.strip()
        for one in judged
        for text, verdict in zip(one.texts, one.judged, strict=True)
    )
    for path in out.rglob("*"):
        assert not path.is_file() or b"sk-other-of-rounds" not in path.read_bytes()


def test_a_run_from_before_risks_were_graded_counts_them(
    setting: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "older"
    options = {
        "judge": {"name": "python", "path": str(tmp_path / "mine.py")},
        "objective": {"name": "sigmoid"},
        "pairing": {"min_gap": 0.5},
        "rounds": 1,
    }
    (tmp_path / "mine.py").write_text("def judge(requests):\n    return [None]\n")
    counted = setting(out, decomposer={"name": "risks", "score": "count"}, **options)
    assert run(counted) == 0  # every reply failed, so that nothing is trained on
    kept = yaml.safe_load((out / "rlaif.yaml").read_text())
    assert kept["decomposer"] == {
        "name": "risks",
        "score": "count",
        "global_weight": None,
    }
    (out / "rlaif.yaml").write_text(
        yaml.safe_dump({**kept, "decomposer": {"name": "risks"}})
    )
    capsys.readouterr()
    graded = setting(out, decomposer={"name": "risks"}, **options)
    assert run(graded) == 2
    assert "decomposer.score: 'count' there, 'graded' now" in capsys.readouterr().err
    counted = setting(out, decomposer={"name": "risks", "score": "count"}, **options)
    assert run(counted) == 0


def test_a_function_of_ones_own_judges_the_rounds(setting: Any, tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "def judge(requests):\n"
        "    return [\n"
        "        {'segments': [{'vowels': sum(map(s['text'].count, 'aeiou')) % 5}\n"
        "                      for s in r['segments']]} for r in requests]\n"
    )
    out = tmp_path / "own"
    judge = {"name": "python", "path": str(path), "aspects": ["vowels"]}
    # With so wide a gap there is nothing to train on.
    assert run(setting(out, judge=judge, rounds=1, pairing={"min_gap": 4.5})) == 0
    for one in from_lines(out / "round-1" / "judged.jsonl"):
        for text, verdict in zip(one.texts, one.judged, strict=True):
            for segment in verdict.segments:
                mine = text[segment.start : segment.end]
                count = sum(map(mine.count, "aeiou"))
                assert segment.scores == {"vowels": count % 5}
    config = setting(out, judge=judge, gate={"prompts": "x", "judge_model": "m"})
    assert run(config) == 2


def test_a_reward_model_judges_the_rounds(setting: Any, tmp_path: Path) -> None:
    model = write_reward(tmp_path, "llama")
    out = tmp_path / "run"
    judge = {"name": "reward", "model": str(model)}
    assert run(setting(out, judge=judge, rounds=1, pairing={"min_gap": 1e6})) == 0
    found = [
        segment.scores["reward"]
        for one in from_lines(out / "round-1" / "judged.jsonl")
        for verdict in one.judged
        for segment in verdict.segments
    ]
    assert found and min(found) < 0 < max(found)  # on no scale
    page = (out / "report.html").read_text()
    assert page.startswith("<!doctype html>") and f"reward {model}" in page
    hops = setting(
        tmp_path / "hops",
        judge=judge,
        decomposer={"name": "hops"},
        objective={"name": "sigmoid"},
    )
    assert run(hops) == 2
