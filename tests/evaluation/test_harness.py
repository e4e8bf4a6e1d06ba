"""The whole of ``jaxalign eval`` against a model and a judge with known answers."""

import json
import math
import random
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from jaxalign.cli.main import main
from jaxalign.errors import UserError
from jaxalign.evaluation.config import EvalConfig
from jaxalign.evaluation.harness import evaluate
from jaxalign.evaluation.tasks.chinese_simplevqa import CONDITIONS
from tests.evaluation import vqa_rows
from tests.judging import stops
from tests.judging.stub_server import Stub, serving


OF_THE_LINE = ("500", "503", "429", "reset", "html", "cut body", "no choices")
KEY = "sk-secret-0123456789"


def options(stub: Stub, folder: Path, out: Path, **more: Any) -> dict[str, Any]:
    return {
        "tasks": ("chinese_simplevqa",),
        "data_dir": str(folder),
        "out": str(out),
        "endpoint": {"base_url": stub.url, "model": "m", "concurrency": 16},
        "judge": {"base_url": stub.url, "model": "judge", "concurrency": 16},
        **more,
    }


def run(stub: Stub, folder: Path, out: Path, **more: Any) -> dict[str, Any]:
    from jaxalign.evaluation.config import EndpointConfig
    from jaxalign.judging.config import JudgeConfig

    given = options(stub, folder, out, **more)
    given["endpoint"] = EndpointConfig(**given["endpoint"])
    given["judge"] = JudgeConfig(**given["judge"])
    reports = evaluate(EvalConfig(**given))
    return {report.name: report.metrics for report in reports}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(x) for x in path.read_text(encoding="utf-8").splitlines()]


def wilson(k: float, n: int) -> tuple[float, float]:
    z = 1.959963984540054
    p, under = k / n, 1 + z * z / n
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / under
    middle = (p + z * z / (2 * n)) / under
    return middle - half, middle + half


def check(found: dict[str, Any], grades: list[str]) -> None:
    counts = Counter(grades)
    a, b, c = (counts[name] for name in vqa_rows.GRADES)
    n = len(grades)
    expected = {"CO": a / n, "IN": b / n, "NA": c / n, "CGA": a / (a + b)}
    expected["F"] = 2 * a / (2 * a + 2 * b + c)
    for name, value in expected.items():
        assert found[name]["value"] == pytest.approx(value, abs=1e-12), name
        assert found[name]["n"] == (a + b if name == "CGA" else n)
    for name, (k, of) in {"CO": (a, n), "IN": (b, n), "CGA": (a, a + b)}.items():
        low, high = wilson(k, of)
        assert found[name]["interval"] == pytest.approx([low, high], abs=1e-9), name
    low, high = found["F"]["interval"]
    assert 0 <= low <= expected["F"] <= high <= 1 and low < high


def test_every_figure_is_that_of_the_known_grades(tmp_path) -> None:
    rows = vqa_rows.write(tmp_path)
    with serving(say=vqa_rows.say) as stub:
        found = run(stub, tmp_path, tmp_path / "out")["chinese_simplevqa"]
    numbers = range(len(rows))
    grades = {
        q: [vqa_rows.grade_of(n, q) for n in numbers] for q in ("recognition", "final")
    }
    for question, some in grades.items():
        check(found[question], some)
        assert found[question]["judge_failed"] == 0
    joint = Counter(zip(*grades.values(), strict=True))
    short = dict(zip(vqa_rows.GRADES, ("CO", "IN", "NA"), strict=True))
    for (one, two), count in joint.items():
        assert found["joint"][short[one]][short[two]] == count
    assert sum(sum(row.values()) for row in found["joint"].values()) == len(rows)
    seen = [n for n in numbers if grades["recognition"][n] == "correct"]
    both = sum(grades["final"][n] == "correct" for n in seen)
    given = found["given"]["correct_if_recognised"]
    assert (given["value"], given["n"]) == (both / len(seen), len(seen))
    topics = {row["Topic"].split("|")[0] for row in rows}
    assert found["topics"].keys() == topics
    mine = [n for n in numbers if rows[n]["Topic"].startswith("生物")]
    check(found["topics"]["生物"]["final"], [grades["final"][n] for n in mine])
    # The mistyped twin is one with the right spelling; an id twice there is two rows.
    assert "生物|文学与神话" in found["subtopics"]
    assert found["defects"]["duplicate ids"] == 1 and found["n"] == len(rows)


def test_the_files_hold_every_answer_and_reply(tmp_path) -> None:
    rows = vqa_rows.write(tmp_path, 6)
    out = tmp_path / "out"
    with serving(say=vqa_rows.say) as stub:
        run(stub, tmp_path, out)
    place = out / "chinese_simplevqa"
    answers = lines(place / "answers.jsonl")
    assert [(a["index"], a["question"]) for a in answers] == [
        (n, q) for n in range(len(rows)) for q in ("recognition", "final")
    ]
    assert {(a["sample"], a["status"]) for a in answers} == {(0, "ok")}
    assert {a["answer"] for a in answers} == {f"答案{n}" for n in range(len(rows))}
    for grade in lines(place / "grades.jsonl"):
        want = vqa_rows.grade_of(grade["index"], grade["question"])
        assert grade["grade"] == want and grade["status"] == "ok"
        assert grade["raw"] == json.dumps({"grade": want})
    metrics = json.loads((place / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["task"] == "chinese_simplevqa" and metrics["n"] == len(rows)


@pytest.mark.parametrize("condition", CONDITIONS)
def test_nothing_of_a_row_but_what_the_condition_says_reaches_the_model(
    tmp_path, condition
) -> None:
    rows = vqa_rows.write(tmp_path)
    out = tmp_path / "out"
    with serving(say=vqa_rows.say) as stub:
        run(stub, tmp_path, out, conditions=(condition,))
        bodies = [call.body for calls in stub.calls.values() for call in calls]
    asked = [body for body in bodies if "response_format" not in body]
    judged = [body for body in bodies if "response_format" in body]
    questions = 1 if condition == "gold_object" else 2
    assert len(asked) == questions * len(rows) and len(judged) == len(asked)
    pictures = 0
    for body in asked:
        shown = json.dumps(body, ensure_ascii=False)
        number = int(shown.partition("第")[2].partition("号")[0])
        row = rows[number]
        leaks = {
            "answer": row["final_answer"],
            "object": f"宝物{number}甲",
            "desc": f"说明{number}丙",
            "url": "Secretplace",
            "id": row["ID"],
            "name": "picture",
        }
        allowed = {"gold_object": {"object"}, "caption": {"answer", "object", "desc"}}
        for what, text in leaks.items():
            there = text in shown
            if what in allowed.get(condition, set()):
                assert there or (condition == "caption" and number == 3), what
            else:
                assert not there, what
        content = body["messages"][-1]["content"]
        parts = content if isinstance(content, list) else []
        urls = [p["image_url"]["url"] for p in parts if p["type"] == "image_url"]
        assert all(url.startswith("data:image/") for url in urls)
        pictures += len(urls)
        if condition == "shuffled":
            own = tmp_path / "chinese_simplevqa/images" / row["matched_image"]
            import base64

            assert base64.b64encode(own.read_bytes()).decode() not in urls[0]
    shows = condition in ("seen", "blank", "shuffled")
    assert pictures == (len(asked) if shows else 0)
    for body in judged:  # the judge never sees pixels or addresses
        shown = json.dumps(body, ensure_ascii=False)
        assert "image_url" not in shown and "Secretplace" not in shown
    suffix = "" if condition == "seen" else f"@{condition}"
    assert (out / f"chinese_simplevqa{suffix}" / "metrics.json").is_file()


def test_failed_calls_are_counted_and_never_a_grade(tmp_path) -> None:
    rows = vqa_rows.write(tmp_path)

    def behave(question: str, before: int, body: dict[str, Any]) -> str:
        shown = json.dumps(body, ensure_ascii=False)
        number = int(shown.partition("第")[2].partition("号")[0])
        judged = "response_format" in body
        if number == 4 and not judged and "叫什么" in shown:
            return 'status 400 {"error": {"code": "content_filter", "message": "x"}}'
        if number == 9 and judged and "哪一年" in shown:
            return 'status 400 {"error": {"code": "content_filter", "message": "x"}}'
        return "ok"

    out = tmp_path / "out"
    with serving(behave, say=vqa_rows.say) as stub:
        found = run(stub, tmp_path, out)["chinese_simplevqa"]
    assert found["recognition"]["answer_failed"] == 1
    assert found["recognition"]["CO"]["n"] == len(rows) - 1
    assert found["final"]["judge_failed"] == 1 and found["final"]["NA"]["n"] == 23
    kept = [n for n in range(len(rows)) if n != 9]
    check(found["final"], [vqa_rows.grade_of(n, "final") for n in kept])
    states = {name for row in found["joint"].values() for name in row}
    assert {"judge_failed"} <= states and "answer_failed" in found["joint"]
    # What the authors' scripts print: the judge's failure is "not attempted".
    grades = Counter(vqa_rows.grade_of(n, "final") for n in kept)
    upstream = found["upstream"]["final"]
    assert upstream["NA"] == pytest.approx((grades["not_attempted"] + 1) / len(rows))
    # The same command asks for what failed, and for nothing else.
    with serving(say=vqa_rows.say) as stub:
        again = run(stub, tmp_path, out)["chinese_simplevqa"]
    assert stub.total == 3  # an answer, its grade, a grade
    check(again["final"], [vqa_rows.grade_of(n, "final") for n in range(len(rows))])


def command(
    stub: Stub, folder: Path, out: Path, file_bytes: int | None = None
) -> list[str]:
    """Return the command, of a process that can write files of so many bytes."""
    flags = [
        *("--tasks", "chinese_simplevqa", "--data_dir", str(folder)),
        *("--out", str(out), "--endpoint.base_url", stub.url, "--endpoint.model", "m"),
        *("--judge.base_url", stub.url, "--judge.model", "judge"),
        *("--judge.key_variable", "JUDGE_KEY", "--endpoint.key_variable", "MODEL_KEY"),
    ]
    return stops.program("eval", *flags, file_bytes=file_bytes)


@pytest.mark.kill
def test_failures_and_kills_lose_nothing_and_ask_nothing_twice(
    tmp_path, monkeypatch
) -> None:
    rows = vqa_rows.write(tmp_path, 60)
    monkeypatch.setenv("JUDGE_KEY", KEY + "judge")
    monkeypatch.setenv("MODEL_KEY", KEY + "model")
    chance = random.Random(5)

    def behave(question: str, before: int, body: dict[str, Any]) -> str:
        failing = chance.random() < 0.2 and before < 3
        return chance.choice(OF_THE_LINE) if failing else "ok"

    out = tmp_path / "out"
    with serving(behave, 0.05, vqa_rows.say) as stub:
        for share in (0.2, 0.7):
            least = share * 4 * len(rows)
            stops.kill_when(
                subprocess.Popen(command(stub, tmp_path, out)),
                lambda least=least: sum(stub.answered.values()) >= least,
                300,
            )
        size = (out / "store.db").stat().st_size
        full = subprocess.run(
            command(stub, tmp_path, out, size), capture_output=True, text=True
        )
        assert full.returncode == 2 and "cannot be written" in full.stderr
        assert "Traceback" not in full.stderr
        done = subprocess.run(
            command(stub, tmp_path, out), capture_output=True, text=True, check=True
        )
    place = out / "chinese_simplevqa"
    found = json.loads((place / "metrics.json").read_text(encoding="utf-8"))
    for question in ("recognition", "final"):
        check(
            found[question],
            [vqa_rows.grade_of(n, question) for n in range(len(rows))],
        )
    # What was on its way at a kill, or when the disk was full, is asked again.
    twice = [count for count in stub.answered.values() if count > 1]
    assert sum(twice) - len(twice) <= 3 * 2 * 8
    assert "evaluated" in done.stdout
    for path in out.rglob("*"):
        if path.is_file():
            assert KEY.encode() not in path.read_bytes(), path.name


def test_another_model_judge_or_prompt_is_not_mixed_in(tmp_path) -> None:
    vqa_rows.write(tmp_path, 4)
    out = tmp_path / "out"
    with serving(say=vqa_rows.say) as stub:
        run(stub, tmp_path, out)
        there = stub.total
        for change, what in (
            ({"endpoint": {"base_url": stub.url, "model": "other"}}, "model"),
            ({"judge": {"base_url": stub.url, "model": "other"}}, "judge"),
            ({"confidence": True}, "confidence"),
        ):
            with pytest.raises(UserError, match=f"of another run: {what} differs"):
                run(stub, tmp_path, out, **change)
        own = tmp_path / "own"
        own.mkdir()
        (own / "chinese_simplevqa.md").write_text("请回答:{{question}}")
        with pytest.raises(UserError, match="prompts differs"):
            run(stub, tmp_path, out, prompts=str(own))
        assert stub.total == there
        run(stub, tmp_path, tmp_path / "other", prompts=str(own))
        texts = [vqa_rows.text_of(json.loads(q)[0]) for q in stub.calls]
    assert sum(text.startswith("请回答:") for text in texts) == 8


def test_a_sample_is_seeded_and_said(tmp_path) -> None:
    vqa_rows.write(tmp_path)
    found = []
    with serving(say=vqa_rows.say) as stub:
        for place, seed in (("a", 0), ("b", 0), ("c", 1)):
            out = tmp_path / place
            metrics = run(stub, tmp_path, out, limit=8, seed=seed)["chinese_simplevqa"]
            assert metrics["n"] == 8 and metrics["settings"]["limit"] == 8
            answers = lines(out / "chinese_simplevqa/answers.jsonl")
            rows = [answer["index"] for answer in answers]
            assert rows == sorted(rows)
            found.append(set(rows))
    assert found[0] == found[1] != found[2]


def test_grades_of_a_file_need_neither_model_nor_judge(tmp_path) -> None:
    rows = vqa_rows.write(tmp_path)
    with serving(say=vqa_rows.say) as stub:
        want = run(stub, tmp_path, tmp_path / "out")["chinese_simplevqa"]
    grades = tmp_path / "out/chinese_simplevqa/grades.jsonl"
    config = EvalConfig(
        tasks=("chinese_simplevqa",),
        data_dir=str(tmp_path),
        out=str(tmp_path / "again"),
        grades=str(grades),
    )
    (report,) = evaluate(config)
    for name in ("recognition", "final", "joint", "given", "topics", "upstream"):
        assert report.metrics[name] == want[name], name
    bad = tmp_path / "bad.jsonl"
    line = {"index": len(rows), "question": "final", "sample": 0, "grade": "correct"}
    bad.write_text(json.dumps(line))
    with pytest.raises(UserError, match="index must be that of one of 24 items"):
        evaluate(EvalConfig(**{**vars(config), "grades": str(bad)}))


def test_a_dry_run_sends_nothing(tmp_path, capsys) -> None:
    vqa_rows.write(tmp_path, 8)
    with serving(say=vqa_rows.say) as stub:
        given = command(stub, tmp_path, tmp_path / "out")[3:]
        with pytest.raises(SystemExit) as stop:
            main([*given, "--dry_run", "--judge.prompt_price", "2"])
        assert stop.value.code == 0 and stub.total == 0
        said = capsys.readouterr().out
        assert "8 of 8 items, 16 answers (0 in the store)" in said
        assert "cost" in said and not (tmp_path / "out").exists()
        with pytest.raises(SystemExit):
            main(given)
        with pytest.raises(SystemExit):
            main([*given, "--dry_run"])
    assert "16 answers (16 in the store), 16 judgements (16 in the store)" in (
        capsys.readouterr().out
    )


def test_several_answers_and_how_one_is_chosen(tmp_path) -> None:
    rows = vqa_rows.write(tmp_path, 5)

    def say(body: dict[str, Any]) -> str:
        if "response_format" not in body:
            number = json.dumps(body, ensure_ascii=False).partition("第")[2]
            right = body.get("seed", 0) != 0  # the first sample is wrong, two are right
            return f"{'对' if right else '错'}{number.partition('号')[0]}"
        material = json.loads(body["messages"][-1]["content"])
        if "answers" in material:
            return json.dumps({"grade": "0"})
        right = material["response"].startswith("对")
        return json.dumps({"grade": "correct" if right else "incorrect"})

    values = {}
    with serving(say=say) as stub:
        for best in (None, "majority", "judge"):
            out = tmp_path / str(best)
            found = run(stub, tmp_path, out, num_samples=3, best_of=best)
            metrics = found["chinese_simplevqa"]
            values[best] = metrics["final"]["CO"]["value"]
            assert metrics["samples"]["final"]["pass_at"]["1"][
                "value"
            ] == pytest.approx(2 / 3)
            assert metrics["samples"]["final"]["pass_at"]["2"]["value"] == 1
            assert metrics["samples"]["final"]["pass_all"]["2"][
                "value"
            ] == pytest.approx(1 / 3)
        seeds = Counter(
            call.body.get("seed")
            for calls in stub.calls.values()
            for call in calls
            if "response_format" not in call.body
        )
    assert values == {None: 0.0, "majority": 1.0, "judge": 0.0}
    assert seeds.keys() == {0, 1, 2} and len(rows) == 5


def test_stated_confidence_is_read_and_told(tmp_path) -> None:
    rows = vqa_rows.write(tmp_path, 10)

    def say(body: dict[str, Any]) -> str:
        if "response_format" in body:
            material = json.loads(body["messages"][-1]["content"])
            assert "置信度" not in material["response"]
            return json.dumps({"grade": vqa_rows.GRADES[len(material["question"]) % 2]})
        shown = json.dumps(body, ensure_ascii=False)
        assert "0 到 100" in shown
        number = int(shown.partition("第")[2].partition("号")[0])
        return "答案" if number == 0 else f"答案\n置信度: {number * 10}"

    with serving(say=say) as stub:
        found = run(stub, tmp_path, tmp_path / "out", confidence=True)
    calibration = found["chinese_simplevqa"]["calibration"]["recognition"]
    assert calibration["left_out"] == {"unparsed": 1, "not_attempted": 0}
    told = calibration["bins"]["equal_width"]
    assert sum(one["n"] for one in told) == calibration["n"] == len(rows) - 1


def test_wrong_options_are_refused_before_anything_is_asked(tmp_path, capsys) -> None:
    vqa_rows.write(tmp_path, 2)
    base = ["eval", "--data_dir", str(tmp_path), "--out", str(tmp_path / "o")]
    for given, said in (
        (["--tasks", "chinese_simplevqa"], "there is no model"),
        (["--tasks", "chinese_simplvqa", "--model", "m"], "there is no task"),
        (
            ["--tasks", "chinese_simplevqa", "--endpoint.base_url", "http://a/v1"],
            "endpoint.model is missing",
        ),
        (
            [
                *("--tasks", "chinese_simplevqa", "--endpoint.model", "m"),
                *("--conditions", "sen"),
            ],
            "there is no 'sen'",
        ),
        (
            [*("--tasks", "chinese_simplevqa", "--model", "m"), "--best_of", "judge"],
            "chooses among several",
        ),
    ):
        with pytest.raises(SystemExit) as stop:
            main([*base, *given])
        assert stop.value.code == 2
        assert said in capsys.readouterr().err
    (tmp_path / "chinese_simplevqa/images/picture1.png").unlink()
    with pytest.raises(UserError, match="no picture images/picture1.png"):
        with serving(say=vqa_rows.say) as stub:
            run(stub, tmp_path, tmp_path / "o")


def test_pictures_come_from_the_parquet_file_or_a_directory_of_their_own(
    tmp_path,
) -> None:
    import base64

    import pyarrow
    import pyarrow.parquet

    rows = vqa_rows.write(tmp_path / "published", 6)
    images = tmp_path / "published/chinese_simplevqa/images"
    with serving(say=vqa_rows.say) as stub:
        run(stub, tmp_path / "published", tmp_path / "a")
        want = set(stub.calls)
    coded = [
        base64.b64encode((images / row["matched_image"]).read_bytes()).decode()
        for row in rows
    ]
    table = {name: [row[name] for row in rows] for name in rows[0]}
    place = tmp_path / "parquet"
    place.mkdir()
    pyarrow.parquet.write_table(
        pyarrow.table({**table, "image_base64": coded}),
        place / "chinese_simplevqa.parquet",
    )
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    source = tmp_path / "published/chinese_simplevqa/chinese_simplevqa.jsonl"
    source.rename(elsewhere / source.name)
    for folder, more in ((place, {}), (elsewhere, {"image_dir": str(images)})):
        with serving(say=vqa_rows.say) as stub:
            run(stub, folder, tmp_path / f"out-{folder.name}", **more)
        assert set(stub.calls) == want
