"""A function of the user's as the judge: what it gets, what it may give, and fails."""

import asyncio
import json
import textwrap
from pathlib import Path
from typing import Any

import pytest

from jaxalign.errors import UserError
from jaxalign.judging import function, prompts
from jaxalign.judging.config import JudgeConfig
from jaxalign.judging.graders import YES_OR_NO, closed, texts
from jaxalign.judging.judge import JudgeRequest, Subject, Verdict, request_key
from jaxalign.judging.legibility import FIRST
from jaxalign.judging.make import make_judge
from jaxalign.judging.store import Store
from tests import synthetic
from tests.cli.test_judge import lines, pair, run, single


def written(folder: Path, text: str, name: str = "mine.py") -> str:
    path = folder / name
    path.write_text(textwrap.dedent(text))
    return str(path)


def judge(path: str, **options: Any) -> Any:
    return make_judge(JudgeConfig(name="python", path=path, **options))


def graded(asked: Any, requests: list[JudgeRequest]) -> list[Verdict]:
    async def gather() -> list[Verdict]:
        found = {n: verdict async for n, verdict in asked.grade(requests)}
        return [found[n] for n in range(len(requests))]

    return asyncio.run(gather())


def request(n: int = 0, aspects: tuple[str, ...] = ("length",)) -> JudgeRequest:
    subject = Subject(
        ({"role": "user", "content": f"Question {n}?"},),
        "One. 三个字。",
        spans=((0, 4), (5, 9)),
        aspects=aspects,
        references=("one",),
    )
    return prompts.scores_request(subject, needs_rubrics=False)


LENGTHS = """
    def judge(requests):
        return [
            {"segments": [
                {a: len(s["text"]) / 2 for a in r["aspects"]} for s in r["segments"]
            ]}
            for r in requests
        ]
"""


@pytest.mark.parametrize("kind", ["def", "async def"])
def test_a_function_gives_scores(tmp_path: Path, kind: str) -> None:
    path = written(tmp_path, LENGTHS.replace("def", kind))
    found = graded(judge(path), [request(n, ("length", "clarity")) for n in range(20)])
    want = {"segments": [{"length": 2.0, "clarity": 2.0}] * 2}
    assert [verdict.value for verdict in found] == [want] * 20
    assert {(v.attempts, v.failure) for v in found} == {(1, None)}


def test_what_the_function_is_given(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        f"""
        import json
        def judge(requests):
            with open({str(tmp_path / "seen.jsonl")!r}, "a") as file:
                file.write(json.dumps(requests) + "\\n")
            for r in requests:  # it may do with them what it likes
                r["segments"].clear()
                r["schema"].clear()
            return [{{"segments": [{{"length": 1}}, {{"length": 4}}]}}] * len(requests)
        """,
    )
    asked = [request(n) for n in range(5)]
    found = graded(judge(path, concurrency=3), asked)
    assert [v.value["segments"][1]["length"] for v in found] == [4] * 5
    calls: Any = lines(tmp_path / "seen.jsonl")
    assert [len(call) for call in calls] == [3, 2]
    assert calls[0][1] == {
        "task": "scores",
        "prompt": [{"role": "user", "content": "Question 1?"}],
        "response": "One. 三个字。",
        "segments": [
            {"start": 0, "end": 4, "text": "One."},
            {"start": 5, "end": 9, "text": "三个字。"},
        ],
        "aspects": ["length"],
        "other": None,
        "statement": None,
        "references": ["one"],
        "images": [],
        "pictures": [],
        "vote": 0,
        "messages": [dict(m) for m in asked[1].messages],
        "schema": dict(asked[1].schema),
    }


def scores_of(expression: str) -> str:
    return f"""
        import numpy as np
        def judge(requests):
            return [{{"segments": {expression}}} for r in requests]
    """


@pytest.mark.parametrize(
    ("expression", "want"),
    [
        ('[{"length": np.float32(1.5)}, {"length": np.int64(3)}]', [1.5, 3]),
        ('({"length": 0}, {"length": 4.0})', [0, 4.0]),
        ('[{"length": np.array(2.5)}, {"length": np.float64(0.1)}]', [2.5, 0.1]),
    ],
)
def test_numbers_of_any_kind_are_scores(tmp_path: Path, expression, want) -> None:
    (found,) = graded(judge(written(tmp_path, scores_of(expression))), [request()])
    assert [s["length"] for s in found.value["segments"]] == want
    # What was given, and is kept, are plain numbers.
    assert json.loads(str(found.raw)) == found.value


@pytest.mark.parametrize(
    ("expression", "match"),
    [
        ('[{"length": 4.01}, {"length": 1}]', "smaller than or equal to 4"),
        ('[{"length": -1}, {"length": 1}]', "bigger than or equal to 0"),
        ('[{"length": float("nan")}, {"length": 1}]', "not JSON"),
        ('[{"length": np.float32("inf")}, {"length": 1}]', "not JSON"),
        ('[{"length": 1}]', "at least 2 items"),
        ('[{"length": 1}] * 3', "less than or equal to 2 items|must contain.* 2"),
        ('[{"lenght": 1}] * 2', "length"),
        ('[{"length": "3"}] * 2', "must be number"),
        ('[{"length": True}] * 2', "must be number"),
        ('[{"length": None}] * 2', "must be number"),
        ('[{"length": np.ones(2)}] * 2', "no value of JSON"),
        ("r", "not JSON|must be"),
    ],
)
def test_a_wrong_reply_is_a_failed_attempt(tmp_path: Path, expression, match) -> None:
    path = written(tmp_path, scores_of(expression))
    (found,) = graded(judge(path, max_attempts=3), [request()])
    assert found.value is None and found.attempts == 3 and found.raw
    with pytest.raises(ValueError, match=f"outside the schema: .*({match})"):
        raise ValueError(found.failure)


@pytest.mark.parametrize(
    ("body", "failure"),
    [
        ("raise ValueError('no such word')", "ValueError: no such word"),
        ("return [KeyError('x') for r in requests]", "KeyError: 'x'"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("return {}['a']", "KeyError: 'a'"),
        ("return None", "expected a list of 1 replies, got NoneType"),
        ("return [{}, {}]", "expected a list of 1 replies, got list of 2"),
        ("return [None]", "outside the schema"),
    ],
)
def test_an_exception_is_a_failed_attempt(tmp_path: Path, body, failure) -> None:
    path = written(tmp_path, f"def judge(requests):\n    {body}\n")
    (found,) = graded(judge(path, max_attempts=2), [request()])
    assert found.value is None and found.attempts == 2
    assert failure in str(found.failure)


def test_what_an_exception_says_of_a_key_is_kept_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_API_KEY", "gsk_7d20b1e95c")
    path = written(
        tmp_path,
        """
        import os
        def judge(requests):
            raise OSError("401 for Bearer " + os.environ["MY_API_KEY"])
        """,
    )
    (found,) = graded(judge(path, max_attempts=1), [request()])
    assert str(found.failure).endswith("OSError: 401 for Bearer [MY_API_KEY]")


def test_the_example_of_the_documentation_runs(tmp_path: Path) -> None:
    text = str(function.__doc__).partition("::\n")[2].partition("\nIt may be")[0]
    (found,) = graded(judge(written(tmp_path, text)), [request()])
    assert [s["length"] for s in found.value["segments"]] == [4 / 25, 4 / 25]


def test_other_questions_get_their_own_values(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        """
        def judge(requests):
            values = {"claims": {"claims": ["It is."]}, "verify": {"answer": "maybe"}}
            return [values[r["task"]] for r in requests]
        """,
    )
    split = JudgeRequest("claims", (), closed(claims=texts(0, 3)), Subject("p", "r"))
    verify = JudgeRequest("verify", (), YES_OR_NO, Subject("p", "", statement="?"))
    claims, answer = graded(judge(path, max_attempts=1), [split, verify])
    assert claims.value == {"claims": ["It is."]}
    assert answer.value is None and "must be one of" in str(answer.failure)


def test_one_that_fails_its_call_fails_alone(tmp_path: Path) -> None:
    """And what fails at times is asked again."""
    path = written(
        tmp_path,
        """
        from dataclasses import dataclass
        @dataclass
        class Memory:
            calls: "int" = 0
        memory = Memory()
        def judge(requests):
            memory.calls += 1
            for r in requests:
                if "Question 2?" in r["prompt"][0]["content"]:
                    raise RuntimeError("I do not like twos")
            if memory.calls < 4:
                raise OSError("busy")
            return [{"segments": [{"length": 1}] * 2}] * len(requests)
        """,
    )
    found = graded(judge(path, max_attempts=5), [request(n) for n in range(8)])
    assert [v.failure for v in found if v.failure is not None] == [
        "the function failed: RuntimeError: I do not like twos"
    ]
    # The first call fails for all; number 0 asks alone and is told twice to wait.
    assert [v.attempts for v in found] == [4, 2, 5, 2, 2, 2, 2, 2]


def test_a_function_of_whom_nothing_can_be_read_is_stopped(tmp_path: Path) -> None:
    path = written(tmp_path, scores_of('[{"length": 40}] * 2'))
    with pytest.raises(UserError, match="none of the first 20 .*It replied.*40"):
        graded(judge(path, max_attempts=1), [request(n) for n in range(100)])
    path = written(tmp_path, "def judge(requests):\n    raise OSError('away')\n")
    found = graded(judge(path, max_attempts=1), [request(n) for n in range(3 * FIRST)])
    assert len(found) == 3 * FIRST  # nothing was answered


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("def jugde(requests): ...", "has no function judge"),
        ("judge = 3", "has no function judge"),
        ("def judge(:", "cannot be executed: SyntaxError"),
        ("import nowhere_at_all", "ModuleNotFoundError.*nowhere_at_all"),
        ("raise SystemExit", "cannot be executed: SystemExit"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, text: str, match: str) -> None:
    with pytest.raises(UserError, match=match):
        judge(written(tmp_path, text))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"path": "/nowhere.py"}, "must be a Python file.*nowhere"),
        ({}, "must be a Python file"),
        ({"path": __file__, "model": "m"}, "judge.model does nothing"),
        ({"name": "rules", "path": __file__}, "judge.path does nothing"),
        ({"path": __file__, "base_url": "http://h/v1"}, "base_url does nothing"),
    ],
)
def test_options_that_are_refused(options: Any, match: str) -> None:
    with pytest.raises(UserError, match=match):
        make_judge(JudgeConfig(**{"name": "python", **options}))


def test_another_text_is_another_judge(tmp_path: Path) -> None:
    first = written(tmp_path, LENGTHS)
    same = written(tmp_path, LENGTHS, "copy.py")
    other = written(tmp_path, LENGTHS.replace("2", "4"), "other.py")
    keys = [request_key(request(), judge(p).settings) for p in (first, same, other)]
    assert keys[0] == keys[1] != keys[2]
    config = JudgeConfig(name="python", path=first)
    assert function.settings_of(config) == judge(first).settings


def test_the_command_with_a_function(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = tmp_path / "seen"
    text = f"""
        def judge(requests):
            with open({str(seen)!r}, "a") as file:
                file.write("x" * len(requests))
            return [
                {{"segments": [{{"words": len(s["text"].split()) / 2 + r["vote"]}}
                             for s in r["segments"]]}}
                for r in requests
            ]
    """
    path = written(tmp_path, text)
    data = synthetic.write_jsonl(tmp_path / "in.jsonl", [pair(0), single(1)])
    flags = [f"--data={data}", f"--out={tmp_path / 'o.jsonl'}", "--judge.name=python"]
    flags += [f"--judge.path={path}", '--judge.aspects=["words"]', "--judge.votes=2"]
    assert run("judge", *flags) == 0
    first, second = lines(tmp_path / "o.jsonl")
    got = [s["scores"]["words"] for s in first["chosen_segments"]]
    assert got == [1.5, 1.5]  # the mean of 1 and 2
    assert [s["scores"]["words"] for s in second["completion_segments"]] == [1.0, 1.5]
    assert "mean distance 1.000" in capsys.readouterr().out
    assert len(seen.read_text()) == 6
    assert run("judge", *flags) == 0
    assert len(seen.read_text()) == 6  # the store knows
    written(tmp_path, text.replace("r in requests", "r in list(requests)"))
    assert run("judge", *flags) == 0
    assert len(seen.read_text()) == 12
    with Store(tmp_path / "o.jsonl.store.db", create=False) as store:
        ((count,),) = store.select("SELECT count(DISTINCT judge) FROM requests")
    assert count == 2
