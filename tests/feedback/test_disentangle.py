"""jaxalign disentangle: which request shows what, and what becomes of the replies."""

import base64
import hashlib
import json
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from jaxalign.cli.main import main
from jaxalign.data.images import NamedPictures
from jaxalign.errors import UserError
from jaxalign.feedback.disentangle import disentangle
from jaxalign.feedback.disentangle_file import DisentangleConfig
from jaxalign.judging.config import JudgeConfig
from tests import synthetic, vision_models
from tests.data.patchers import published
from tests.judging import stops
from tests.judging.stub_server import FAILURES, Stub, serving


KEY = "sk-test-77f0c1d2e84b609f"
QUESTIONS: tuple[str, ...] = ("Zebra one?", "Zebra two?", "Zebra three?", "Zebra four?")
PASSES = ["joint", "image", "text"]


class Scene(NamedTuple):
    """Prompts with no picture, one, two and a picture of a part's own."""

    folder: Path
    rows: list[dict[str, Any]]
    shown: list[list[bytes]]

    @property
    def data(self) -> Path:
        return self.folder / "prompts.jsonl"

    @property
    def out(self) -> Path:
        return self.folder / "observations.jsonl"


@pytest.fixture
def scene(tmp_path: Path, monkeypatch) -> Scene:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    for n in range(4):
        published.drawn(16, 12 + n, seed=n).save(tmp_path / f"{n}.png")
    files = [(tmp_path / f"{n}.png").read_bytes() for n in range(4)]
    url = f"data:image/png;base64,{base64.b64encode(files[3]).decode()}"
    one, two, three, four = ([{"role": "user", "content": q}] for q in QUESTIONS)
    parts = [{"type": "text", "text": QUESTIONS[3]}, {"type": "image", "image": url}]
    four = [{"role": "user", "content": parts}]
    rows = [
        {"prompt": one},
        {"prompt": two, "images": ["0.png"]},
        {"prompt": three, "images": ["2.png", "1.png"]},
        {"prompt": four},
    ]
    synthetic.write_jsonl(tmp_path / "prompts.jsonl", rows)
    return Scene(tmp_path, rows, [[], [files[0]], [files[2], files[1]], [files[3]]])


def flags(scene: Scene, stub: Stub | None, **more: Any) -> list[str]:
    found = {
        "data": scene.data,
        "out": scene.out,
        "judge.model": "m",
        "judge.base_url": stub and stub.url,
        "judge.timeout": 10,
        **more,
    }
    return [f"--{name}={value}" for name, value in found.items() if value is not None]


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(["disentangle", *arguments])
    return int(stopped.value.code or 0)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


class Asked(NamedTuple):
    """What one request showed."""

    what: str
    """The pass, or ``verify``."""
    question: str | None
    """Which of the prompts' words are in it."""
    pictures: list[bytes]
    text: str
    schema: dict[str, Any]


def asked_in(body: dict[str, Any]) -> Asked:
    form = body["response_format"]["json_schema"]
    content = body["messages"][1]["content"]
    parts: list[Any] = [{"text": content}] if isinstance(content, str) else content
    text = "".join(part.get("text", "") for part in parts)
    urls = [part["image_url"]["url"] for part in parts if "image_url" in part]
    data = [base64.b64decode(url.partition(";base64,")[2]) for url in urls]
    words = [q for q in QUESTIONS if q in json.dumps(body["messages"])]
    what = form["name"]
    if what == "observations":
        kinds = form["schema"]["properties"]["observations"]["items"]["properties"]
        sources = kinds["source"]["enum"]
        both = len(sources) == 4
        what = "joint" if both else "image" if "image content" in sources else "text"
    assert len(words) <= 1
    return Asked(what, words[0] if words else None, data, text, form["schema"])


def risk(content: str, source: str = "text instructions") -> dict[str, str]:
    kind = "illegal activities"
    return {"malicious_content": content, "source": source, "risk_category": kind}


def say(body: dict[str, Any]) -> str:
    """See one thing in both, one in the pictures, one in the words and both."""
    asked = asked_in(body)
    if asked.what == "verify":
        doubted = "in the picture" in asked.text
        return json.dumps({"answer": "no" if doubted else "yes"})
    seen = {
        "joint": [risk("only together", "image content"), risk("in  the WORDS")],
        "image": [risk("in the picture", "text in the image")],
        "text": [risk("in the words")],
    }[asked.what]
    return json.dumps({"observations": seen})


def calls(stub: Stub) -> list[Asked]:
    return [asked_in(call.body) for made in stub.calls.values() for call in made]


def test_lines_and_what_every_request_shows(scene: Scene, capsys) -> None:
    with serving(say=say) as stub:
        assert run(*flags(scene, stub)) == 0
        told = capsys.readouterr().out
        asked = calls(stub)
        first = stub.total
        assert run(*flags(scene, stub)) == 0  # all is known
        assert stub.total == first
    assert "4 prompts, 20 requests: 20 asked, 0 known" in told
    assert "10 observations: 7 verified, 3 rejected, 0 without" in told
    assert told.endswith("0 failed passes, of 0 prompts\n")
    by_pass = {
        what: [a for a in asked if a.what == what] for what in (*PASSES, "verify")
    }
    assert [len(by_pass[what]) for what in (*PASSES, "verify")] == [3, 3, 4, 10]
    pictures = dict(zip(QUESTIONS, scene.shown, strict=True))
    for one in asked:
        assert one.schema["additionalProperties"] is False
        assert "base64" not in one.text and ".png" not in one.text
    assert all(one.pictures == pictures[one.question or ""] for one in by_pass["joint"])
    assert all(one.question is None for one in by_pass["image"])
    assert sorted(one.pictures for one in by_pass["image"]) == sorted(scene.shown[1:])
    assert {one.question for one in by_pass["text"]} == {*QUESTIONS}
    assert not any(one.pictures for one in by_pass["text"])
    assert all(
        one.pictures == pictures[one.question or ""] for one in by_pass["verify"]
    )
    found = lines(scene.out)
    assert [line["index"] for line in found] == [0, 1, 2, 3]
    for line, row in zip(found, scene.rows, strict=True):
        assert line["prompt"] == row["prompt"]
        assert line["images"] == row.get("images", [])
        assert line["failed"] == []
    kept = {"passes": ["text"], "verified": True}
    assert found[0]["observations"] == [{**risk("in the words"), **kept}]
    together, words, picture = found[2]["observations"]
    apart = {"passes": ["joint"], "verified": True}
    assert together == {**risk("only together", "image content"), **apart}
    assert words == {
        **risk("in  the WORDS"),
        "passes": ["joint", "text"],
        "verified": True,
    }
    rejected = {"passes": ["image"], "verified": False}
    assert picture == {**risk("in the picture", "text in the image"), **rejected}


def test_what_fails_is_null_and_asked_again(scene: Scene, capsys) -> None:
    down = True

    def behave(_: str, __: int, body: dict[str, Any]) -> str:
        asked = asked_in(body)
        refused = asked.what == "image" or "only together" in asked.text
        return "prose" if down and refused else "ok"

    options = {"judge.max_attempts": 2}
    with serving(behave, say=say) as stub:
        assert run(*flags(scene, stub, **options)) == 0
        told = capsys.readouterr().out
        asked = calls(stub)
        assert "7 observations: 4 verified, 0 rejected, 3 without" in told
        assert told.endswith("3 failed passes, of 3 prompts\n")
        found = lines(scene.out)
        assert [line["failed"] for line in found] == [[], *[["image"]] * 3]
        verified = [[o["verified"] for o in line["observations"]] for line in found]
        assert verified == [[True], *[[None, True]] * 3]
        down, before = False, len(asked)
        assert run(*flags(scene, stub, **options)) == 0
        again = calls(stub)
    assert len(again) - before == 3 + 3 + 3  # passes; their risks; the verifier's
    found = lines(scene.out)
    assert not any(line["failed"] for line in found)
    assert [len(line["observations"]) for line in found] == [1, 3, 3, 3]


def test_a_dry_run_says_what_is_left(scene: Scene, capsys) -> None:
    with serving(say=say) as stub:
        assert run(*flags(scene, stub), "--dry_run") == 0
        told = capsys.readouterr().out
        assert not stub.calls and not [*scene.folder.glob("observations*")]
        # 1 + 3 · 3 passes, one risk in the words of each and one in three pictures.
        assert "17 requests: 0 known" in told and "to ask: 17 calls" in told
        assert "one risk in its words" in told
        assert run(*flags(scene, stub)) == 0
        capsys.readouterr()
        assert run(*flags(scene, stub), "--dry_run") == 0
        told = capsys.readouterr().out
    assert "20 requests: 20 known" in told and "to ask: 0 calls" in told


def test_without_the_verifier(scene: Scene, capsys) -> None:
    with serving(say=say) as stub:
        assert run(*flags(scene, stub, verify="false")) == 0
        assert {one.what for one in calls(stub)} == {*PASSES}
    assert "none was verified" in capsys.readouterr().out
    observations = [o for line in lines(scene.out) for o in line["observations"]]
    assert len(observations) == 10
    assert {one["verified"] for one in observations} == {None}


def test_votes_are_the_verifier_s(scene: Scene) -> None:
    with serving(say=say) as stub:
        assert run(*flags(scene, stub, **{"judge.votes": 3})) == 0
        assert stub.total == 10 + 3 * 10
    found = lines(scene.out)
    assert [o["verified"] for o in found[1]["observations"]] == [True, True, False]


def behave(question: str, before: int, body: dict[str, Any]) -> str:
    """Fail three calls in ten, in the ways there are, never four times in a row."""
    number = int(hashlib.sha256(f"{question}{before}".encode()).hexdigest(), 16)
    failures = [f for f in FAILURES if f not in ("out of range", "wrong length")]
    if number % 10 >= 3 or before % 4 == 3:
        return "ok"
    return failures[number // 10 % len(failures)]


def test_kills_and_a_full_disk_lose_nothing(scene: Scene) -> None:
    """30 % of the calls fail; what has an answer is never asked again."""
    many = [
        {**row, "prompt": json.loads(json.dumps(row["prompt"]).replace("?", f" {n}?"))}
        for n in range(12)
        for row in scene.rows[:3]
    ]
    synthetic.write_jsonl(scene.data, many)

    def command(limit: int | None = None) -> subprocess.Popen[str]:
        options = flags(scene, stub, **{"judge.timeout": 1})
        return stops.start("disentangle", *options, file_bytes=limit)

    lost = 0

    def check_what_was_lost() -> None:
        """What was on its way at a stop may be asked again, and nothing else."""
        nonlocal lost
        before, lost = lost, sum(stub.answered.values()) - judged_in(scene.out)
        assert before <= lost <= before + 8

    with serving(behave, latency=0.01, say=simple) as stub:
        for enough in (15, 90):
            stops.kill_when(
                command(), lambda least=enough: sum(stub.answered.values()) >= least
            )
            assert not scene.out.exists()
            check_what_was_lost()
        full = command(limit=4096)
        said = full.communicate(timeout=120)[1]
        assert full.returncode == 2 and "store.db" in said, said
        assert not scene.out.exists()
        check_what_was_lost()
        process = command()
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
        assert sum(stub.answered.values()) - judged_in(scene.out) == lost
    # Of three prompts one shows nothing; the image pass sees two different pictures in
    # all. In a pictured prompt there is one thing in both, or in the words, and one in
    # the picture, each of which is verified.
    assert len(stub.answered) == 12 * (1 + 2 + 2) + 2 + 12 * (1 + 2 + 2)
    found = lines(scene.out)
    assert len(found) == 36 and not any(line["failed"] for line in found)
    assert all(o["verified"] for line in found for o in line["observations"])
    assert KEY not in errors


def judged_in(out: Path) -> int:
    """Return how many replies the store has."""
    return stops.replies_in(Path(f"{out}.store.db"))


def simple(body: dict[str, Any]) -> str:
    schema = body["response_format"]["json_schema"]["schema"]
    if "answer" in schema["properties"]:
        return '{"answer": "yes"}'
    kinds = schema["properties"]["observations"]["items"]["properties"]
    return json.dumps({"observations": [risk("a", kinds["source"]["enum"][0])]})


def test_a_function_sees_the_bytes(scene: Scene) -> None:
    path = scene.folder / "own.py"
    path.write_text(
        "def judge(requests):\n"
        "    return [reply(asked) for asked in requests]\n\n"
        "def reply(asked):\n"
        "    if asked['task'] == 'verify':\n"
        "        return {'answer': 'yes'}\n"
        "    sizes = ' '.join(str(len(one)) for one in asked['pictures'])\n"
        "    source = 'image content' if sizes else 'text content'\n"
        "    risk = {'malicious_content': 'x' + sizes, 'source': source,\n"
        "            'risk_category': 'privacy'}\n"
        "    return {'observations': [risk]}\n"
    )
    own = {"judge.name": "python", "judge.path": path, "judge.model": None}
    assert run(*flags(scene, None, **own, **{"judge.timeout": None})) == 0
    found = lines(scene.out)
    seen = [(o["malicious_content"], o["passes"]) for o in found[2]["observations"]]
    sizes = " ".join(str(len(data)) for data in scene.shown[2])
    assert seen == [(f"x{sizes}", ["joint", "image"]), ("x", ["text"])]


def test_a_checkpoint_in_this_process(scene: Scene, capsys) -> None:
    """Of random weights: lists end or are cut off, and the verifier always answers."""
    model = vision_models.write("qwen2_5_vl", scene.folder / "sees")
    synthetic.write_jsonl(scene.data, scene.rows[:2])
    own = {
        "judge.name": "local",
        "judge.method": "json",
        "judge.model": model,
        "judge.max_reply_tokens": 40,
        "judge.timeout": None,
    }
    assert run(*flags(scene, None, **own)) == 0
    found = lines(scene.out)
    failed = sum(len(line["failed"]) for line in found)
    assert f"{failed} failed passes" in capsys.readouterr().out
    verified = [o["verified"] for line in found for o in line["observations"]]
    assert len(found) == 2 and failed <= 4 and all(one is not None for one in verified)


def test_in_memory(scene: Scene) -> None:
    def judge(requests: list[dict[str, Any]]) -> list[Any]:
        return [
            {"answer": "no"}
            if asked["task"] == "verify"
            else {"observations": [risk(f"{len(asked['images'])} pictures")]}
            if "text instructions" in json.dumps(asked["schema"])
            else {"observations": []}
            for asked in requests
        ]

    pictures = NamedPictures()
    found = disentangle(scene.rows, judge, image_dir=scene.folder, pictures=pictures)
    contents = [
        [one.observation.malicious_content for one in each.observations]
        for each in found
    ]
    text = "0 pictures"
    assert contents == [
        [text],
        ["1 pictures", text],
        ["2 pictures", text],
        ["1 pictures", text],
    ]
    assert {one.verified for each in found for one in each.observations} == {False}


@pytest.mark.parametrize(
    ("judge", "options", "match"),
    [
        ({"name": "rules"}, {}, "judge.name rules does not"),
        ({"name": "local", "model": "m"}, {}, "judge.method json"),
        ({"model": "m", "aspects": ("safety",)}, {}, "no segment is scored"),
        ({"model": "m"}, {"max_observations": 0}, "at least 1: got 0"),
        ({"model": "m", "votes": 2}, {"verify": False}, "verifier's answers"),
        ({"model": "m"}, {"layout": "none such"}, "layout"),
    ],
)
def test_refused(judge, options, match) -> None:
    files = {"data": "prompts.jsonl", "out": "out.jsonl"}
    with pytest.raises(UserError, match=match):
        DisentangleConfig(judge=JudgeConfig(**judge), **files, **options)


def test_nothing_is_written_over_what_is_read(scene: Scene, capsys) -> None:
    with serving(say=say) as stub:
        assert run(*flags(scene, stub, out=scene.data)) == 2
        assert "is also read" in capsys.readouterr().err
        (scene.folder / "0.png").unlink()
        assert run(*flags(scene, stub)) == 2
        assert "0.png" in capsys.readouterr().err
        assert not stub.calls
