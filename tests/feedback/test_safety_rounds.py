"""Rounds on pictures by DREAM's score, with a gate on safety, refusals and use.

The judge knows by which policy a held-out response was: the base model's are unsafe,
half of the first round's are, and the second round's refuse everything.
"""

import base64
import json
import os
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from jaxalign.cli.main import main
from jaxalign.data import records
from tests import synthetic, vision_models
from tests.data.patchers import published
from tests.feedback.test_disentangle import behave
from tests.judging import stops
from tests.judging.stub_server import Stub, serving
from tests.pages import Page


KEY = "sk-test-0123456789"
RISKY, BENIGN = "seven", "river"
"""Words of a prompt by which the judge sees a risk in it, or none."""

TRAIN = [
    ("the seven blue?", ["p/0.png"]),
    ("is it the river?", ["p/1.png", "p/2.png"]),
    ("seven without a picture?", []),
]
HELD = [
    ("is seven the answer?", ["p/0.png"]),
    ("not seven?", ["p/3.png"]),
    ("which river?", ["p/1.png"]),
    ("the blue river?", ["p/2.png"]),
]
QUESTIONS = {words: files for words, files in (*TRAIN, *HELD)}
CONCURRENCY = 4
ON_THE_WAY = 4 * CONCURRENCY
"""Replies at most that a kill loses: those coming in, and those being written."""


class Asked(NamedTuple):
    """What one request shows."""

    task: str
    look: str | None
    """Of an observer the pass."""
    words: list[str]
    """The prompts' questions that are in it."""
    text: str
    pictures: list[bytes]
    labels: list[str]


def asked_in(body: dict[str, Any]) -> Asked:
    form = body["response_format"]["json_schema"]
    content = body["messages"][1]["content"]
    parts: list[Any] = [{"text": content}] if isinstance(content, str) else content
    text = "".join(part.get("text", "") for part in parts)
    urls = [part["image_url"]["url"] for part in parts if "image_url" in part]
    data = [base64.b64decode(url.partition(";base64,")[2]) for url in urls]
    words = [q for q in QUESTIONS if q in json.dumps(body["messages"])]
    properties, look = form["schema"]["properties"], None
    if form["name"] == "observations":
        kinds = properties["observations"]["items"]["properties"]["source"]["enum"]
        look = "image" if "image content" in kinds else "text"
        look = "joint" if len(kinds) == 4 else look
    labels = properties.get("grade", {}).get("enum", [])
    return Asked(form["name"], look, words, text, data, labels)


def judge_of(out: Path, marked: bytes) -> Callable[[dict[str, Any]], str]:
    """Return what the endpoint says; ``marked`` is the picture with a risk in it."""

    def say(body: dict[str, Any]) -> str:
        asked = asked_in(body)
        chance = zlib.crc32(asked.text.encode())
        schema = body["response_format"]["json_schema"]["schema"]
        if asked.task == "observations":
            source = {"joint": "image content", "text": "text instructions"}
            seen = RISKY in asked.text or (
                asked.look == "image" and marked in asked.pictures
            )
            risk = {
                "malicious_content": f"in the {asked.look}",
                "source": source.get(asked.look or "", "text in the image"),
                "risk_category": "illegal activities",
            }
            return json.dumps({"observations": [risk] if seen else []})
        if asked.task == "verify":
            yes = '"response"' not in asked.text or chance % 2
            return json.dumps({"answer": "yes" if yes else "no"})
        if asked.task == "rating":
            return json.dumps({"rating": 1 + chance % 10})
        if asked.task == "effects":
            one = schema["properties"]["segments"]
            segments = [
                {
                    name: (chance >> place) % 3 - (name != "helpfulness")
                    for place, name in enumerate(one["items"]["properties"])
                }
                for _ in range(one["minItems"])
            ]
            return json.dumps({"segments": segments})
        return json.dumps({"grade": label(asked)})

    def label(asked: Asked) -> str:
        policy = policy_of(asked)
        if asked.task == "refusal":
            return "full_refusal" if policy == 2 else "full_compliance"
        if "unsafe" in asked.labels:
            bad = policy == 0 or (policy == 1 and "not" in asked.words[0])
            return "unsafe" if bad else "safe"
        return "ineffective" if policy == 2 else "very"

    def policy_of(asked: Asked) -> int:
        given = json.loads(asked.text)["response"]
        for number, name in enumerate(("base", "round-1", "round-2")):
            path = out / "gate" / f"{name}.jsonl"
            if path.is_file() and (asked.words[0], given) in texts_of(path):
                return number
        raise AssertionError("the judge was asked about no held-out response")

    return say


def texts_of(path: Path) -> list[tuple[str, str]]:
    return [
        (line["prompt"][-1]["content"], completion["text"])
        for line in lines(path)
        for completion in line["completions"]
    ]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


class Setting(NamedTuple):
    """A run's config, where it goes, and the prompts' pictures by their paths."""

    config: Path
    out: Path
    pictures: dict[str, bytes]


@pytest.fixture
def setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Setting:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    model = vision_models.write("qwen2_5_vl", tmp_path / "model")
    (tmp_path / "p").mkdir()
    pictures = {}
    for n, size in enumerate(((61, 97), (48, 48), (100, 33), (56, 50))):
        path = tmp_path / f"p/{n}.png"
        published.drawn(*size, seed=n).save(path)
        pictures[f"p/{n}.png"] = path.read_bytes()
    for name, rows in (("train", TRAIN), ("held", HELD)):
        made = [
            {"prompt": [{"role": "user", "content": words}]}
            | ({"images": files} if files else {})
            | ({"benign": BENIGN in words} if name == "held" else {})
            for words, files in rows
        ]
        synthetic.write_jsonl(tmp_path / f"{name}.jsonl", made)
    metrics = {"unsafe": "lower", "refused_benign": "lower", "effective": "higher"}
    out = tmp_path / "out"
    values = {
        "model": str(model),
        "prompts": str(tmp_path / "train.jsonl"),
        "out": str(out),
        "rounds": 2,
        "max_pixels": 28 * 28 * 6,
        "generation": {"num_samples": 3, "max_new_tokens": 8, "batch_slots": 4},
        "decomposer": {"name": "risks", "global_weight": 0.5},
        "pairing": {"max_pairs_per_prompt": 1, "contradictory_share": 1.0},
        "adapter": {"name": "lora", "rank": 2, "targets": ["q_proj", "v_proj"]},
        "optimizer": {"learning_rate": 0.3},
        "training": {
            "max_steps": 2,
            "batch_rows": 1,
            "row_length": 128,
            "save_steps": 1,
        },
        "gate": {
            "prompts": str(tmp_path / "held.jsonl"),
            "metrics": metrics,
            "num_samples": 2,
        },
    }
    config = tmp_path / "rlaif.yaml"
    config.write_text(yaml.safe_dump(values))
    return Setting(config, out, pictures)


def command(setting: Setting, stub: Stub) -> list[str]:
    judge = {"name": "openai", "model": "m", "base_url": stub.url, "timeout": 2}
    judge |= {"concurrency": CONCURRENCY}
    flags = [f"--judge.{name}={value}" for name, value in judge.items()]
    return ["rlaif", "--config", str(setting.config), *flags]


def kill_when(
    setting: Setting, stub: Stub, enough: Callable[[], bool]
) -> tuple[int, int]:
    """Kill a run; return how many replies there were, and how many were kept."""
    process = subprocess.Popen(
        [sys.executable, "-m", "jaxalign.cli.main", *command(setting, stub)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        text=True,
    )
    stops.kill_when(process, enough, 300)
    return sum(stub.answered.values()), stops.replies_in(setting.out / "store.db")


def test_a_round_is_accepted_and_one_that_refuses_is_not(
    setting: Setting, capsys: pytest.CaptureFixture[str]
) -> None:
    """30 % of the calls fail, two kills; each request shows what it may, once."""
    out = setting.out
    say = judge_of(out, setting.pictures["p/0.png"])
    with serving(behave, latency=0.01, say=say) as stub:
        answered, kept = kill_when(
            setting, stub, lambda: sum(stub.answered.values()) >= 20
        )
        lost = answered - kept
        assert 0 <= lost <= ON_THE_WAY
        assert not (out / "round-1/judged.jsonl").exists()
        answered, kept = kill_when(setting, stub, lambda: labelled(stub) >= 5)
        assert lost <= answered - kept <= lost + ON_THE_WAY
        lost = answered - kept
        assert not (out / "round-1/gate.json").exists()
        with pytest.raises(SystemExit) as stopped:
            main(command(setting, stub))
        assert not stopped.value.code, capsys.readouterr().err[-2000:]
        assert sum(stub.answered.values()) - stops.replies_in(out / "store.db") == lost
        check_what_every_request_shows(setting, stub)
        total = stub.total
        with pytest.raises(SystemExit) as stopped:
            main(command(setting, stub))
        assert not stopped.value.code and stub.total == total
    check_the_decisions(out)
    check_the_records(out, setting.config.parent)
    assert KEY not in capsys.readouterr().err


def labelled(stub: Stub) -> int:
    """Return how many calls asked for a label."""
    calls = [call for made in [*stub.calls.values()] for call in [*made]]
    return sum(asked_in(call.body).task in ("label", "refusal") for call in calls)


def check_what_every_request_shows(setting: Setting, stub: Stub) -> None:
    asked = [asked_in(call.body) for made in stub.calls.values() for call in made]
    tasks = {"observations", "verify", "rating", "effects", "label", "refusal"}
    assert {one.task for one in asked} == tasks
    every = set(setting.pictures.values())
    for one in asked:
        assert "base64" not in one.text and ".png" not in one.text
        if one.look == "image":
            assert not one.words and one.text == "These are the images."
            assert one.pictures and set(one.pictures) <= every
            continue
        (words,) = one.words
        pictures = [setting.pictures[path] for path in QUESTIONS[words]]
        assert one.pictures == ([] if one.look == "text" else pictures)
        if one.task in ("label", "refusal"):
            assert words in dict(HELD)
            assert (one.task == "refusal") <= (BENIGN in words)
            assert ("unsafe" in one.labels) <= (RISKY in words)
        elif one.task != "observations":
            assert words in dict(TRAIN)
    looks = [one.look for one in asked if one.look]
    assert {"joint", "image", "text"} == set(looks)


def check_the_decisions(out: Path) -> None:
    first, second = (
        json.loads((out / f"round-{n}/gate.json").read_text()) for n in (1, 2)
    )
    assert first["accepted"] and first["from"] == "base"
    unsafe = first["metrics"]["unsafe"]
    before, after = (unsafe_share(out, name) for name in ("base", "round-1"))
    assert (unsafe["before"], unsafe["after"]) == (before, after)
    assert unsafe["difference"] == pytest.approx(after - before) and after < before
    assert unsafe["prompts"] == 2 and unsafe["failed"] == unsafe["failed_verdicts"] == 0
    assert first["metrics"]["refused_benign"]["difference"] <= 0.02
    assert first["metrics"]["effective"]["prompts"] == 4
    assert not second["accepted"] and second["from"] == "round-1"
    reason = second["reason"]
    assert reason.startswith(
        "it gains safety by refusing: unsafe fell from 0.500 to 0.0"
    )
    assert "refused_benign rose from 0.000 to 1.000 (+1.000, 95 % interval" in reason
    assert "effective fell from 1.000 to 0.000" in reason
    exported = out / "export/adapter_model.safetensors"
    trained = out / "round-1/adapter/adapter_model.safetensors"
    assert exported.read_bytes() == trained.read_bytes()
    page = Page((out / "report.html").read_text())
    assert "1 of 2 rounds accepted (1)." in page.text
    assert f"Round 2 was rejected: {reason}." in page.text
    assert page.row("unsafe")[0].startswith(f"{before:.3f} → {after:.3f}, −0.")
    assert " → 1.000, +" in page.row("refused_benign")[1]


def unsafe_share(out: Path, name: str) -> float:
    """Return what the judge's rule says of a policy; a blank response is safe."""
    found = [
        [
            bool(completion["text"].strip()) and (name == "base" or "not" in words)
            for completion in line["completions"]
        ]
        for line in lines(out / f"gate/{name}.jsonl")
        if RISKY in (words := line["prompt"][-1]["content"])
    ]
    return sum(sum(each) / len(each) for each in found) / len(found)


def check_the_records(out: Path, folder: Path) -> None:
    pairs = [row for n in (1, 2) for row in lines(out / f"round-{n}/pairs.jsonl")]
    assert any(BENIGN in row["prompt"][-1]["content"] for row in pairs)
    assert any(RISKY in row["prompt"][-1]["content"] for row in pairs)
    for row in pairs:
        assert 0 <= row["rejected_score"] <= row["chosen_score"] - 0.1 <= 0.9
        for side in ("chosen", "rejected"):
            for segment in row[f"{side}_segments"]:
                assert {*segment["scores"]} == {"helpfulness", "safety"}
                assert all(0 <= value <= 4 for value in segment["scores"].values())
    assert records.read(out / "round-1/pairs.jsonl", image_dir=folder)
    judged = [
        c for one in lines(out / "round-1/judged.jsonl") for c in one["candidates"]
    ]
    for one in judged:
        units = one["units"]
        real = [u["verdict"] for u in units if u["kind"] == "observation"]
        (rating,) = [u["verdict"] for u in units if u["kind"] == "rating"] or ["1"]
        if one["failure"] is None:
            whole = (float(rating) - 1) / 9
            share = real.count("handled") / len(real) if real else whole
            assert one["score"] == pytest.approx((whole + share) / 2, abs=1e-12)
