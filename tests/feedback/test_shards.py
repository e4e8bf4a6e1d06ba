"""judge and disentangle in parts: the same lines, and a store of all that was asked."""

import json
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest

from jaxalign.cli.main import main
from jaxalign.errors import UserError
from jaxalign.evaluation.joining import join_files
from jaxalign.feedback.disentangle_file import DisentangleConfig, disentangle_file
from jaxalign.feedback.judge_file import JudgeFileConfig, judge_file
from jaxalign.judging.config import JudgeConfig
from jaxalign.judging.store import Store
from tests import synthetic
from tests.judging import stops
from tests.judging.stub_server import Stub, serving


KEY = "sk-test-90c1b7f3"
COUNT = 10


@pytest.fixture(autouse=True)
def key(monkeypatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def pair(n: int) -> dict[str, Any]:
    texts = {"chosen": f"Yes. It is {n}.", "rejected": f"No. Not {n}."}
    segments = {
        f"{side}_segments": [
            {"start": 0, "end": text.index(".") + 1},
            {"start": text.index(".") + 2, "end": len(text)},
        ]
        for side, text in texts.items()
    }
    return {"id": n, "prompt": f"Question {n}?", **texts, **segments}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = [pair(n) for n in range(COUNT)]
    return synthetic.write_jsonl(tmp_path / "pairs.jsonl", rows)


def say(body: dict[str, Any]) -> str:
    """Score by the text, see a risk in every third prompt, doubt every other one."""
    name = body["response_format"]["json_schema"]["name"]
    shown = json.dumps(body["messages"][1:])
    number = int(re.findall(r"Question (\d+)", shown)[0])
    if name == "observations":
        risk = {
            "malicious_content": f"harm {number}",
            "source": "text instructions",
            "risk_category": "illegal activities",
        }
        return json.dumps({"observations": [risk] if number % 3 == 0 else []})
    if name == "verify":
        return json.dumps({"answer": "no" if number % 2 else "yes"})
    schema = body["response_format"]["json_schema"]["schema"]["properties"]["segments"]
    aspects = schema["items"]["properties"]
    score = (number + ("No." in shown)) % 5
    scores = [{name: (score + place) % 5 for name in aspects} for place in range(2)]
    return json.dumps({"segments": scores})


def behave(question: str, before: int, body: dict[str, Any]) -> str:
    """Fail one request for good, and some of the others once."""
    if "Question 7" in question and "Not 7" in question:
        return "prose"
    return "500" if before == 0 and len(question) % 3 == 0 else "ok"


def judge_of(stub: Stub) -> JudgeConfig:
    return JudgeConfig(
        model="m",
        base_url=stub.url,
        timeout=10.0,
        aspects=("correctness", "clarity"),
        max_wait=1.0,
    )


def judged(stub: Stub, data: Path, out: Path, **more: Any) -> Path:
    judge_file(
        JudgeFileConfig(data=str(data), out=str(out), judge=judge_of(stub), **more)
    )
    return out


def flags(stub: Stub, data: Path, out: Path, **more: Any) -> list[str]:
    given = {
        "data": data,
        "out": out,
        "judge.model": "m",
        "judge.base_url": stub.url,
        "judge.timeout": 10,
        **more,
    }
    return [f"--{name}={value}" for name, value in given.items()]


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    return int(stopped.value.code or 0)


def dump(path: Path) -> set[Any]:
    """Return requests with what became of them and what they took."""
    query = (
        "SELECT key, task, vote, subject, state, value, reason, attempts, "
        "prompt_tokens, completion_tokens FROM requests JOIN verdicts USING (key)"
    )
    with Store(path, create=False) as store:
        return set(store.select(query))


def store_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.store.db")


def test_judged_parts_joined_are_the_whole_file(data, tmp_path, capsys) -> None:
    with serving(behave, say=say) as stub:
        want = judged(stub, data, tmp_path / "want.jsonl")
        asked = stub.total
    with serving(behave, say=say) as stub:
        made = [
            judged(stub, data, tmp_path / f"{n}.jsonl", shard=f"{n}/3")
            for n in range(3)
        ]
        assert stub.total == asked
    assert [len(part.read_text().splitlines()) for part in made] == [4, 3, 3]
    out = tmp_path / "out.jsonl"
    for _ in range(2):
        assert run("join", str(out), str(made[1]), str(made[2]), str(made[0])) == 0
        said = capsys.readouterr().out
        assert "(10 lines of 3 parts, a store of 20 answers and verdicts)" in said
        assert out.read_bytes() == want.read_bytes()
    assert b"judge_failures" in want.read_bytes()
    assert dump(store_of(out)) == dump(store_of(want))
    # The command without --shard has nothing to ask but what failed.
    with serving(say=say) as stub:
        judged(stub, data, out)
        assert stub.total == 1


def test_disentangled_parts_joined_are_the_whole_file(data, tmp_path) -> None:
    with serving(say=say) as stub:

        def observed(name: str, **more: Any) -> Path:
            out = tmp_path / name
            judge = JudgeConfig(model="m", base_url=stub.url, timeout=10.0)
            files = {"data": str(data), "out": str(out)}
            disentangle_file(DisentangleConfig(judge=judge, **files, **more))
            return out

        want = observed("want.jsonl")
        made = [observed(f"{n}.jsonl", shard=f"{n}/4") for n in range(4)]
        with pytest.raises(UserError, match="begun with other settings: verify"):
            observed("0.jsonl", shard="0/4", verify=False)
    indices = [json.loads(line)["index"] for line in made[3].read_text().splitlines()]
    assert indices == [3, 7]
    out = tmp_path / "out.jsonl"
    assert join_files(out, made[::-1]).lines == COUNT
    assert out.read_bytes() == want.read_bytes()
    assert dump(store_of(out)) == dump(store_of(want))
    kinds = [json.loads(line)["observations"] for line in out.read_text().splitlines()]
    assert [len(found) for found in kinds] == [int(n % 3 == 0) for n in range(COUNT)]


def test_more_parts_than_records(tmp_path) -> None:
    data = synthetic.write_jsonl(tmp_path / "one.jsonl", [pair(0)])
    with serving(say=say) as stub:
        want = judged(stub, data, tmp_path / "want.jsonl")
        made = [
            judged(stub, data, tmp_path / f"{n}.jsonl", shard=f"{n}/2")
            for n in range(2)
        ]
    assert made[1].read_bytes() == b""
    out = tmp_path / "out.jsonl"
    assert join_files(out, made).lines == 1
    assert out.read_bytes() == want.read_bytes()


def test_a_killed_part_goes_on_by_the_command_that_join_says(data, tmp_path) -> None:
    made = [tmp_path / f"{n}.jsonl" for n in range(2)]
    with serving(latency=0.05, say=say) as stub:
        more = {"judge.concurrency": 1, "judge.aspects": '["correctness"]'}
        assert run("judge", *flags(stub, data, made[1], shard="1/2", **more)) == 0
        there = stub.total
        given = flags(stub, data, made[0], shard="0/2", **more)
        process = subprocess.Popen(stops.program("judge", *given))
        stops.kill_when(process, lambda: sum(stub.answered.values()) >= there + 3, 300)
        out = tmp_path / "out.jsonl"
        with pytest.raises(UserError, match="part 0/2, has 0 of 5 lines") as told:
            join_files(out, made)
        assert not any(tmp_path.glob("out.jsonl*"))
        before = stub.total
        (again,) = re.findall("`(.*)`", str(told.value))
        assert run(*shlex.split(again)[1:]) == 0
        assert stub.total - before < 10  # of 5 records with two responses
        want = tmp_path / "want.jsonl"
        assert run("judge", *flags(stub, data, want, **more)) == 0
    join_files(out, made)
    assert out.read_bytes() == want.read_bytes()


def test_a_dry_run_counts_the_part_alone(data, tmp_path, capsys) -> None:
    with serving(say=say) as stub:
        for name in ("judge", "disentangle"):  # 2 calls a record, or a prompt
            given = flags(stub, data, tmp_path / "o.jsonl", shard="1/3")
            assert run(name, *given, "--dry_run") == 0
            assert "to ask: 6 calls" in capsys.readouterr().out
        assert stub.total == 0
    assert not any(tmp_path.glob("o.jsonl*"))


def test_a_part_is_judged_again_as_that_part_alone(data, tmp_path) -> None:
    with serving(say=say) as stub:
        whole = judged(stub, data, tmp_path / "whole.jsonl")
        part = judged(stub, data, tmp_path / "part.jsonl", shard="0/2")
        before = [path.read_bytes() for path in (whole, part)]
        asked = stub.total
        with pytest.raises(UserError, match="is there and was made without"):
            judged(stub, data, whole, shard="0/2")
        with pytest.raises(UserError, match="is part 0/2 of something: give another"):
            judged(stub, data, part)
        with pytest.raises(UserError, match="begun with other settings: shard"):
            judged(stub, data, part, shard="1/2")
        other = synthetic.write_jsonl(tmp_path / "other.jsonl", [pair(3), pair(4)])
        with pytest.raises(UserError, match="other settings: data, shard"):
            judged(stub, other, part, shard="0/2")
        assert stub.total == asked
        judged(stub, data, part, shard="0/2")  # as often as one likes
    assert [path.read_bytes() for path in (whole, part)] == before


def test_parts_of_different_data_or_judges_are_no_whole(data, tmp_path) -> None:
    other = synthetic.write_jsonl(tmp_path / "more.jsonl", [pair(n) for n in range(4)])
    with serving(say=say) as stub:
        one = judged(stub, data, tmp_path / "0.jsonl", shard="0/2")
        two = judged(stub, other, tmp_path / "1.jsonl", shard="1/2")
        with pytest.raises(UserError, match="other settings than .*0.jsonl: data"):
            join_files(tmp_path / "out.jsonl", [one, two])
        judge = JudgeConfig(model="other", base_url=stub.url, aspects=("clarity",))
        files = {"data": str(data), "out": str(tmp_path / "2.jsonl")}
        judge_file(JudgeFileConfig(judge=judge, shard="1/2", **files))
    with pytest.raises(UserError, match="than .*0.jsonl: aspects, judge"):
        join_files(tmp_path / "out.jsonl", [one, tmp_path / "2.jsonl"])


def test_a_part_without_its_store_is_refused(data, tmp_path) -> None:
    with serving(say=say) as stub:
        made = [
            judged(stub, data, tmp_path / f"{n}.jsonl", shard=f"{n}/2")
            for n in range(2)
        ]
        store_of(made[1]).unlink()
        with pytest.raises(UserError, match=r"1.jsonl.store.db is missing, where"):
            join_files(tmp_path / "out.jsonl", made)
        # A store that they were given is where the whole is judged with it, too.
        kept = str(tmp_path / "kept.db")
        for n in range(2):
            out = tmp_path / f"with{n}.jsonl"
            judged(stub, data, out, shard=f"{n}/2", store=kept)
    found = join_files(
        tmp_path / "out.jsonl", [tmp_path / f"with{n}.jsonl" for n in range(2)]
    )
    assert found.store is None and not store_of(tmp_path / "out.jsonl").exists()
