"""A teacher in this process, and a student that is trained on what is written."""

import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from jaxalign.cli.main import main
from tests import synthetic, vision_models, vision_records
from tests.feedback import test_distill_file
from tests.judging.stub_server import serving


lines, run = test_distill_file.lines, test_distill_file.run
scene = test_distill_file.scene

ENDS = '[" ", "e", "a", "s"]'
"""What ends an answer of random weights soon."""


@pytest.fixture
def seeing(tmp_path: Path) -> Path:
    return vision_models.write("qwen2_5_vl", tmp_path / "sees")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """Return prompts with pictures, without, and as a plain text with one."""
    rows = vision_records.records("qwen2_5_vl", tmp_path, 4)
    rows = [{k: row[k] for k in ("prompt", "images") if k in row} for row in rows]
    rows.append({"prompt": [{"role": "user", "content": "and now?"}], "benign": True})
    return synthetic.write_jsonl(tmp_path / "prompts.jsonl", rows)


def command(
    name: str, model: Path, data: Path, out: Path, *flags: str, **more: Any
) -> int:
    rules = data.with_name("rules.md")
    rules.write_text("Zyx wvu tsr qpo.\n")
    who = "teacher" if name == "distill" else "model"
    options = {who: model, "data": data, "out": out, "context": rules}
    options |= {"batch_slots": 3, **more}
    return run(*flags, *(f"--{k}={v}" for k, v in options.items()), command=name)


def answers(out: Path) -> dict[int, list[dict[str, Any]]]:
    """Return what the teacher said to prompts of which no answer was kept."""
    dropped = lines(Path(f"{out}.dropped.jsonl"))
    return {one["index"]: one["answers"] for one in dropped}


def test_it_answers_as_generate_does(seeing: Path, prompts: Path, capsys) -> None:
    """Of pictures and plain texts too; and a benign prompt is told nothing."""
    out, told = prompts.with_name("sft.jsonl"), prompts.with_name("told.jsonl")
    short = {"temperature": 0.0, "max_new_tokens": 5}
    assert command("distill", seeing, prompts, out, **short) == 2
    assert "5 cut off" in capsys.readouterr().err
    said = [answers(out)[n][0]["text"] for n in range(5)]
    assert command("generate", seeing, prompts, told, **short) == 0
    expected = [one["completions"][0]["text"].strip() for one in lines(told)]
    assert said[:4] == expected[:4]
    plain = prompts.with_name("plain.jsonl")
    flags = {"model": seeing, "data": prompts, "out": plain, **short}
    assert run(*(f"--{k}={v}" for k, v in flags.items()), command="generate") == 0
    assert said[4] == lines(plain)[4]["completions"][0]["text"].strip()


def test_a_run_that_goes_on_writes_the_same_bytes(
    seeing: Path, prompts: Path, capsys
) -> None:
    drawn = {"num_samples": 3, "stop": ENDS, "max_new_tokens": 30, "seed": 3}
    out = prompts.with_name("sft.jsonl")
    assert command("distill", seeing, prompts, out, **drawn) == 0
    capsys.readouterr()
    files = [out, Path(f"{out}.dropped.jsonl")]
    whole = [path.read_bytes() for path in files]
    assert whole[0]
    connection = sqlite3.connect(f"{out}.store.db")
    (count,) = connection.execute("SELECT count(*) FROM verdicts").fetchone()
    query = "SELECT key FROM verdicts ORDER BY key"
    gone = [key for (key,) in connection.execute(query)][::2]
    with connection:
        for key in gone:
            connection.execute("DELETE FROM verdicts WHERE key = ?", (key,))
    connection.close()
    assert command("distill", seeing, prompts, out, **drawn) == 0
    told = capsys.readouterr().out
    assert f"{len(gone)} asked, {count - len(gone)} known" in told
    assert [path.read_bytes() for path in files] == whole


def test_a_dry_run_counts_the_answers(seeing: Path, prompts: Path, capsys) -> None:
    out = prompts.with_name("sft.jsonl")
    assert command("distill", seeing, prompts, out, "--dry_run") == 0
    told = capsys.readouterr().out
    assert "teacher: to make: 5 answers, in this process" in told
    assert "judge" not in told and not [*out.parent.glob("sft*")]


def test_a_student_trains_and_sees_no_word_of_the_context(
    scene, seeing: Path, capsys
) -> None:
    with serving(say=test_distill_file.say) as stub:
        assert run(*test_distill_file.flags(scene, stub)) == 0
    out = str(scene.out)
    shown = ("data", "check", out, "--model", str(seeing), "--objective.name", "sft")
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main([*shown, "--examples", "6"])
    told = capsys.readouterr().out
    assert not stopped.value.code and told.count("\n--- ") == 6
    assert "What a risk it is to ask one." in told and "Risky one?" in told
    assert "system" not in told and "remarks" not in told and "Somebody" not in told
    training = {"model": seeing, "data": out, "out": scene.folder / "run"}
    training |= {"objective.name": "sft", "max_steps": 2, "row_length": 256}
    training |= {"batch_rows": 1, "report_to": "none"}
    assert run(*(f"--{k}={v}" for k, v in training.items()), command="train") == 0
    metrics = (scene.folder / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(metrics[-1])["step"] == 2
