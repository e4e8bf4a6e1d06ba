"""Replies as models write them, and judges of which none can be read."""

import json
from pathlib import Path
from typing import Any

import pytest

from jaxalign.errors import UserError
from jaxalign.feedback import annotate
from jaxalign.judging import openai
from jaxalign.judging.config import JudgeConfig
from jaxalign.judging.judge import Verdict, request_key
from jaxalign.judging.legibility import FIRST, bare
from jaxalign.judging.make import make_judge
from jaxalign.judging.store import Judgement, Store
from tests import synthetic
from tests.cli.test_judge import lines, options, pair, run, single
from tests.judging.stub_server import content, question, schema_of, serving
from tests.judging.test_openai_judge import KEY, graded, judge, requests


GOOD = {"segments": [{"safety": 3, "clarity": 3}] * 2}
BOM = "\ufeff"


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(openai, "backoff", lambda *_, **__: 0.0)


WRAPPED = {
    "fence": "```json\n$\n```",
    "fence without a name": "  ```\n$\n```\n",
    "fence in capitals and in a line": "```JSON $ ```",
    "mark": f"{BOM}$",
    "thought": "<think>\nIs it 2? {4}\n</think>\n\n$",
    "empty thought": "<think>\n\n</think>\n\n$",
    "thought that the template began": "It could be 1.\n</think>\n$",
    "all of it": f"{BOM}<think>```{{}}```</think>\n{BOM}```json\n$\n```\n",
}


@pytest.mark.parametrize("around", WRAPPED.values(), ids=list(WRAPPED))
def test_what_models_put_around_a_value_is_taken_off_and_kept(around: str) -> None:
    (request,) = requests(1)
    with serving(lambda *_: f"around {around}") as stub:
        verdict = graded(judge(stub), [request])[0]
    assert verdict.value == GOOD and verdict.attempts == 1
    assert verdict.raw == around.replace("$", json.dumps(GOOD))


@pytest.mark.parametrize(
    "reply",
    [
        'Here they are:\n```json\n{"answer": "yes"}\n```',
        '```json\n{"answer": "yes"}\n```\nor rather\n```json\n{"answer": "no"}\n```',
        '<think>{"answer": "yes"}',
        '<think>It says </think>{"answer": "yes"}</think>{"answer": "no"}',
        '{"answer": "yes"}</think>{"answer": "no"}',
        '```\n{"answer": "yes"}',
        "``````",
    ],
)
def test_what_is_not_clear_is_no_value(reply: str) -> None:
    with pytest.raises(json.JSONDecodeError):
        json.loads(bare(reply))


def test_a_value_that_speaks_of_thoughts_and_fences_is_left_alone() -> None:
    value = json.dumps({"claims": ["</think> ends it", "<think>", "```json\n{}\n```"]})
    for around in ("$", "```json\n$\n```", "<think>So.</think>$"):
        assert bare(around.replace("$", value)) == value


MESSAGES = {
    "a part": [{"type": "text", "text": "$"}],
    "parts": [
        {"type": "thinking", "thinking": [{"type": "text", "text": "Hm"}]},
        {"type": "text", "text": "```json\n"},
        {"type": "text", "text": "$\n```"},
    ],
}


@pytest.mark.parametrize("parts", MESSAGES.values(), ids=list(MESSAGES))
def test_parts_of_text_are_joined(parts: Any) -> None:
    told = json.dumps({"role": "assistant", "content": parts})
    with serving(lambda *_: f"message {told}") as stub:
        verdict = graded(judge(stub), requests(1))[0]
    assert verdict.value == GOOD
    joined = "".join(part.get("text", "") for part in parts)
    assert verdict.raw == joined.replace("$", json.dumps(GOOD))


@pytest.mark.parametrize(
    ("message", "reason", "raw"),
    [
        ({"content": "", "reasoning_content": "$"}, "only reasoning", "reasoning_con"),
        ({"content": None, "reasoning": "so"}, "only reasoning", '"reasoning": "so"'),
        ({"content": []}, "empty: the reply has no text", '{"content": []}'),
        ({"content": [{"type": "image_url"}]}, "has no text", "image_url"),
        ({"content": [{"type": "refusal", "refusal": "No."}]}, "refused", "No."),
        ({"content": f"it is {KEY}"}, "outside the schema", "it is [OPENAI_API_KEY]"),
    ],
)
def test_a_reply_without_a_value_is_kept_too(message, reason, raw) -> None:
    told = f"message {json.dumps(message)}"
    with serving(lambda *_: told) as stub:
        verdict = graded(judge(stub, max_attempts=2), requests(1))[0]
    assert verdict.value is None
    assert reason in str(verdict.failure) and raw in str(verdict.raw)
    assert KEY not in repr(verdict)


def test_a_body_with_a_byte_order_mark(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json, "dumps", _marked(json.dumps))
    with serving() as stub:
        assert graded(judge(stub), requests(1))[0].failure is None


def _marked(dumps: Any) -> Any:
    """Put a mark before whole replies."""

    def made(value: Any, *rest: Any, **more: Any) -> str:
        text = dumps(value, *rest, **more)
        whole = isinstance(value, dict) and "choices" in value
        return f"{BOM}{text}" if whole else text

    return made


@pytest.mark.parametrize("form", ["json_object", "none"])
def test_an_endpoint_without_schemas_is_told_in_the_prompt(form: str) -> None:
    (request,) = requests(1)
    with serving() as stub:
        asked = judge(stub, response_format=form)
        assert graded(asked, [request])[0].value == GOOD
    ((call,),) = stub.calls.values()
    given = call.body.get("response_format")
    assert given == (None if form == "none" else {"type": "json_object"})
    system, user = call.body["messages"]
    assert system["content"].startswith(request.messages[0]["content"])
    assert schema_of(call.body) == request.schema
    assert user == request.messages[1]
    assert asked.settings["response_format"] == form


def test_each_form_of_asking_is_another_judge() -> None:
    (request,) = requests(1)
    keys = {
        request_key(
            request, make_judge(JudgeConfig(model="m", response_format=form)).settings
        )
        for form in ("json_schema", "json_object", "none")
    }
    assert len(keys) == 3


def test_an_endpoint_that_refuses_schemas_says_what_helps() -> None:
    body = '{"error": {"message": "response_format json_schema is not supported"}}'
    with serving(lambda *_: f"status 400 {body}") as stub:
        with pytest.raises(UserError, match=r"judge\.response_format json_object, or"):
            graded(judge(stub), requests(3))


# What the code before `response_format` has called these requests in its stores.
OLD_KEYS = {
    "plain": (
        {},
        (
            "6ccba9f88d1cadb703db84c8d3023927a4727a0902aad4e175b8a4d19b6f76a7",
            "bdb7e9fa83c53876653d4de9ba2afccbe4e79ab9eff78c1639a7eec76d508111",
            "8fe754491174fe0a08541c9747053de989c4a7795c4f21f8a22ca45cdd537df6",
        ),
    ),
    "votes": (
        {"temperature": 0.7, "votes": 2},
        (
            "bea84ca7185f247acb57b5be89fc35372bfc250161afd9ff65f482ec14e9947d",
            "6596e31ae36b66e4635d34db5a76a2a9310bee7ad63cc67e17c214fbcb54a739",
            "4a76c85b3bbcf3f2ee87e63002439daad6aff15c21382f10c2f051da235482da",
            "c99696625c2dbecd8d517d446106d6b9f0856e7ad016623e306b00649f59c4b4",
            "2717914d859e9842f2756d4cee2457a948ddcdc8620d22b3ad375fe583ea46a0",
            "22a8d8f9135cab7be746d1dd91329edc6dcc41ceede774acab5445a7221ecdb2",
        ),
    ),
    "options": (
        {
            "temperature": None,
            "max_reply_tokens": 500,
            "aspects": ("safety", "clarity"),
        },
        (
            "85d84873dc6c62b5387f17d3f98cb6f304bd7d2b7e8466c266d1eefd4762cd4c",
            "da92b925e7aa775eca8a255f36a1af5279120b96b7c77e6b0a7abac28847805d",
            "7a63577632e417b663f373c6292fa9a0dd75c4f924345c58200975827e131c75",
        ),
    ),
    "rules": (
        {"name": "rules", "aspects": ("correctness",)},
        (
            "9346bc7bd8cd12391907de08cd09b7de926778713cf6a6d8d40eff6ae262fe4e",
            "c53e54cecdd9fa043901201107ac6fd82cff57473816bfeb5560dd23c50c6507",
            "afcc25f43a95531ca6422bb3c197763a07f9314847f6d69307cbac28510b6ee7",
        ),
    ),
}
OLD_ROWS = (
    pair(0),
    {
        "prompt": [{"role": "user", "content": "Wo liegt 北京?"}],
        "completion": "In China. Gewiss.",
        "label": True,
        "completion_segments": [{"start": 0, "end": 9}, {"start": 10, "end": 17}],
    },
)


@pytest.mark.parametrize("case", OLD_KEYS)
def test_the_keys_of_stores_stay_what_they_were(case: str) -> None:
    changes, keys = OLD_KEYS[case]
    config = JudgeConfig(**{"model": "m", **changes})
    settings = make_judge(config).settings
    found = [
        request_key(request, settings)
        for row in OLD_ROWS
        for request in annotate.requests_of(
            annotate.read_item(row, "here", config.scored_aspects), votes=config.votes
        )
    ]
    assert tuple(found) == keys


def test_nothing_is_asked_that_an_old_store_knows(tmp_path: Path) -> None:
    """The store has the old keys; their values are what the file gets."""
    data = synthetic.write_jsonl(tmp_path / "in.jsonl", list(OLD_ROWS))
    changes, keys = OLD_KEYS["options"]
    config = JudgeConfig(**{"model": "m", **changes})
    asked = [
        request
        for row in OLD_ROWS
        for request in annotate.requests_of(
            annotate.read_item(row, "here", config.scored_aspects)
        )
    ]
    with Store(tmp_path / "store.db") as store:
        store.add(
            [
                Judgement(key, request, Verdict({"segments": [{"safety": n}] * 2}))
                for n, (key, request) in enumerate(zip(keys, asked, strict=True))
            ],
            {"judge": "openai", "model": "m"},
        )
    flags = {
        "judge.temperature": "null",
        "judge.max_reply_tokens": 500,
        "judge.aspects": '["safety", "clarity"]',
    }
    with serving() as stub:
        assert run("judge", *options(data, stub, **flags)) == 0
        assert stub.total == 0
    first, second = lines(tmp_path / "judged.jsonl")
    for n, segments in enumerate(
        (
            first["chosen_segments"],
            first["rejected_segments"],
            second["completion_segments"],
        )
    ):
        assert [s["scores"] for s in segments] == [{"safety": n}] * 2


@pytest.mark.parametrize("behaviour", ["prose", "cut off", "html", "no choices"])
def test_a_judge_of_whom_nothing_can_be_read_is_stopped(behaviour: str) -> None:
    with serving(lambda *_: behaviour) as stub:
        asked = judge(stub, max_attempts=3, concurrency=4)
        with pytest.raises(UserError, match=f"none of the first {FIRST}") as stopped:
            graded(asked, requests(200))
    assert FIRST * 3 <= stub.total <= (FIRST + 4) * 3
    said = str(stopped.value)
    assert "judge.response_format" in said and KEY not in said and len(said) < 1000
    shown = {"prose": "Here are the scores", "html": "<html>", "cut off": '{"seg'}
    assert shown.get(behaviour, "choices") in said


@pytest.mark.parametrize("behaviour", ["500", "reset", "refusal", "status 413 long"])
def test_calls_that_fail_and_refusals_alone_stop_nothing(behaviour: str) -> None:
    with serving(lambda *_: behaviour) as stub:
        found = graded(judge(stub, max_attempts=1), requests(3 * FIRST))
    assert len(found) == 3 * FIRST and all(v.failure for v in found.values())


def test_one_reply_that_was_read_keeps_a_run_going() -> None:
    mine = requests(3 * FIRST)
    good = question({"messages": mine[FIRST - 2].messages})
    with serving(lambda q, *_: "ok" if q == good else "prose") as stub:
        found = graded(judge(stub, max_attempts=1, concurrency=1), mine)
        assert sum(v.failure is None for v in found.values()) == 1
        # The same judge is known to be legible: by its store, in another run.
        again = judge(stub, max_attempts=1)
        again.proven = True
        assert len(graded(again, mine)) == len(mine)


def test_a_stopped_run_goes_on_when_the_settings_are_mended(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An endpoint that keeps to a schema only if it stands in the prompt."""

    def behave(_: str, __: int, body: Any) -> str:
        return "prose" if "response_format" in body else "ok"

    rows = [pair(n) for n in range(15)]
    data = synthetic.write_jsonl(tmp_path / "in.jsonl", rows)
    flags = {"judge.max_attempts": 2}
    with serving(behave) as stub:
        assert run("judge", *options(data, stub, **flags)) == 2
        said = capsys.readouterr().err
        assert "none of the first 20 requests that m at http://127.0.0.1" in said
        assert "Here are the scores" in said and KEY not in said
        assert not (tmp_path / "judged.jsonl").exists()
        with Store(tmp_path / "store.db", create=False) as store:
            ((failed, replies),) = store.select(
                "SELECT count(*), count(raw) FROM verdicts WHERE state = 'failed'"
            )
        assert failed == replies >= FIRST
        mended = {**flags, "judge.response_format": "none"}
        assert run("judge", *options(data, stub, **mended)) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "0 failed responses"
    assert len(lines(tmp_path / "judged.jsonl")) == 15


def test_a_short_file_is_judged_to_its_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = synthetic.write_jsonl(tmp_path / "in.jsonl", [pair(0), single(1)])
    with serving(lambda *_: "wrong length") as stub:
        assert run("judge", *options(data, stub)) == 0
        ((raw,), *_) = (
            {content("wrong length", schema_of(calls[0].body))}
            for calls in stub.calls.values()
        )
    first, *_ = lines(tmp_path / "judged.jsonl")
    assert first["judge_failures"][0]["raw"] == raw
    assert capsys.readouterr().out.splitlines()[-1] == "3 failed responses"


def test_the_key_comes_from_the_variable_that_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = "gsk_7d20b1e95c"
    monkeypatch.setenv("GROQ_API_KEY", other)
    data = synthetic.write_jsonl(tmp_path / "in.jsonl", [pair(0)])
    with serving(lambda *_: "prose") as stub:  # which says the key that it was sent
        flags = options(data, stub, **{"judge.key_variable": "GROQ_API_KEY"})
        assert run("judge", *flags) == 0
        ((call, *_), *_) = stub.calls.values()
    assert call.headers["authorization"] == f"Bearer {other}"
    found = (tmp_path / "judged.jsonl").read_text()
    assert "Bearer [GROQ_API_KEY]" in found
    for path in tmp_path.iterdir():
        assert other.encode() not in path.read_bytes()
    monkeypatch.delenv("GROQ_API_KEY")
    config = JudgeConfig(model="m", key_variable="GROQ_API_KEY")
    with pytest.raises(UserError, match="GROQ_API_KEY is not set"):
        make_judge(config)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"key_variable": KEY}, "name of an environment variable"),
        ({"key_variable": "a1b2c3d4e5f6a7b8"}, "name of an environment variable"),
        ({"name": "rules", "key_variable": "X"}, "key_variable does nothing"),
        ({"name": "rules", "response_format": "none"}, "response_format does nothing"),
    ],
)
def test_options_that_are_refused(options: Any, match: str) -> None:
    with pytest.raises(UserError, match=match) as refused:
        JudgeConfig(**{"model": "m", **options})
    assert str(options.get("key_variable", "-")) not in str(refused.value) or (
        options["key_variable"] == "X"
    )
