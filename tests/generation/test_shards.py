"""jaxalign generate --shard and join: the bytes of the whole file, through a kill."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from jaxalign.cli.main import main
from jaxalign.errors import UserError
from jaxalign.evaluation.joining import join_files
from jaxalign.generation import files
from jaxalign.generation.files import GenerateConfig
from tests import synthetic, vision_models
from tests.data.patchers import published


def prompts() -> list[dict[str, Any]]:
    """Return prompts of all lengths, so that the longest is in one part alone."""
    words = "one two three four five six seven".split()
    asked = [f"Say {' '.join(words[: n % 8])} {'again ' * (5 * n)}" for n in range(11)]
    return [{"prompt": text, "id": n} for n, text in enumerate(asked)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    return synthetic.write_jsonl(folder / "prompts.jsonl", prompts())


def options(model: Path, data: Path, out: Path, **more: Any) -> dict[str, Any]:
    return {
        "model": str(model),
        "data": str(data),
        "out": str(out),
        "num_samples": 2,
        "max_new_tokens": 9,
        "batch_slots": 5,
        "top_p": 0.9,
        **more,
    }


def make(model: Path, data: Path, out: Path, **more: Any) -> Path:
    files.generate_file(GenerateConfig(**options(model, data, out, **more)))
    return out


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    return int(stopped.value.code or 0)


def settings(out: Path) -> bytes:
    return out.with_name(f"{out.name}.settings.json").read_bytes()


@pytest.fixture(scope="module")
def whole(tiny_llama, data, tmp_path_factory) -> Path:
    return make(tiny_llama, data, tmp_path_factory.mktemp("whole") / "whole.jsonl")


@pytest.fixture(scope="module")
def parts(tiny_llama, data, tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("parts")
    return [
        make(tiny_llama, data, folder / f"{n}.jsonl", shard=f"{n}/3") for n in range(3)
    ]


def test_three_parts_joined_are_the_whole_file(
    tiny_llama, data, whole, parts, tmp_path, capsys
) -> None:
    """Other rows share the slots, and no bit of a text or a log-probability differs."""
    assert [len(part.read_text().splitlines()) for part in parts] == [4, 4, 3]
    assert [json.loads(x)["index"] for x in parts[1].read_text().splitlines()] == [
        *(1, 4, 7, 10)
    ]
    out = tmp_path / "made" / "out.jsonl"
    order = [str(parts[n]) for n in (2, 0, 1)]
    for _ in range(2):  # the second call finds all done
        assert run("join", str(out), *order) == 0
        assert "(11 lines of 3 parts)" in capsys.readouterr().out
        assert out.read_bytes() == whole.read_bytes()
        assert settings(out) == settings(whole)
    # It is that of the command without --shard, which has nothing left to do.
    assert files.generate_file(
        GenerateConfig(**options(tiny_llama, data, out))
    ) == files.GenerationReport(0, 0.0, 0.0)


def test_a_killed_part_goes_on(tiny_llama, data, whole, parts, tmp_path) -> None:
    """By the command that join says; kill -9 as soon as a line is there."""
    out = tmp_path / "1.jsonl"
    given = options(tiny_llama, data, out, shard="1/3", batch_slots=5)
    flags = [f"--{name}={value}" for name, value in given.items()]
    command = [sys.executable, "-m", "jaxalign.cli.main", "generate", *flags]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        deadline = time.monotonic() + 300
        while process.poll() is None and time.monotonic() < deadline:
            if out.exists() and out.read_bytes().count(b"\n") >= 1:
                process.send_signal(signal.SIGKILL)
                break
            os.sched_yield()
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    kept = out.read_bytes()
    assert 1 <= kept.count(b"\n") < 4
    with pytest.raises(UserError, match=r"part 1/3, has \d of 4 lines.* `jax") as told:
        join_files(tmp_path / "out.jsonl", [parts[0], out, parts[2]])
    assert not (tmp_path / "out.jsonl").exists()
    (again,) = re.findall("`(.*)`", str(told.value))
    assert run(*shlex.split(again)[1:]) == 0
    assert out.read_bytes().startswith(kept[: kept.rfind(b"\n") + 1])
    join_files(tmp_path / "out.jsonl", [parts[0], out, parts[2]])
    lines = [(tmp_path / "out.jsonl").read_text(), whole.read_text()]
    assert lines[0] == lines[1]


def test_more_parts_than_prompts(tiny_llama, data, whole, tmp_path) -> None:
    few = synthetic.write_jsonl(tmp_path / "few.jsonl", prompts()[:2])
    want = make(tiny_llama, few, tmp_path / "want.jsonl")
    made = [
        make(tiny_llama, few, tmp_path / f"{n}.jsonl", shard=f"{n}/3") for n in range(3)
    ]
    assert made[2].read_bytes() == b"" and settings(made[2])
    out = tmp_path / "out.jsonl"
    assert join_files(out, made).lines == 2
    assert out.read_bytes() == want.read_bytes()


def copied(part: Path, folder: Path, **changes: Any) -> Path:
    """Copy a part with other settings."""
    folder.mkdir(exist_ok=True)
    (folder / part.name).write_bytes(part.read_bytes())
    said = json.loads(settings(part))
    (folder / f"{part.name}.settings.json").write_text(json.dumps(said | changes))
    return folder / part.name


def test_what_is_not_one_whole_is_refused(
    tiny_llama, data, whole, parts, tmp_path
) -> None:
    a, b, c = parts
    out, other = tmp_path / "out.jsonl", tmp_path / "other"
    four = copied(c, tmp_path / "four", shard={"part": "2/4", "lines": 3})
    seeds = copied(c, other, seed=7, data="0")
    bare = tmp_path / "bare.jsonl"
    bare.write_bytes(c.read_bytes())
    for given, said in (
        ([a, b], "1 of 3 parts are missing: 2/3"),
        ([a], "2 of 3 parts are missing: 1/3, 2/3"),
        ([a, b, c, copied(b, tmp_path / "b")], "are both part 1/3"),
        ([a, b, four], "part 0/3 and .* part 2/4"),
        ([a, b, seeds], "made with other settings than .*: data, seed"),
        ([a, b, bare], "bare.jsonl is no part of anything"),
        ([a, b, whole], "whole.jsonl is no part of anything"),
        ([a, b, tmp_path / "none.jsonl"], "none.jsonl is no part of anything"),
        ([a, b, copied(c, tmp_path / "x", shard={"part": 3})], "is no part of any"),
        (
            [a, b, copied(c, tmp_path / "y", shard={"part": "2/3", "lines": 4})],
            "has 3 of 4 lines",
        ),
    ):
        with pytest.raises(UserError, match=said):
            join_files(out, given)
        assert not out.exists()
    out.write_text("somebody's\n")
    with pytest.raises(UserError, match="there and holds something else"):
        join_files(out, parts)
    assert out.read_text() == "somebody's\n"
    with pytest.raises(UserError, match="made with other settings"):
        join_files(a, parts)
    out.write_bytes(whole.read_bytes()[:-1])
    with pytest.raises(UserError, match="there and holds something else"):
        join_files(out, parts)


def test_a_part_is_gone_on_with_as_that_part_alone(
    tiny_llama, data, whole, parts
) -> None:
    before = [path.read_bytes() for path in (whole, parts[0])]
    for out, shard in ((whole, "0/3"), (parts[0], "1/3"), (parts[0], "0/4")):
        with pytest.raises(UserError, match="other settings: shard"):
            make(tiny_llama, data, out, shard=shard)
    with pytest.raises(UserError, match="other settings: shard"):
        make(tiny_llama, data, parts[0])
    assert [path.read_bytes() for path in (whole, parts[0])] == before


def test_risks_of_all_prompts_are_not_those_of_a_part(
    tiny_llama, data, tmp_path, capsys
) -> None:
    given = options(tiny_llama, data, tmp_path / "o.jsonl", shard="0/3")
    flags = [f"--{name}={value}" for name, value in given.items()]
    assert run("generate", *flags, "--context", "risks") == 2
    assert "run `jaxalign disentangle --shard i/n`" in capsys.readouterr().err


def test_parts_with_pictures(tmp_path) -> None:
    """The largest picture and the longest text are in parts of their own."""
    model = vision_models.write("qwen2_5_vl", tmp_path / "sees")
    for name, size in (("wide", (200, 60)), ("tall", (60, 97)), ("small", (30, 30))):
        published.drawn(*size).save(tmp_path / f"{name}.png")
    asked = [{"role": "user", "content": "is it blue?"}]
    longer = [{"role": "user", "content": "is it blue? " * 20}]
    rows = [
        {"prompt": asked, "images": ["wide.png"]},
        {"prompt": longer},
        {"prompt": asked, "images": ["small.png"]},
        {"prompt": asked, "images": ["tall.png"]},
    ]
    data = synthetic.write_jsonl(tmp_path / "prompts.jsonl", rows)
    more: dict[str, Any] = {"batch_slots": 3, "max_new_tokens": 5}
    want = make(model, data, tmp_path / "want.jsonl", **more)
    made = [
        make(model, data, tmp_path / f"{n}.jsonl", shard=f"{n}/2", **more)
        for n in range(2)
    ]
    out = tmp_path / "out.jsonl"
    join_files(out, made)
    assert out.read_bytes() == want.read_bytes()
