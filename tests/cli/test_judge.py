"""jaxalign judge and jaxalign store, as commands."""

import hashlib
import json
import os
import re
import signal
import sqlite3
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from jaxalign.cli.main import main
from jaxalign.judging.store import Store
from tests import synthetic
from tests.judging import stops
from tests.judging.stub_server import FAILURES, OUTSIDE, Stub, content, serving


KEY = "sk-test-51d2e84b609f3a7c"
ASPECTS = {"helpfulness", "correctness", "safety", "completeness", "clarity"}
CONCURRENCY = 8


def pair(n: int, **more: Any) -> dict[str, Any]:
    texts = {side: f"One {side}. Two {n}." for side in ("chosen", "rejected")}
    return {"id": n, "prompt": f"Question {n}?", **texts, **segments(texts), **more}


def segments(texts: dict[str, str]) -> dict[str, Any]:
    return {
        f"{side}_segments": [
            {"start": 0, "end": text.index(".") + 1},
            {"start": text.index(".") + 2, "end": len(text)},
        ]
        for side, text in texts.items()
    }


def single(n: int) -> dict[str, Any]:
    text = {"completion": f"One. Two {n}."}
    prompt = [{"role": "user", "content": f"Question {n}?"}]
    return {"prompt": prompt, **text, "label": True, **segments(text)}


@pytest.fixture
def key(monkeypatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def options(data: Path, stub: Stub | None, **more: Any) -> list[str]:
    flags = {
        "data": data,
        "out": data.with_name("judged.jsonl"),
        "store": data.with_name("store.db"),
        "judge.name": "openai",
        "judge.model": "m",
        "judge.base_url": stub and stub.url,
        "judge.concurrency": CONCURRENCY,
        "judge.timeout": 10,
        **more,
    }
    return [f"--{name}={value}" for name, value in flags.items() if value is not None]


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    assert isinstance(stopped.value.code, int)
    return stopped.value.code


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def asked_about(question: str) -> tuple[str, str]:
    material = json.loads(json.loads(question)[1]["content"])
    return material["prompt"], material["response"]


def judged_in(store: Path) -> set[tuple[str, str]]:
    connection = sqlite3.connect(store)
    rows = connection.execute(
        "SELECT prompt, response FROM verdicts JOIN requests USING (key) "
        "JOIN samples ON id = sample WHERE state = 'judged'"
    ).fetchall()
    connection.close()
    return {(json.loads(prompt), response) for prompt, response in rows}


HOPELESS = {("Question 3?", "One chosen. Two 3."): "prose"}
HOPELESS |= {("Question 5?", "One rejected. Two 5."): "out of range"}
HOPELESS |= {("Question 5?", "One chosen. Two 5."): "500"}


def behave(question: str, before: int, _: Any) -> str:
    """Fail three calls in ten, in every way, never four times in a row; some always."""
    if (hopeless := HOPELESS.get(asked_about(question))) is not None:
        return hopeless
    number = int(hashlib.sha256(f"{question}{before}".encode()).hexdigest(), 16)
    if number % 10 >= 3 or before % 4 == 3:
        return "ok"
    return FAILURES[number // 10 % len(FAILURES)]


def test_two_kills_and_a_full_disk_lose_nothing(tmp_path, key) -> None:
    """30 % of the calls fail, in all the ways there are."""
    records = [pair(n) for n in range(80)]
    data = synthetic.write_jsonl(tmp_path / "in.jsonl", records)
    store, out = tmp_path / "store.db", tmp_path / "judged.jsonl"
    printed: list[str] = []
    done: dict[tuple[str, str], int] = {}
    ends: list[float] = []

    def command(limit: int | None = None) -> subprocess.Popen[str]:
        flags = options(data, stub, **{"judge.timeout": 1})
        return stops.start("judge", *flags, file_bytes=limit)

    def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
        texts = process.communicate(timeout=300)
        ends.append(time.time())
        printed.extend(texts)
        return process.returncode, *texts

    def calls() -> dict[tuple[str, str], int]:
        return {asked_about(q): len(seen) for q, seen in list(stub.calls.items())}

    def check_what_is_done() -> None:
        """Nothing that was judged before has been asked since; note what is now."""
        now = calls()
        assert {one: now[one] for one in done} == done
        done.update({one: now[one] for one in judged_in(store)})

    with serving(behave, latency=0.01) as stub:
        for enough in (20, 60):
            process = command()
            deadline = time.monotonic() + 120
            while sum(stub.answered.values()) < enough:
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.002)
            process.send_signal(signal.SIGKILL)
            code, *_ = ended(process)
            assert code == -signal.SIGKILL and not out.exists()
            check_what_is_done()
            assert len(done) >= enough - 4 * CONCURRENCY
        code, _, said = ended(command(limit=60_000))
        assert code == 2 and "store.db" in said and "Make room" in said, said
        assert not out.exists()
        check_what_is_done()
        code, said, errors = ended(command())
        assert code == 0, errors
        check_what_is_done()
        assert len(done) == 160 - len(HOPELESS)
        # What was answered twice was on its way, or not yet written, at a stop.
        assert sum(stub.answered.values()) - len(done) <= 3 * 2 * CONCURRENCY
        assert {call.behaviour for seen in stub.calls.values() for call in seen} == {
            "ok",
            *FAILURES,
        }
        assert min(calls()[one] for one in HOPELESS) >= 4
        for question, seen in stub.calls.items():
            for call in seen:
                assert json.dumps(call.body["messages"][:2]) == question
            for call, following in zip(seen, seen[1:], strict=False):
                # A new process does not know what the last one was told to wait.
                stopped = any(call.instant < t < following.instant for t in ends)
                if call.behaviour == "429 after" and not stopped:
                    assert following.instant - call.instant >= 0.99
    assert re.findall(r"\d+", said.splitlines()[-1]) == ["3"]
    found = lines(out)
    assert [line["id"] for line in found] == list(range(80))
    for record, line in zip(records, found, strict=True):
        failed = {f["response"]: f for f in line.pop("judge_failures", [])}
        for side in ("chosen", "rejected"):
            about = (record["prompt"], record[side])
            assert (side in failed) == (about in HOPELESS)
            for segment in line[f"{side}_segments"]:
                scores = segment.pop("scores", {})
                assert set(scores) == (set() if side in failed else ASPECTS)
                assert set(scores.values()) <= {3}
            if side in failed:
                assert set(failed[side]) == {"response", "reason", "raw"}
                assert failed[side]["reason"]
                assert (failed[side]["raw"] is None) == (HOPELESS[about] == "500")
        assert line == record
    for path in tmp_path.rglob("*"):
        assert KEY.encode() not in path.read_bytes(), path
    assert KEY not in "".join(printed)
    assert "Traceback" not in "".join(printed)


def test_a_raw_reply_is_kept_to_the_letter(tmp_path, key, capsys) -> None:
    data = synthetic.write_jsonl(tmp_path / "in.jsonl", [pair(0), single(1)])
    for behaviour in (b for b in OUTSIDE if b != "prose"):
        with serving(lambda *_, told=behaviour: told) as stub:
            assert run("judge", *options(data, stub)) == 0
            assert all(len(calls) >= 4 for calls in stub.calls.values())
            (call, *_), *_ = stub.calls.values()
        schema = call.body["response_format"]["json_schema"]["schema"]
        found = lines(tmp_path / "judged.jsonl")
        failures = [f for line in found for f in line["judge_failures"]]
        assert [f["response"] for f in failures] == ["chosen", "rejected", "completion"]
        assert {f["raw"] for f in failures} == {content(behaviour, schema)}
        assert capsys.readouterr().out.splitlines()[-1] == "3 failed responses"
    # They are asked again, and this time it goes well.
    with serving() as stub:
        assert run("judge", *options(data, stub)) == 0
        assert stub.total == 3
    assert "judge_failures" not in (tmp_path / "judged.jsonl").read_text()
    assert capsys.readouterr().out.splitlines()[-1] == "0 failed responses"


def test_a_second_run_asks_nothing_wherever_the_model_is_served(tmp_path, key) -> None:
    equal = [pair(0), pair(1), pair(0), single(2)]
    data = synthetic.write_jsonl(tmp_path / "in.jsonl", equal)
    with serving() as stub:
        assert run("judge", *options(data, stub)) == 0
        assert stub.total == 5 and stub.most_at_once <= CONCURRENCY
    first = (tmp_path / "judged.jsonl").read_bytes()
    again = tmp_path / "again.jsonl"
    with serving() as stub:
        assert run("judge", *options(data, stub, out=again)) == 0
        assert stub.total == 0
        assert run("judge", *options(data, stub, **{"judge.model": "other"})) == 0
        assert stub.total == 5
    assert again.read_bytes() == first


def test_scores_that_were_there_are_replaced_and_columns_stay(tmp_path, key) -> None:
    record = pair(0, extra={"a": [1, None]}, judge_failures=[{"response": "chosen"}])
    record["chosen_segments"][0]["scores"] = {"wit": 1.5}
    record["rejected_segments"] = []
    data = synthetic.write_jsonl(tmp_path / "in.jsonl", [record])
    with serving() as stub:
        assert run("judge", *options(data, stub)) == 0
        assert stub.total == 1
    (line,) = lines(tmp_path / "judged.jsonl")
    assert set(line["chosen_segments"][0]["scores"]) == ASPECTS
    assert line["rejected_segments"] == [] and line["extra"] == record["extra"]
    assert "judge_failures" not in line


def test_votes_are_averaged_and_a_minority_may_fail(tmp_path, key, capsys) -> None:
    def vote(question: str, _: int, body: dict[str, Any]) -> str:
        one = "chosen" in asked_about(question)[1]
        return "prose" if body["seed"] < (1 if one else 2) else "ok"

    data = synthetic.write_jsonl(tmp_path / "in.jsonl", [pair(0)])
    more = {"judge.votes": 3, "judge.temperature": 0.5, "judge.aspects": '["clarity"]'}
    with serving(vote) as stub:
        assert run("judge", *options(data, stub, **more)) == 0
    (line,) = lines(tmp_path / "judged.jsonl")
    assert [s["scores"] for s in line["chosen_segments"]] == [{"clarity": 3.0}] * 2
    assert all("scores" not in s for s in line["rejected_segments"])
    (failure,) = line["judge_failures"]
    assert failure["response"] == "rejected"
    assert failure["reason"].startswith("1 of 3 votes; outside the schema: ")
    said = capsys.readouterr().out
    assert "agreement of votes: 1.000 of pairs equal" in said
    assert said.splitlines()[-1] == "1 failed responses"


def test_a_budget_stops_and_the_next_run_goes_on(tmp_path, key, capsys) -> None:
    data = synthetic.write_jsonl(tmp_path / "in.jsonl", [pair(n) for n in range(10)])
    with serving() as stub:
        code = run("judge", *options(data, stub, **{"judge.max_requests": 7}))
        assert code == 2 and stub.total == 7
        assert "judge.max_requests is 7" in capsys.readouterr().err
        assert not (tmp_path / "judged.jsonl").exists()
        assert run("judge", *options(data, stub)) == 0
        assert stub.total == 20
    assert len(lines(tmp_path / "judged.jsonl")) == 10


def test_an_output_that_does_not_fit_is_not_there(tmp_path, key) -> None:
    rows = [pair(n, pad="x" * 5000) for n in range(30)]
    data = synthetic.write_jsonl(tmp_path / "in.jsonl", rows)
    with serving() as stub:
        assert run("judge", *options(data, stub)) == 0
        other = tmp_path / "other.jsonl"
        flags = options(data, stub, out=other)
        ended = subprocess.run(
            stops.program("judge", *flags, file_bytes=100_000),
            capture_output=True,
            text=True,
        )
        assert stub.total == 60
    assert ended.returncode == 2 and "other.jsonl cannot be written" in ended.stderr
    assert "all judgements are in the store" in ended.stderr
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"in.jsonl", "judged.jsonl", "store.db"}


def test_the_rules_judge_by_command(tmp_path, capsys) -> None:
    record = pair(0, references=["One chosen"])
    data = synthetic.write_jsonl(tmp_path / "in.jsonl", [record, pair(1)])
    flags = [f"--data={data}", f"--out={tmp_path / 'o.jsonl'}", "--judge.name=rules"]
    assert run("judge", *flags, '--judge.aspects=["correctness"]') == 0
    first, second = lines(tmp_path / "o.jsonl")
    scores = [s["scores"]["correctness"] for s in first["chosen_segments"]]
    assert scores == [4, 0]
    assert len(second["judge_failures"]) == 2
    assert capsys.readouterr().out.splitlines()[-1] == "2 failed responses"
    assert (tmp_path / "o.jsonl.store.db").is_file()


def test_a_store_is_shown_and_exported(tmp_path, key, capsys) -> None:
    data = synthetic.write_jsonl(tmp_path / "in.jsonl", [pair(0)])
    with serving() as stub:
        assert run("judge", *options(data, stub)) == 0
    store, out = tmp_path / "store.db", tmp_path / "export.jsonl"
    capsys.readouterr()
    assert run("store", "show", str(store)) == 0
    assert "verdicts" in capsys.readouterr().out
    assert run("store", "export", str(store), str(out)) == 0
    assert {line["state"] for line in lines(out)} == {"judged"}
    assert {line["response"] for line in lines(out)} == {
        "One chosen. Two 0.",
        "One rejected. Two 0.",
    }
    assert run("store", "export", str(store), os.devnull) == 2
    assert "not an ordinary file" in capsys.readouterr().err
    for wrong in ([], ["shw"], ["show"], ["show", str(store), "more"]):
        assert run("store", *wrong) == 2
        assert "jaxalign: error: expected `jaxalign store show" in (
            capsys.readouterr().err
        )
    assert run("store", "show", str(tmp_path / "nowhere.db")) == 2


@pytest.mark.parametrize(
    ("record", "match"),
    [
        ({"chosen_segments": None}, "chosen_segments is missing.*jaxalign segment"),
        ({"rejected_segments": None}, "rejected_segments is missing"),
        ({"chosen_segments": [{"start": 0, "end": 99}]}, r"expected 0 <= .* <= \d+"),
        ({"chosen_segments": [{"start": 0.0, "end": 3}]}, "whole numbers start and"),
        ({"chosen_segments": "all"}, "expected a list of segments"),
        ({"chosen": 3}, "field chosen"),
        ({"references": "text"}, "references: expected a list"),
        ({"completion_segments": []}, "has no completion"),
    ],
)
def test_records_that_are_refused(tmp_path, key, capsys, record, match) -> None:
    rows = [pair(0), {**pair(1), **record}]
    data = synthetic.write_jsonl(tmp_path / "in.jsonl", rows)
    with serving() as stub:
        assert run("judge", *options(data, stub)) == 2
        assert stub.total == 0
    said = capsys.readouterr().err
    assert "in.jsonl:2" in said and re.search(match, said)
    assert {path.name for path in tmp_path.iterdir()} == {"in.jsonl"}


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        ({"judge.model": None}, "judge.model is missing"),
        ({"judge.concurrency": 0}, "judge.concurrency must be at least 1"),
        ({"judge.concurency": 3}, "Did you mean --judge.concurrency"),
        ({"judge.api_key": KEY}, "unknown option --judge.api_key"),
        ({"judge.name": "oracle"}, "judge.name"),
        ({"out": os.devnull}, "not an ordinary file"),
        ({"judge.base_url": None, "judge.name": "rules"}, "correctness"),
    ],
)
def test_options_that_are_refused(tmp_path, key, capsys, flags, match) -> None:
    data = synthetic.write_jsonl(tmp_path / "in.jsonl", [pair(0, references=["x"])])
    with serving() as stub:
        code = run("judge", *options(data, stub, **flags))
        assert stub.total == 0
    shown = capsys.readouterr()
    if flags.get("judge.name") == "rules":  # not refused: a failure by name
        assert code == 0
        assert match in (tmp_path / "judged.jsonl").read_text()
        return
    assert code == 2 and re.search(match, shown.err)
    assert KEY not in shown.err + shown.out


def test_the_data_are_not_written_over(tmp_path, key, capsys) -> None:
    data = synthetic.write_jsonl(tmp_path / "in.jsonl", [pair(0)])
    before = data.read_bytes()
    with serving() as stub:
        assert run("judge", *options(data, stub, out=data)) == 2
    assert "is also read" in capsys.readouterr().err

    store = tmp_path / "judged.jsonl"  # which is not there yet
    with serving() as stub:
        assert run("judge", *options(data, stub, out=store, store=store)) == 2
        wal = f"{store}-wal"
        assert run("judge", *options(data, stub, out=wal, store=store)) == 2
        assert stub.total == 0
    assert data.read_bytes() == before


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_nulls_are_no_values(tmp_path, key, kind) -> None:
    """As tables write them: scores that only other segments have, answers, columns."""
    record = pair(0, references=["x", None], judge_failures=None, completion=None)
    record["chosen_segments"][0]["scores"] = {"h": 3, "c": None}
    record["chosen_segments"][1]["scores"] = {"h": None, "c": None}
    rows = [record, pair(1, references=["y", "z"])]
    data = synthetic.write_jsonl(tmp_path / "in.jsonl", rows)
    if kind == "parquet":
        import datasets

        data = tmp_path / "in.parquet"
        datasets.Dataset.from_list(rows).to_parquet(str(data))
    with serving() as stub:
        assert run("judge", *options(data, stub)) == 0
        assert stub.total == 4
    for line in lines(tmp_path / "judged.jsonl"):
        for segment in line["chosen_segments"] + line["rejected_segments"]:
            assert set(segment["scores"]) == ASPECTS
            assert None not in segment["scores"].values()
    with Store(tmp_path / "store.db", create=False) as store:
        asked = {text for (text,) in store.select("SELECT subject FROM requests")}
    assert {tuple(json.loads(one)["references"]) for one in asked} == {
        ("x",),
        ("y", "z"),
    }
