"""What a dry run says, against what the run then does."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from jaxalign.data import rows
from jaxalign.judging import estimate, prompts
from jaxalign.judging.config import JudgeConfig
from jaxalign.judging.estimate import assumed_reply, token_counter
from jaxalign.judging.judge import Subject
from tests import synthetic
from tests.cli.test_judge import KEY, lines, options, pair, run, single
from tests.judging.stub_server import serving


def state(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path): (path.stat().st_mtime_ns, path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file()
    }


def numbers(said: str, line: str) -> list[float]:
    """Return the numbers of the line that begins so."""
    (found,) = [one for one in said.splitlines() if line in one.split(":")[0]]
    return [float(n) for n in re.findall(r"\d+(?:\.\d+)?", found)]


def test_a_file_before_and_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Without a key; twenty texts are equal to others; then eight are in the store."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    some = [pair(n) for n in range(10)]
    data = synthetic.write_jsonl(tmp_path / "in.jsonl", [*some, *some, single(3)])
    before = state(tmp_path)
    prices = {"judge.prompt_price": 2.5, "judge.completion_price": 10}
    with serving() as stub:
        assert run("judge", *options(data, stub, **prices), "--dry_run") == 0
        assert stub.total == 0 and state(tmp_path) == before
        said = capsys.readouterr().out
        assert said.splitlines()[1] == (
            "41 requests: 0 known from the store, 20 equal to another"
        )
        assert numbers(said, "to ask") == [21]
        sent, replied, *_ = numbers(said, "tokens")
        (cost, *_) = numbers(said, "cost")
        assert cost == pytest.approx((sent * 2.5 + replied * 10) / 1e6, abs=5e-5)
        # Three times eight on their way at two seconds.
        assert numbers(said, "time")[0] == 6
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        few = synthetic.write_jsonl(tmp_path / "few.jsonl", some[:4])
        assert run("judge", *options(few, stub)) == 0
        calls = [call for asked in stub.calls.values() for call in asked]
        assert len(calls) == 8
        before = state(tmp_path)
        capsys.readouterr()
        assert run("judge", *options(data, stub), "--dry_run") == 0
        assert stub.total == 8 and state(tmp_path) == before
        said = capsys.readouterr().out
        assert "41 requests: 16 known from the store, 12 equal to another" in said
        assert numbers(said, "to ask") == [13] and "cost" not in said
        assert run("judge", *options(data, stub)) == 0
        assert stub.total == 21
    # The counted tokens are those of the texts that were sent, and four a message.
    bytes_each = [
        sum(-(-len(m["content"].encode()) // 4) + 4 for m in call.body["messages"])
        for asked in stub.calls.values()
        for call in asked
    ]
    assert sum(bytes_each) == sent
    reply = json.dumps({"segments": [dict.fromkeys(_five(), 4)] * 2})
    assert replied == 21 * -(-len(reply) // 4)


def _five() -> tuple[str, ...]:
    return ("helpfulness", "correctness", "safety", "completeness", "clarity")


def test_tokens_are_those_of_the_tokenizer_at_hand(tiny_llama: Path) -> None:
    from transformers import AutoTokenizer

    counter = token_counter(str(tiny_llama))
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    for text in ("the river is blue", "好 Über! seven", ""):
        want = len(tokenizer(text, add_special_tokens=False)["input_ids"])
        assert counter.tokens(text) == want
    subject = Subject("the river?", "blue.", spans=((0, 5),), aspects=("clarity",))
    request = prompts.scores_request(subject)
    config = JudgeConfig(model=str(tiny_llama))  # served under its directory's name
    found = estimate.estimate(config, [request], None)
    want = sum(
        len(tokenizer(m["content"], add_special_tokens=False)["input_ids"]) + 4
        for m in request.messages
    )
    assert found.prompt_tokens == want
    told = estimate.estimate(
        JudgeConfig(model=str(tiny_llama), response_format="none"), [request], None
    )
    assert told.prompt_tokens > found.prompt_tokens  # the schema is sent as text
    assert "by the tokenizer of" in estimate.lines_of(config, found)[2]


def test_assumed_replies_are_of_their_schemas() -> None:
    for schema in (
        prompts.COMPARE_SCHEMA,
        prompts.scores_schema(("clarity", "safety"), 3),
        {
            "type": "object",
            "properties": {
                "claims": {
                    "type": "array",
                    "items": {"type": "string"},
                    "minItems": 2,
                    "maxItems": 40,
                }
            },
            "required": ["claims"],
        },
    ):
        for items in (None, 0, 5):
            value = assumed_reply(schema, items)
            assert prompts.parse(json.dumps(value), schema).problem is None
    assert len(set(assumed_reply(schema, 5)["claims"])) == 5


@pytest.mark.parametrize("name", ["rules", "python", "local"])
def test_judges_in_this_process_cost_nothing(
    tmp_path: Path, capsys: Any, name: str, tiny_llama: Path
) -> None:
    data = synthetic.write_jsonl(tmp_path / "in.jsonl", [pair(0, references=["x"])])
    mine = tmp_path / "mine.py"
    mine.write_text("raise SystemExit('a dry run executes nothing')")
    flags = [f"--data={data}", f"--out={tmp_path / 'o.jsonl'}", f"--judge.name={name}"]
    flags += [f"--judge.path={mine}"] if name == "python" else []
    flags += [f"--judge.model={tiny_llama}"] if name == "local" else []
    before = state(tmp_path)
    assert run("judge", *flags, "--dry_run") == 0
    assert state(tmp_path) == before
    said = capsys.readouterr().out
    assert "to judge: 2 requests, in this process" in said and "tokens" not in said


@pytest.fixture
def rounds(tiny_llama: Path, tmp_path: Path) -> Any:
    """Return a function that writes the config of a run and returns its path."""
    for name, count in (("train", 5), ("held", 3)):
        prompts = [{"prompt": f"{name} the river {n} is: "} for n in range(count)]
        synthetic.write_jsonl(tmp_path / f"{name}.jsonl", prompts)

    def config(url: str, **changes: Any) -> Path:
        judge = {"name": "openai", "model": "m", "base_url": url, "votes": 2}
        values = {
            "model": str(tiny_llama),
            "prompts": str(tmp_path / "train.jsonl"),
            "out": str(tmp_path / "out"),
            "rounds": 2,
            "generation": {"num_samples": 3, "max_new_tokens": 24, "batch_slots": 4},
            "judge": {**judge, "prompt_price": 1.0, "temperature": 0.5},
            "pairing": {"min_gap": 3.99},
            "adapter": {"name": "lora", "rank": 2},
            "training": {"max_steps": 2, "batch_rows": 1, "row_length": 128},
            "gate": {"prompts": str(tmp_path / "held.jsonl"), "num_samples": 2},
            **changes,
        }
        path = tmp_path / "rlaif.yaml"
        path.write_text(yaml.safe_dump(values))
        return path

    return config


def test_rounds_before_and_in_the_middle(
    rounds: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with serving() as stub:
        config = rounds(stub.url)
        before = state(tmp_path)
        assert run("rlaif", "--config", str(config), "--dry_run") == 0
        assert state(tmp_path) == before and stub.total == 0
        said = capsys.readouterr().out
        # 2 rounds of 5 prompts, 3 candidates, 2 votes; 3 gates of 3 prompts, 2, 2.
        assert numbers(said, "to ask") == [2 * 5 * 3 * 2 + 3 * 3 * 2 * 2]
        assert "by the tokenizer of" in said and "cost: " in said
        # A round is sampled and some of it judged; then its budget is spent.
        budget = ["--judge.max_requests=7", "--judge.concurrency=1"]
        assert run("rlaif", "--config", str(config), *budget) == 2
        assert stub.total == 7
        capsys.readouterr()
        assert run("rlaif", "--config", str(config), "--dry_run") == 0
        said = capsys.readouterr().out
        sampled = lines(tmp_path / "out" / "round-1" / "samples.jsonl")
        texts = {
            (row["prompt"], completion["text"])
            for row in sampled
            for completion in row["completions"]
            if completion["text"].strip()
        }
        asked = 2 * len(texts) - 7 + 5 * 3 * 2 + 3 * 3 * 2 * 2
        assert numbers(said, "to ask") == [asked]
        assert ": 7 known from the store" in said


def test_rounds_of_many_steps(rounds: Any, capsys: Any, tmp_path: Path) -> None:
    """Claims: to split, to ask about, and to verify each, a segment's worth of them."""
    objective = {"name": "sigmoid"}
    config = rounds(
        "http://127.0.0.1:1/v1", decomposer={"name": "claims"}, objective=objective
    )
    assert run("rlaif", "--config", str(config), "--dry_run") == 0
    said = capsys.readouterr().out
    (calls,) = numbers(said, "to ask")
    candidates = 2 * 5 * 3 + 3 * 3 * 2
    claims = (calls - 2 * candidates) / (2 * candidates)
    assert claims == int(claims) >= 1
    assert not (tmp_path / "out").exists()
    assert list(rows.read_rows(str(tmp_path / "held.jsonl")))


def test_rounds_of_graded_risks_and_a_gate_of_metrics(
    rounds: Any, capsys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is asked of a prompt is asked once, whatever the rounds and candidates."""
    held = [{"prompt": f"held {n}: ", "benign": n > 0} for n in range(3)]
    synthetic.write_jsonl(tmp_path / "safety.jsonl", held)
    metrics = {"unsafe": "lower", "refused_benign": "lower", "effective": "higher"}
    gate = {"prompts": str(tmp_path / "safety.jsonl"), "num_samples": 2}
    options: dict[str, Any] = {"decomposer": {"name": "risks"}, "pairing": {}}
    # A response has a verdict of each kind: handled, rating, and effects of segments.
    # Two votes on each but for what is observed; 2 rounds of 5 prompts, 3 candidates.
    of_prompts, of_responses = 5 + 5 * 2, 2 * 5 * 3 * 2 * 3
    # Three policies, three prompts, two completions, two labels, two votes.
    of_gate = 3 * 3 * 2 * 2 * 2
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with serving() as stub:
        config = rounds(stub.url, gate={**gate, "metrics": metrics}, **options)
        assert run("rlaif", "--config", str(config), "--dry_run") == 0
        said = capsys.readouterr().out
        assert numbers(said, "to ask") == [of_prompts + of_responses + of_gate]
        # By scores, the gate's prompts are observed too, under votes of their own.
        config = rounds(stub.url, gate=gate, **options)
        assert run("rlaif", "--config", str(config), "--dry_run") == 0
        said = capsys.readouterr().out
        by_scores = (3 + 3 * 2) + 3 * 3 * 2 * 2 * 3
        assert numbers(said, "to ask") == [of_prompts + of_responses + by_scores]
        # The prompts are observed and then the budget is spent: that much is known.
        budget = ["--judge.max_requests=5", "--judge.concurrency=1"]
        assert run("rlaif", "--config", str(config), *budget) == 2
        capsys.readouterr()
        assert run("rlaif", "--config", str(config), "--dry_run") == 0
    assert ": 5 known from the store" in capsys.readouterr().out


def test_what_the_run_would_refuse_is_said_before(
    rounds: Any, capsys: Any, tmp_path: Path
) -> None:
    held = str(tmp_path / "train.jsonl")
    config = rounds("http://127.0.0.1:1/v1", gate={"prompts": held})
    values = yaml.safe_load(config.read_text())
    config.write_text(yaml.safe_dump({**values, "dry_run": True}))
    assert run("rlaif", "--config", str(config)) == 2
    assert "5 of 5 prompts are also" in capsys.readouterr().err
    missing = ["--data=nowhere.jsonl", f"--out={tmp_path / 'o'}", "--judge.model=m"]
    assert run("judge", *missing, "--dry_run") == 2
    assert "nowhere.jsonl" in capsys.readouterr().err
