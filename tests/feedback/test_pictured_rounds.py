"""Rounds of RLAIF on prompts with pictures: a tiny model that sees, and a judge."""

import base64
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import pytest
import yaml

from jaxalign.cli.main import main
from jaxalign.data import records
from tests import synthetic, vision_models, vision_records
from tests.data.patchers import published
from tests.judging import stub_server
from tests.judging.stub_server import Stub, serving
from tests.pages import Page


KEPT = ("samples.jsonl", "judged.jsonl", "pairs.jsonl", "pairing.json", "gate.json")


class Setting:
    """Files of prompts with pictures, and configs of runs on them."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.model = vision_models.write("qwen2_5_vl", folder / "model")
        place = folder / "p"
        place.mkdir()
        for n, size in enumerate(((61, 97), (48, 48), (200, 33), (112, 100))):
            published.drawn(*size, seed=n).save(place / f"{n}.png")
        url = vision_records.png(published.drawn(40, 40, seed=9))
        self.url = f"data:image/png;base64,{base64.b64encode(url).decode()}"
        shown = [
            {"type": "image_url", "image_url": {"url": self.url}},
            {"type": "text", "text": "is it seven?"},
        ]
        self.train: list[dict[str, Any]] = [
            {"prompt": self.ask("which river?"), "images": ["p/0.png"]},
            {"prompt": self.ask("what is blue?"), "images": ["p/1.png", "p/2.png"]},
            {"prompt": [{"role": "user", "content": shown}]},
            {"prompt": self.ask("without a picture?")},
        ]
        self.held = [
            {"prompt": self.ask("which river?"), "images": ["p/3.png"]},
            {"prompt": self.ask("the answer?"), "images": ["p/1.png"]},
        ]
        for name, rows in (("train", self.train), ("held", self.held)):
            rows = [{**row, "references": ["river"]} for row in rows]
            synthetic.write_jsonl(folder / f"{name}.jsonl", rows)

    @staticmethod
    def ask(text: str) -> list[dict[str, Any]]:
        return [{"role": "user", "content": text}]

    def config(self, out: Path, **changes: Any) -> Path:
        values = {
            "model": str(self.model),
            "prompts": str(self.folder / "train.jsonl"),
            "out": str(out),
            "rounds": 1,
            "max_pixels": 28 * 28 * 6,
            "generation": {"num_samples": 3, "max_new_tokens": 8, "batch_slots": 4},
            "judge": {"name": "local", "model": str(self.model)},
            "pairing": {"min_gap": 0.0, "max_pairs_per_prompt": 1},
            "adapter": {"name": "lora", "rank": 2, "targets": ["q_proj", "vision:qkv"]},
            "training": {
                "max_steps": 2,
                "batch_rows": 1,
                "row_length": 128,
                "save_steps": 1,
            },
            "gate": {"prompts": str(self.folder / "held.jsonl")},
            **changes,
        }
        path = self.folder / f"{out.name}.yaml"
        path.write_text(yaml.safe_dump(values))
        return path


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return Setting(tmp_path_factory.mktemp("rlaif"))


def run(config: Path, *options: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(["rlaif", "--config", str(config), *options])
    return int(stopped.value.code or 0)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def shown_in(stub: Stub) -> list[tuple[str, str, list[bytes]]]:
    """Return the task of every call, its text and the bytes of its pictures."""
    found = []
    for call in (call for calls in stub.calls.values() for call in calls):
        content = call.body["messages"][1]["content"]
        parts = [{"type": "text", "text": content}]
        parts = content if isinstance(content, list) else parts
        text = "".join(part.get("text", "") for part in parts)
        urls = [part["image_url"]["url"] for part in parts if "image_url" in part]
        data = [base64.b64decode(url.partition(";base64,")[2]) for url in urls]
        task = call.body["response_format"]["json_schema"]["name"]
        found.append((task, text, data))
    return found


@pytest.fixture(scope="module")
def done(setting: Setting, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of a run that nobody disturbed."""
    out = tmp_path_factory.mktemp("runs") / "done"
    assert run(setting.config(out)) == 0
    return out


def test_a_round_samples_judges_trains_and_reports(
    done: Path, setting: Setting
) -> None:
    here = done / "round-1"
    samples = lines(here / "samples.jsonl")
    for line, row in zip(samples, setting.train, strict=True):
        assert {k: line[k] for k in ("prompt", "images") if k in line} == row
    judged = lines(here / "judged.jsonl")
    failures = [c["failure"] for one in judged for c in one["candidates"]]
    assert not any(found and found["kind"] == "judge" for found in failures)
    pairs = lines(here / "pairs.jsonl")
    assert sum("images" in pair for pair in pairs) == 2
    found = records.read(here / "pairs.jsonl", image_dir=setting.folder)
    assert [len(record.images) for record in found if record.images] == [1, 2, 1]
    kept = yaml.safe_load((here / "run/config.yaml").read_text())
    assert kept["max_pixels"] == 28 * 28 * 6
    assert kept["image_dir"] == str(setting.folder)
    adapter = json.loads((here / "adapter/adapter_config.json").read_text())
    assert any("visual" in name for name in adapter["target_modules"])
    gate = json.loads((here / "gate.json").read_text())
    assert gate["prompts"] + gate["failed"] == 2
    page = Page((done / "report.html").read_text())
    thumbnails = [a for tag, a in page.attributes if tag == "img"]
    assert thumbnails and all(int(a["width"] or 0) <= 128 for a in thumbnails)
    assert "a picture is not shown" not in page.text


def test_a_picture_that_has_changed_is_no_going_on(
    done: Path, setting: Setting, tmp_path: Path, capsys
) -> None:
    again = tmp_path / "again"
    shutil.copytree(done, again)
    path = setting.folder / "p/0.png"
    before = path.read_bytes()
    try:
        published.drawn(61, 97, seed=77).save(path)
        assert run(setting.config(again)) == 2
        assert "the prompts' pictures has changed since" in capsys.readouterr().err
    finally:
        path.write_bytes(before)
    assert run(setting.config(again)) == 0


PASSES = ("joint", "image", "text")


def test_risks_look_at_both_at_the_picture_and_at_the_words(
    setting: Setting, tmp_path: Path, monkeypatch
) -> None:
    """Every request: the image pass has no words, the text pass no picture."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test-0123456789")
    monkeypatch.setattr(stub_server, "fitting", _found)
    out = tmp_path / "risks"
    with serving(_by_the_response) as stub:
        judge = {"name": "openai", "model": "m", "base_url": stub.url}
        options = {
            "judge": judge,
            "decomposer": {"name": "risks", "score": "count"},
            "objective": {"name": "sigmoid"},
        }
        config = setting.config(out, **options)
        assert run(config, "--dry_run") == 0
        assert not stub.calls
        assert run(config) == 0
    asked = shown_in(stub)
    observed = [(text, data) for task, text, data in asked if task == "observations"]
    words = [row["prompt"][-1]["content"] for row in (*setting.train, *setting.held)]
    words[2] = "is it seven?"
    alone = [one for one in observed if not any(w in one[0] for w in words)]
    blind = [one for one in observed if not one[1]]
    both = [one for one in observed if one not in alone and one not in blind]
    # Six prompts, one of which shows nothing.
    assert (len(alone), len(blind), len(both)) == (5, 6, 5)
    assert all(data for _, data in alone)
    pictures = {path.read_bytes() for path in (setting.folder / "p").glob("*.png")}
    pictures.add(base64.b64decode(setting.url.partition(",")[2]))
    assert {one for _, data in observed for one in data} == pictures
    for task, text, data in asked:
        assert "base64" not in text and "p/0.png" not in text
        if task == "verify" and "without a picture?" not in text:
            assert data
    units = [
        unit
        for one in lines(out / "round-1/judged.jsonl")
        for candidate in one["candidates"]
        for unit in candidate["units"]
    ]
    seen = {unit["labels"]["passes"] for unit in units}
    assert any("image" in passes for passes in seen)
    assert {unit["verdict"] for unit in units} == {"handled", "unhandled"}
    assert (out / "round-1/adapter").is_dir()


def _by_the_response(question: str, _: int, body: dict[str, Any]) -> str:
    """Say of some responses that they do not handle a risk."""
    told = json.loads(question)[1]["content"]
    text = told if isinstance(told, str) else told[0]["text"]
    form = body["response_format"]["json_schema"]
    if (
        form["name"] == "verify"
        and '"response"' in text
        and zlib.crc32(text.encode()) % 2
    ):
        said = json.dumps({"role": "assistant", "content": '{"answer": "no"}'})
        return f"message {said}"
    return "ok"


_fitting = stub_server.fitting


def _found(schema: Any) -> Any:
    """Observe one risk of the first source that may be named."""
    if "observations" in schema.get("properties", {}):
        item = schema["properties"]["observations"]["items"]
        return {"observations": [_fitting(item)]}
    return _fitting(schema)


def test_claims_are_verified_with_the_picture(
    setting: Setting, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test-0123456789")

    def fitting(schema: Any) -> Any:
        if "claims" in schema.get("properties", {}):
            return {"claims": ["The river is blue."]}
        return _fitting(schema)

    monkeypatch.setattr(stub_server, "fitting", fitting)
    with serving() as stub:
        options = {
            "judge": {"name": "openai", "model": "m", "base_url": stub.url},
            "decomposer": {"name": "claims"},
            "objective": {"name": "sigmoid"},
        }
        assert run(setting.config(tmp_path / "claims", **options)) == 0
    for task, text, data in shown_in(stub):
        looks = task == "verify" and "without a picture?" not in text
        assert bool(data) == looks


def test_rules_need_no_eyes(setting: Setting, tmp_path: Path) -> None:
    options = {
        "judge": {"name": "rules"},
        "decomposer": {"name": "hops"},
        "objective": {"name": "sigmoid"},
    }
    out = tmp_path / "rules"
    assert run(setting.config(out, **options)) == 0
    candidates = [
        c for o in lines(out / "round-1/judged.jsonl") for c in o["candidates"]
    ]
    assert all(c["score"] is not None for c in candidates)


def start(config: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.Popen(
        [sys.executable, "-m", "jaxalign.cli.main", "rlaif", "--config", str(config)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment,
        start_new_session=True,
    )


def test_kills_change_nothing(done: Path, setting: Setting, tmp_path: Path) -> None:
    out = tmp_path / "killed"
    config = setting.config(out)
    for stage in (".samples.jsonl.part", "judged.jsonl", "run/checkpoints/1"):
        process = start(config)
        while not (out / "round-1" / stage).exists():
            assert process.poll() is None
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert run(config) == 0
    for name in KEPT:
        one, other = (path / "round-1" / name for path in (out, done))
        assert one.read_bytes() == other.read_bytes()
    adapter = "round-1/adapter/adapter_model.safetensors"
    assert (out / adapter).read_bytes() == (done / adapter).read_bytes()
