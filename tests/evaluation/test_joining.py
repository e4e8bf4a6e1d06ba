"""jaxalign eval --shard and join: the whole's directory, its figures, its store."""

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from jaxalign.cli.main import main
from jaxalign.errors import UserError
from jaxalign.evaluation.compare import CompareConfig, compare
from jaxalign.evaluation.config import EndpointConfig, EvalConfig, GenerationConfig
from jaxalign.evaluation.harness import evaluate
from jaxalign.evaluation.joining import join_evaluations
from jaxalign.generation.engine import Engine
from jaxalign.judging.config import JudgeConfig
from jaxalign.judging.store import Store
from tests import synthetic
from tests.evaluation import vqa_rows
from tests.judging import stops
from tests.judging.stub_server import Stub, serving


TASKS = ("chinese_simplevqa", "chinese_simplevqa@text_only")
FILES = ("answers.jsonl", "grades.jsonl", "items.jsonl", "metrics.json")


@pytest.fixture(autouse=True)
def key(monkeypatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test-4f1e9a")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    vqa_rows.write(tmp_path, 11)
    return tmp_path


def config(stub: Stub, folder: Path, out: Path, **more: Any) -> EvalConfig:
    given = {
        "tasks": ("chinese_simplevqa",),
        "conditions": ("seen", "text_only"),
        "data_dir": str(folder),
        "out": str(out),
        "endpoint": EndpointConfig(base_url=stub.url, model="m"),
        "judge": JudgeConfig(base_url=stub.url, model="judge"),
        **more,
    }
    return EvalConfig(**given)


def run(stub: Stub, folder: Path, name: str, **more: Any) -> Path:
    evaluate(config(stub, folder, folder / name, **more))
    return folder / name


def behave(question: str, before: int, body: dict[str, Any]) -> str:
    """Fail an answer of row 4 and a grade of row 9, as often as they are asked for."""
    shown = json.dumps(body, ensure_ascii=False)
    judged = "response_format" in body
    if (("第4号" in shown) and not judged) or ("第9号" in shown and judged):
        return 'status 400 {"error": {"code": "content_filter", "message": "x"}}'
    return "ok"


def dump(path: Path) -> set[Any]:
    query = (
        "SELECT key, task, vote, state, value, reason, attempts, prompt_tokens, "
        "completion_tokens FROM requests JOIN verdicts USING (key)"
    )
    with Store(path / "store.db", create=False) as store:
        return set(store.select(query))


def check_same(out: Path, want: Path, tasks: tuple[str, ...] = TASKS) -> None:
    for task in tasks:
        for name in FILES:
            assert (out / task / name).read_bytes() == (want / task / name).read_bytes()
    assert (out / "settings.json").read_bytes() == (want / "settings.json").read_bytes()
    assert dump(out) == dump(want)


def command(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    return int(stopped.value.code or 0)


def test_joined_parts_are_the_evaluation_of_the_whole(folder, capsys) -> None:
    """Figures, intervals, failures, page, store; and compare sees no difference."""
    with serving(behave, say=vqa_rows.say) as stub:
        want = run(stub, folder, "whole/out")
        asked = stub.total
    with serving(behave, say=vqa_rows.say) as stub:
        parts = [run(stub, folder, f"p{n}", shard=f"{n}/3") for n in range(3)]
        assert stub.total == asked
    said = json.loads((parts[0] / TASKS[0] / "metrics.json").read_text())
    assert said["n"] == 4 and "final" not in said and said["settings"]["shard"] == "0/3"
    out = folder / "out"
    order = [str(parts[n]) for n in (1, 2, 0)]
    before = [dump(part) for part in parts]
    for _ in range(2):
        assert command("join", str(out), *order) == 0
        printed = capsys.readouterr().out
        assert "joined:" in printed and "final.CO: " in printed
        assert "11 items" in printed and "page: " in printed
        check_same(out, want)
    assert [dump(part) for part in parts] == before
    figures = json.loads((want / TASKS[0] / "metrics.json").read_text())
    assert figures["n"] == 11 and figures["final"]["answer_failed"] == 1
    assert figures["final"]["judge_failed"] == 1
    assert figures["settings"]["tokens"]["answers"]["calls"] == 22
    from jaxalign.reports import evaluation

    evaluation.write(want)
    pages = [
        (place / "report.html").read_text(encoding="utf-8") for place in (out, want)
    ]
    assert pages[0] == pages[1]
    found = compare([str(out), str(want)], CompareConfig())
    questions = [q for task in found.tasks for q in task.questions]
    differences = [d.difference.value for q in questions for d in q.differences]
    assert len(differences) > 8 and {*differences} == {0.0}
    # What the command without --shard asks for again is what failed: 4 answers, and
    # the grades of 2 rows' 2 answers, which are those of both conditions.
    with serving(say=vqa_rows.say) as stub:
        run(stub, folder, "out")
        assert stub.total == 8


def test_a_sample_is_shared_and_a_part_may_be_empty(folder) -> None:
    with serving(say=vqa_rows.say) as stub:
        more: dict[str, Any] = {"limit": 3, "seed": 5, "num_samples": 2}
        want = run(stub, folder, "whole/out", **more)
        parts = [run(stub, folder, f"p{n}", shard=f"{n}/4", **more) for n in range(4)]
    assert (parts[3] / TASKS[0] / "answers.jsonl").read_bytes() == b""
    joined = join_evaluations(folder / "out", parts)
    assert [report.metrics["n"] for report in joined.reports] == [3, 3]
    check_same(folder / "out", want)


def test_a_killed_part_goes_on_by_the_command_that_join_says(folder) -> None:
    with serving(latency=0.03, say=vqa_rows.say) as stub:
        want = run(stub, folder, "whole/out", conditions=("seen",))
        first = run(stub, folder, "p0", shard="0/2", conditions=("seen",))
        there = sum(stub.answered.values())
        given = [
            *("eval", "--tasks", "chinese_simplevqa", "--data_dir", str(folder)),
            *("--out", str(folder / "p1"), "--shard", "1/2"),
            *("--endpoint.base_url", stub.url, "--endpoint.model", "m"),
            *("--judge.base_url", stub.url, "--judge.model", "judge"),
            *("--endpoint.concurrency", "1"),
        ]
        process = subprocess.Popen(stops.program(*given))
        stops.kill_when(process, lambda: sum(stub.answered.values()) >= there + 3, 300)
        parts = [first, folder / "p1"]
        with pytest.raises(UserError, match="part 1/2, has not ended") as told:
            join_evaluations(folder / "out", parts)
        assert not (folder / "out").exists()
        (again,) = re.findall("`(.*)`", str(told.value))
        before = sum(stub.answered.values())
        assert command(*shlex.split(again)[1:]) == 0
        assert sum(stub.answered.values()) - before < 20  # of 5 items' 10 + 10
    join_evaluations(folder / "out", parts)
    for name in FILES[:3]:
        files = [place / TASKS[0] / name for place in (folder / "out", want)]
        assert files[0].read_bytes() == files[1].read_bytes()
    figures = [
        json.loads((place / TASKS[0] / "metrics.json").read_text())
        for place in (folder / "out", want)
    ]
    for found in figures:  # a run counts what it asked itself
        del found["settings"]["tokens"]
    assert figures[0] == figures[1] and dump(folder / "out") == dump(want)


def test_what_is_not_one_whole_is_refused(folder, capsys) -> None:
    with serving(say=vqa_rows.say) as stub:
        a, b = (run(stub, folder, f"p{n}", shard=f"{n}/2") for n in range(2))
        whole = run(stub, folder, "whole", conditions=("seen",))
        seeds = run(stub, folder, "seeds", shard="1/2", seed=3)
        some = run(stub, folder, "some", shard="1/2", limit=4)
        asked = stub.total
        for name, more in (
            ("whole", {"shard": "0/2", "conditions": ("seen",)}),
            ("p0", {"shard": "1/2"}),
            ("p0", {}),
            ("p0", {"shard": "0/2", "limit": 3}),
        ):
            with pytest.raises(UserError, match="of another run: .*shard"):
                run(stub, folder, name, **more)
        assert stub.total == asked
    out = folder / "out"
    for parts, said in (
        ([a], "1 of 2 parts are missing: 1/2"),
        ([a, b, a], "p0 and .*p0 are both part 0/2"),
        ([a, seeds], "made with other settings than .*p0: seed"),
        ([a, some], "made with other settings than .*p0: limit"),
        ([a, whole], "whole is no part of an evaluation"),
        ([a, folder / "none"], "none is no part of an evaluation"),
    ):
        with pytest.raises(UserError, match=said):
            join_evaluations(out, parts)
        assert not out.exists()
    with pytest.raises(UserError, match="holds something else than these parts"):
        join_evaluations(whole, [a, b])
    with pytest.raises(UserError, match="holds something else than these parts"):
        join_evaluations(a, [a, b])
    (folder / "file").write_text("x")
    with pytest.raises(UserError, match="is a file, and the parts are directories"):
        join_evaluations(folder / "file", [a, b])
    assert command("join", str(out)) == 2
    assert "expected `jaxalign join OUT PART [PART ...]`" in capsys.readouterr().err
    assert command("join", str(out), str(a), str(b), "--force") == 2


def test_data_that_has_changed_is_found_out(folder) -> None:
    """What is asked by its key, accepted answers by what the parts' files say."""
    choices = {"choices": ["small", "large"], "references": "A"}
    rows = [{"prompt": f"What is {n} + 1?", **choices} for n in range(4)]
    data = synthetic.write_jsonl(folder / "sums.jsonl", rows)

    with serving(say=lambda _: "A") as stub:
        more: dict[str, Any] = {
            "tasks": (str(data),),
            "judge": JudgeConfig(name="rules"),
        }
        parts = [run(stub, folder, f"p{n}", shard=f"{n}/2", **more) for n in range(2)]
    synthetic.write_jsonl(data, [*rows[:3], {**rows[3], "references": "B"}])
    with pytest.raises(UserError, match="items.jsonl .* item 3: the data has changed"):
        join_evaluations(folder / "out", parts)
    synthetic.write_jsonl(data, [*rows[:3], {**rows[3], "prompt": "What is 9 + 1?"}])
    with pytest.raises(UserError, match="p1 was never asked 1 of 2 requests"):
        join_evaluations(folder / "out", parts)
    synthetic.write_jsonl(data, [*rows, rows[0]])
    with pytest.raises(UserError, match="something else than|never asked"):
        join_evaluations(folder / "out", parts)
    assert not (folder / "out").exists()
    synthetic.write_jsonl(data, rows)
    report = join_evaluations(folder / "out", parts).reports[0]
    assert report.metrics["n"] == 4 and report.metrics["accuracy"]["value"] == 1


def test_equal_items_that_were_answered_differently(folder) -> None:
    """Each part's lines are its own; the store keeps one answer and says so."""
    rows = [{"prompt": "Guess.", "references": "1"} for _ in range(2)]
    data = synthetic.write_jsonl(folder / "guesses.jsonl", rows)
    said = iter("12")
    with serving(say=lambda _: next(said)) as stub:
        more: dict[str, Any] = {
            "tasks": (str(data),),
            "judge": JudgeConfig(name="rules"),
        }
        parts = [run(stub, folder, f"p{n}", shard=f"{n}/2", **more) for n in range(2)]
    joined = join_evaluations(folder / "out", parts)
    lines = (folder / "out" / "guesses" / "answers.jsonl").read_text().splitlines()
    assert [json.loads(line)["answer"] for line in lines] == ["1", "2"]
    assert joined.reports[0].metrics["exact_match"]["value"] == 0.5
    assert joined.store.differing == 1


def test_a_model_in_this_process(tiny_llama, folder, monkeypatch) -> None:
    """Neither it nor the judge is needed where the parts are joined.

    Slots and their length are those of the whole, whose longest question is in one part
    alone: so not one bit of the log-probabilities in the stores differs.
    """
    words = "one two three four five six seven".split()
    rows = [
        {"prompt": f"Say {word} {'again ' * 9 * n}", "references": word}
        for n, word in enumerate(words)
    ]
    data = synthetic.write_jsonl(folder / "words.jsonl", rows)
    model = folder / "model"
    shutil.copytree(tiny_llama, model)
    forms, make = [], Engine.__init__

    def noted(self: Engine, *given: Any, **more: Any) -> None:
        forms.append((more["slots"], more["length"]))
        make(self, *given, **more)

    monkeypatch.setattr(Engine, "__init__", noted)

    def made(name: str, **more: Any) -> Path:
        options = {"tasks": (str(data),), "model": str(model), "num_samples": 2}
        short = GenerationConfig(max_new_tokens=6)
        evaluate(
            EvalConfig(out=str(folder / name), generation=short, **options, **more)
        )
        return folder / name

    want = made("whole/out")
    parts = [made(f"p{n}", shard=f"{n}/3") for n in range(3)]
    assert len(forms) == 4 and len({*forms}) == 1 and forms[0][0] == 2 * len(words)
    shutil.rmtree(model)
    join_evaluations(folder / "out", parts)
    check_same(folder / "out", want, ("words",))
