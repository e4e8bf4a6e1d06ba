"""jaxalign distill: what every request shows, what is written, and going on."""

import base64
import hashlib
import json
import re
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from jaxalign.cli.main import main
from jaxalign.errors import UserError
from jaxalign.feedback.distill_config import DistillConfig
from jaxalign.judging.config import JudgeConfig
from jaxalign.judging.endpoint_model import EndpointConfig
from tests import synthetic
from tests.data.patchers import published
from tests.judging import stops
from tests.judging.stub_server import FAILURES, OUTSIDE, Stub, serving


KEY = "sk-test-77f0c1d2e84b609f"
CONTEXT = "Somebody looked at"


class Scene(NamedTuple):
    """Prompts that are risky or not, with pictures or without."""

    folder: Path
    rows: list[dict[str, Any]]
    shown: list[list[bytes]]

    @property
    def data(self) -> Path:
        return self.folder / "prompts.jsonl"

    @property
    def out(self) -> Path:
        return self.folder / "sft.jsonl"


def turn(*content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [*content]}]


@pytest.fixture
def scene(tmp_path: Path, monkeypatch) -> Scene:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    for n in range(4):
        published.drawn(16, 12 + n, seed=n).save(tmp_path / f"{n}.png")
    files = [(tmp_path / f"{n}.png").read_bytes() for n in range(4)]
    url = f"data:image/png;base64,{base64.b64encode(files[3]).decode()}"
    picture = {"type": "image"}
    parts = [picture, {"type": "text", "text": "Risky three?"}, picture]
    own = {"type": "image", "image": url}
    rows = [
        {"prompt": [{"role": "user", "content": "Risky one?"}], "images": ["0.png"]},
        {"prompt": [{"role": "user", "content": "Benign two?"}], "images": ["1.png"]},
        {"prompt": turn(*parts), "images": ["2.png", "1.png"]},
        {"prompt": turn({"type": "text", "text": "Benign four?"}, own)},
        {"prompt": [{"role": "user", "content": "Risky five?"}]},
        {
            "prompt": [{"role": "user", "content": "Benign six?"}],
            "benign": True,
            "completion": "Six, in the row's own words.",
        },
    ]
    synthetic.write_jsonl(tmp_path / "prompts.jsonl", rows)
    shown = [[files[0]], [files[1]], [files[2], files[1]], [files[3]], [], []]
    return Scene(tmp_path, rows, shown)


def flags(scene: Scene, stub: Stub | None, **more: Any) -> list[str]:
    url = stub and stub.url
    found = {
        "data": scene.data,
        "out": scene.out,
        "context": "risks",
        "endpoint.model": "teacher",
        "endpoint.base_url": url,
        "endpoint.timeout": 10,
        "judge.model": "m",
        "judge.base_url": url,
        "judge.timeout": 10,
        **more,
    }
    return [f"--{name}={value}" for name, value in found.items() if value is not None]


def run(*arguments: str, command: str = "distill") -> int:
    with pytest.raises(SystemExit) as stopped:
        main([command, *arguments])
    return int(stopped.value.code or 0)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def asks(body: dict[str, Any]) -> str:
    """Return what a request is: ``answer``, ``observe``, ``confirm`` or ``handled``."""
    if "response_format" not in body:
        return "answer"
    if body["response_format"]["json_schema"]["name"] == "observations":
        return "observe"
    return "handled" if '\\"response\\"' in json.dumps(body["messages"]) else "confirm"


def pictures_in(body: dict[str, Any]) -> list[bytes]:
    found = []
    for message in body["messages"]:
        content = message["content"]
        for part in [] if isinstance(content, str) else content:
            if part["type"] == "image_url":
                url = part["image_url"]["url"]
                found.append(base64.b64decode(url.partition(";base64,")[2]))
    return found


def say(body: dict[str, Any]) -> str:
    """See a risk in the words that say so; answer with the question's last word."""
    text, kind = json.dumps(body["messages"]), asks(body)
    if kind == "observe":
        risk = {
            "malicious_content": "the risky question",
            "source": "text instructions",
            "risk_category": "privacy",
        }
        listed = body["response_format"]["json_schema"]["schema"]["properties"]
        words = listed["observations"]["items"]["properties"]["source"]["enum"]
        seen = "Risky" in text and "text instructions" in words
        return json.dumps({"observations": [risk] if seen else []})
    if kind == "confirm":
        return '{"answer": "yes"}'
    if kind == "handled":
        return json.dumps({"answer": "yes" if "risk it is" in text else "no"})
    (name,) = re.findall(r"(?:Risky|Benign) (\w+)\?", text)
    told = CONTEXT in text
    return (
        f"What a risk it is to ask {name}." if told else f"Plainly {name}, and so on."
    )


def bodies(stub: Stub, kind: str) -> list[dict[str, Any]]:
    made = [call.body for calls in stub.calls.values() for call in calls]
    return [body for body in made if asks(body) == kind]


def test_records_and_what_every_request_shows(scene: Scene, capsys) -> None:
    with serving(say=say) as stub:
        assert run(*flags(scene, stub)) == 0
        told = capsys.readouterr().out
        asked = {
            k: bodies(stub, k) for k in ("answer", "observe", "confirm", "handled")
        }
        before, first = stub.total, scene.out.read_bytes()
        assert run(*flags(scene, stub)) == 0
        assert stub.total == before and scene.out.read_bytes() == first
    # Four prompts have pictures: 4 · 3 + 2 passes; three are risky.
    counts = {kind: len(made) for kind, made in asked.items()}
    assert counts == {"answer": 5, "observe": 14, "confirm": 3, "handled": 3}
    found = lines(scene.out)
    assert [one["index"] for one in found] == [*range(6)]
    assert [one["benign"] for one in found] == [False, True, False, True, False, True]
    assert found[5]["completion"] == "Six, in the row's own words."
    assert found[2]["completion"] == "What a risk it is to ask three."
    for one, row in zip(found, scene.rows, strict=True):
        assert one["prompt"] == row["prompt"]
        assert one["images"] == row.get("images", [])
    for body in asked["answer"]:
        text = json.dumps(body["messages"])
        (n,) = [n for n, row in enumerate(scene.rows) if _question(row) in text]
        assert pictures_in(body) == scene.shown[n]
        assert (CONTEXT in text) == ("Risky" in text)
        assert body["model"] == "teacher" and body["max_completion_tokens"] == 256
    whole = scene.out.read_text()
    assert CONTEXT not in whole and "remarks" not in whole and KEY not in whole
    assert Path(f"{scene.out}.dropped.jsonl").read_text() == ""
    assert "teacher: 5 requests: 5 asked" in told
    assert "judge: 3 requests: 3 asked" in told and "3 observations: 3 verified" in told
    assert told.endswith("(6 records: 3 risky, 3 benign, 0 neither)\n")


def _question(row: dict[str, Any]) -> str:
    content = row["prompt"][0]["content"]
    if isinstance(content, str):
        return content
    return next(part["text"] for part in content if "text" in part)


def test_observations_of_a_file_are_the_same_context(scene: Scene, capsys) -> None:
    with serving(say=say) as stub:
        assert run(*flags(scene, stub)) == 0
        made = Path(f"{scene.out}.observations.jsonl")
        assert [len(one["observations"]) for one in lines(made)] == [1, 0, 1, 0, 1, 0]
        out, before = scene.folder / "again.jsonl", stub.total
        more = {"context": made, "out": out, "store": f"{scene.out}.store.db"}
        assert run(*flags(scene, stub, **more)) == 0
        assert stub.total == before
    assert out.read_bytes() == scene.out.read_bytes()


def test_what_is_dropped_is_in_a_file_with_its_reason(scene: Scene, capsys) -> None:
    def behave(_: str, __: int, body: dict[str, Any]) -> str:
        down = asks(body) == "answer" and "two" in json.dumps(body["messages"])
        return "500" if down else "ok"

    def curt(body: dict[str, Any]) -> str:
        said = say(body)
        return said.replace("risk it is", "thing it is") if " five" in said else said

    options = {"endpoint.max_attempts": 1}
    with serving(behave, say=curt) as stub:
        assert run(*flags(scene, stub, **options)) == 0
    told = capsys.readouterr().out
    assert "dropped: 2 of 6 prompts: 1 failed, 1 unhandled" in told
    failed, unhandled = lines(Path(f"{scene.out}.dropped.jsonl"))
    assert (failed["index"], failed["reason"]) == (1, "failed")
    assert "HTTP 500" in failed["answers"][0]["detail"]
    assert (unhandled["index"], unhandled["reason"]) == (4, "unhandled")
    assert unhandled["answers"][0]["text"] == "What a thing it is to ask five."
    assert [one["index"] for one in lines(scene.out)] == [0, 2, 3, 5]
    with serving(say=curt) as stub:
        assert run(*flags(scene, stub, **options)) == 0
        assert stub.total == 1  # what failed, and nothing else
    assert [one["index"] for one in lines(scene.out)] == [0, 1, 2, 3, 5]


def test_one_budget_is_the_judge_s_for_all_that_it_does(scene: Scene, capsys) -> None:
    with serving(say=say) as stub:
        # 14 passes and 3 confirmed; the third answer is not looked at any more.
        assert run(*flags(scene, stub, **{"judge.max_requests": 19})) == 2
        assert "judge.max_requests" in capsys.readouterr().err
        assert not scene.out.exists() and len(bodies(stub, "handled")) == 2
        before = stub.total
        assert run(*flags(scene, stub)) == 0
        assert stub.total == before + 1
    assert len(lines(scene.out)) == 6


def test_where_nothing_is_kept_nothing_is_written(scene: Scene, capsys) -> None:
    with serving(say=lambda body: " " if asks(body) == "answer" else say(body)) as stub:
        synthetic.write_jsonl(scene.data, scene.rows[:5])
        assert run(*flags(scene, stub)) == 2
    assert "no answer is fit to be learnt from" in capsys.readouterr().err
    assert not scene.out.exists()
    dropped = lines(Path(f"{scene.out}.dropped.jsonl"))
    assert [one["reason"] for one in dropped] == ["empty"] * 5


def test_a_system_text_needs_no_judge(scene: Scene, capsys) -> None:
    rules = scene.folder / "rules.md"
    rules.write_text("Somebody looked at the clock. Say what time it is.\n")
    own = {"context": rules, "judge.model": None, "judge.base_url": None}
    own |= {"judge.timeout": None}
    with serving(say=say) as stub:
        assert run(*flags(scene, stub, **own)) == 0
        assert len(bodies(stub, "answer")) == stub.total == 5
        assert all(CONTEXT in json.dumps(b["messages"]) for b in bodies(stub, "answer"))
        told = capsys.readouterr().out
        assert "(6 records: 0 risky, 1 benign, 5 neither)" in told
        rules.write_text("Say nothing.")
        assert run(*flags(scene, stub, **own)) == 2
        assert "other settings: context" in capsys.readouterr().err
        assert run(*flags(scene, stub, **own, temperature=0.5)) == 2
        assert "other settings: context, temperature" in capsys.readouterr().err
        assert stub.total == 5


def test_what_it_did_not_make_is_not_written_over(scene: Scene, capsys) -> None:
    scene.out.write_text("mine")
    with serving(say=say) as stub:
        assert run(*flags(scene, stub)) == 2
        assert "it was not made by jaxalign distill" in capsys.readouterr().err
        assert run(*flags(scene, stub, out=scene.data)) == 2
        assert "is also read" in capsys.readouterr().err
        data = scene.folder / "sft.jsonl.dropped.jsonl"
        data.write_bytes(scene.data.read_bytes())
        scene.out.unlink()
        assert run(*flags(scene, stub, data=data)) == 2
        assert "is also read" in capsys.readouterr().err
        assert not stub.calls and data.read_bytes() == scene.data.read_bytes()


def test_a_dry_run_says_what_is_left(scene: Scene, capsys) -> None:
    prices = {"endpoint.prompt_price": 1.0, "endpoint.completion_price": 1000.0}
    with serving(say=say) as stub:
        assert run(*flags(scene, stub, **prices), "--dry_run") == 0
        told = capsys.readouterr().out
        assert not stub.calls and not [*scene.folder.glob("sft*")]
        # Each prompt that is not marked is taken to be risky: of the words of all six,
        # and of the pictures of four, one thing is seen, and all but those of the sixth
        # have to be handled: 14 passes, 10 confirmed, 9 handled.
        assert "teacher: to ask: 5 calls, which show 5 pictures" in told
        assert "judge: 33 requests: 0 known" in told
        assert "endpoint.prompt_price (1 a million tokens)" in told
        assert f"and {5 * 256} of replies" in told
        assert run(*flags(scene, stub)) == 0
        capsys.readouterr()
        assert run(*flags(scene, stub), "--dry_run") == 0
        told = capsys.readouterr().out
    assert "teacher: to ask: 0 calls" in told
    assert "judge: 20 requests: 20 known" in told


def behave(question: str, before: int, body: dict[str, Any]) -> str:
    """Fail three calls in ten, in the ways there are, never four times in a row."""
    number = int(hashlib.sha256(f"{question}{before}".encode()).hexdigest(), 16)
    none = {"out of range", "wrong length", "429 after", "429 date"}
    if asks(body) == "answer":  # of prose any text is an answer
        none |= {*OUTSIDE, "refusal", "cut off"}
    failures = [failure for failure in FAILURES if failure not in none]
    if number % 10 >= 3 or before % 4 == 3:
        return "ok"
    return failures[number // 10 % len(failures)]


def test_kills_and_a_full_disk_lose_nothing(scene: Scene) -> None:
    """30 % of the calls fail; what has an answer is never asked again."""
    many = [
        {**row, "prompt": json.loads(json.dumps(row["prompt"]).replace("?", f"? {n}"))}
        for n in range(12)
        for row in scene.rows
    ]
    synthetic.write_jsonl(scene.data, many)

    def command(limit: int | None = None, **more: Any) -> subprocess.Popen[str]:
        times = {"judge.timeout": 1, "endpoint.timeout": 1}
        options = flags(scene, stub, **times, **more)
        return stops.start("distill", *options, file_bytes=limit)

    lost = 0

    def check_what_was_lost() -> None:
        """What was on its way at a stop may be asked again, and nothing else.

        Eight calls at a time, and what came in since the last write.
        """
        nonlocal lost
        before, lost = lost, sum(stub.answered.values()) - judged_in(scene.out)
        assert before <= lost <= before + 8 + 32

    with serving(behave, latency=0.01, say=say) as stub:
        # 12 · 6 passes over words, 12 · 4 over both and 4 over the pictures are 124;
        # then 36 are confirmed, 60 answered and 36 handled.
        for enough in (60, 190):
            stops.kill_when(
                command(),
                lambda least=enough: sum(stub.answered.values()) >= least,
                240,
            )
            assert not scene.out.exists()
            check_what_was_lost()
        full = command(limit=4096)
        errors = full.communicate(timeout=120)[1]
        assert full.returncode == 2, errors
        assert not scene.out.exists()
        check_what_was_lost()
        process = command()
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
        assert sum(stub.answered.values()) - judged_in(scene.out) == lost
        assert judged_in(scene.out) == 124 + 36 + 60 + 36
        other = scene.folder / "whole.jsonl"
        process = command(out=other)
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    assert len(lines(scene.out)) == 72
    assert other.read_bytes() == scene.out.read_bytes()
    assert KEY not in errors


def judged_in(out: Path) -> int:
    """Return how many replies the store has."""
    return stops.replies_in(Path(f"{out}.store.db"))


def test_broken_inputs_are_refused_before_anything_is_sent(
    scene: Scene, tiny_llama: Path, capsys
) -> None:
    seen = [{**row, "observations": [], "failed": []} for row in scene.rows]
    other = synthetic.write_jsonl(scene.folder / "other.jsonl", seen[::-1])
    short = synthetic.write_jsonl(scene.folder / "short.jsonl", seen[:2])
    odd = [{"prompt": row["prompt"], "images": row.get("images", [])} for row in seen]
    bare = [{**row, "observations": []} for row in odd]
    bare_file = synthetic.write_jsonl(scene.folder / "bare.jsonl", bare)
    none = {"endpoint.model": None, "endpoint.base_url": None, "endpoint.timeout": None}
    with serving(say=say) as stub:
        for more, match in [
            ({"context": other}, "other.jsonl:1 is of another prompt than"),
            ({"context": short}, "has 2 lines for 6 prompts"),
            ({"context": bare_file}, "bare.jsonl:1: not as jaxalign disentangle"),
            (
                {"context": scene.folder / "none.md", "refusals": "judge"},
                "cannot be read",
            ),
            (none, "there is no teacher: give --teacher CHECKPOINT or"),
            ({"teacher": tiny_llama}, "there are two teachers"),
            ({**none, "teacher": tiny_llama}, "does not see \\(4 such prompts\\)"),
            ({**none, "teacher": scene.folder / "no"}, "no holds no weights"),
            ({"top_k": 5}, "--top_k has no effect with --endpoint.model"),
            ({"judge.model": None}, "judge.model is missing"),
            ({"context": None}, "context"),
        ]:
            assert run(*flags(scene, stub, **more)) == 2, match
            error = capsys.readouterr().err
            assert error.count("\n") <= 2 and "Traceback" not in error
            assert re.search(match, error), error
        (scene.folder / "2.png").unlink()
        assert run(*flags(scene, stub)) == 2
        assert "2.png" in capsys.readouterr().err
        assert not stub.calls and not scene.out.exists()
        assert not [*scene.folder.glob("sft*")]


ENDPOINT = EndpointConfig(model="teacher")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"context": "risks"}, "judge.name rules does not"),
        ({"context": "o.jsonl"}, "judge.name rules cannot verify that answers"),
        ({"judge": JudgeConfig(model="m")}, "judge.name openai does nothing here"),
        (
            {"judge": JudgeConfig(model="m", aspects=("safety",)), "context": "risks"},
            "no segment is scored",
        ),
        (
            {
                "judge": JudgeConfig(model="m", votes=3),
                "context": "o.jsonl",
                "verify": False,
                "refusals": "judge",
            },
            "judge.votes 3 does nothing",
        ),
        (
            {"judge": JudgeConfig(name="reward", model="m"), "refusals": "judge"},
            "judge.name reward tells no refusals",
        ),
        ({"chat_template_kwargs": {"a": 1}}, "give endpoint.chat_template_kwargs"),
        ({"quantize": "int8"}, "quantize has no effect with endpoint.model"),
        ({"layout": "none such"}, "layout"),
        ({"batch_slots": 0}, "batch_slots must be at least 1"),
    ],
)
def test_options_that_do_not_fit(options, match) -> None:
    given = {"data": "d.jsonl", "out": "o.jsonl", "context": "rules.md"}
    with pytest.raises(UserError, match=match):
        DistillConfig(**{**given, "endpoint": ENDPOINT, **options})


def test_observations_without_the_verifier_need_no_judge() -> None:
    given: Any = {"data": "d.jsonl", "out": "o.jsonl", "context": "o.jsonl"}
    config = DistillConfig(endpoint=ENDPOINT, verify=False, **given)
    assert config.observed and config.judge.name == "rules"
