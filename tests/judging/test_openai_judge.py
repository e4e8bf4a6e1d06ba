"""The judge over HTTP, against a server that fails in every way."""

import asyncio
import json
import os
import time
from collections.abc import Callable, Iterable
from typing import Any

import pytest

from jaxalign.errors import UserError
from jaxalign.judging import attempts, endpoint, openai, prompts
from jaxalign.judging.config import JudgeConfig
from jaxalign.judging.judge import JudgeRequest, Subject, Verdict
from jaxalign.judging.make import make_judge
from tests.judging import stub_server
from tests.judging.stub_server import Stub, question, serving


KEY = "sk-test-9f3a7c51d2e84b60"


@pytest.fixture(autouse=True)
def waits(monkeypatch) -> list[float]:
    """Set the key, and make waiting instant; return how long was waited."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    waited: list[float] = []

    def backoff(*arguments: Any, **named: Any) -> float:
        waited.append(attempts.backoff(*arguments, **named))
        return 0.0

    monkeypatch.setattr(openai, "backoff", backoff)
    return waited


def requests(count: int, spans: int = 2) -> list[JudgeRequest]:
    text = "One. " * spans
    ends = tuple((5 * n, 5 * n + 5) for n in range(spans))
    return [
        prompts.scores_request(
            Subject(f"prompt {n}", text, spans=ends, aspects=("safety", "clarity"))
        )
        for n in range(count)
    ]


def judge(stub: Stub, **options: Any) -> Any:
    options = {"concurrency": 8, "timeout": 20.0, "model": "m", **options}
    return make_judge(JudgeConfig(base_url=stub.url, **options))


def graded(asked: Any, these: Iterable[JudgeRequest]) -> dict[int, Verdict]:
    async def collected() -> dict[int, Verdict]:
        found: dict[int, Verdict] = {}
        async for number, verdict in asked.grade(these):
            assert number not in found
            found[number] = verdict
        return found

    return asyncio.run(collected())


def first_then_ok(*behaviours: str) -> Callable[..., str]:
    return lambda _, before, __: (
        behaviours[before] if before < len(behaviours) else "ok"
    )


def test_what_is_sent_and_what_comes_back(monkeypatch) -> None:
    monkeypatch.setenv("OPENAI_ORG_ID", "org-7")
    monkeypatch.setenv("OPENAI_PROJECT_ID", "proj_8")
    with serving() as stub:
        asked = judge(stub, max_reply_tokens=99, prompt_price=2.0, completion_price=5.0)
        (request,) = requests(1)
        verdict = graded(asked, [request])[0]
    (call,) = (call for calls in stub.calls.values() for call in calls)
    assert call.body == {
        "model": "m",
        "messages": list(request.messages),
        "temperature": 0.0,
        "max_completion_tokens": 99,
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "scores", "strict": True, "schema": request.schema},
        },
    }
    assert call.headers["authorization"] == f"Bearer {KEY}"
    assert call.headers["content-type"] == "application/json"
    assert call.headers["openai-organization"] == "org-7"
    assert call.headers["openai-project"] == "proj_8"
    assert not any(name.startswith("x-stainless") for name in call.headers)
    assert verdict.value == {"segments": [{"safety": 3, "clarity": 3}] * 2}
    assert (verdict.attempts, verdict.prompt_tokens, verdict.completion_tokens) == (
        *(1, 100),
        10,
    )
    assert verdict.cost == asked.budget.cost == pytest.approx(250e-6)


@pytest.mark.parametrize("failure", stub_server.FAILURES)
def test_every_failure_is_got_over(failure, waits) -> None:
    options = {"timeout": 0.3} if failure == "time-out" else {}
    with serving(first_then_ok(failure)) as stub:
        found = graded(judge(stub, **options), requests(3))
    assert [found[n].failure for n in range(3)] == [None] * 3
    assert {verdict.attempts for verdict in found.values()} == {2}
    assert KEY not in repr(found)
    assert len(waits) == (0 if failure in stub_server.OUTSIDE else 3)
    for told in waits:
        if failure == "429 after":
            assert 1.0 <= told <= 1.1
        elif failure == "429 date":
            assert 0.0 <= told <= 2.2
        else:
            assert 0.25 <= told <= 0.5


@pytest.mark.parametrize("failure", stub_server.FAILURES)
def test_what_always_fails_is_a_failure_and_no_score(failure) -> None:
    options = {"timeout": 0.2} if failure == "time-out" else {}
    mine = requests(3)
    bad = question({"messages": mine[1].messages})
    with serving(lambda q, *_: failure if q == bad else "ok") as stub:
        found = graded(judge(stub, max_attempts=4, **options), mine)
    assert [found[n].failure is None for n in range(3)] == [True, False, True]
    verdict = found[1]
    assert verdict.value is None and verdict.attempts == len(stub.calls[bad]) == 4
    texts = (*stub_server.OUTSIDE, "cut off", "refusal", "html", "no choices")
    assert (verdict.raw is not None) == (failure in texts)
    if failure in ("cut JSON", "out of range", "wrong length", "cut off"):
        assert verdict.raw == stub_server.content(failure, mine[1].schema)
    assert KEY not in repr(verdict)
    if failure in ("500", "prose"):  # these echo the key
        assert "[OPENAI_API_KEY]" in repr(verdict)


def test_one_repair_try_and_then_fresh_ones() -> None:
    (request,) = requests(1)
    with serving(lambda *_: "out of range") as stub:
        graded(judge(stub, max_attempts=5), [request])
    (calls,) = stub.calls.values()
    sent = [call.body["messages"] for call in calls]
    assert [len(messages) for messages in sent] == [2, 4, 2, 2, 2]
    assert all(messages[:2] == list(request.messages) for messages in sent)
    assistant, user = sent[1][2:]
    bad = stub_server.content("out of range", request.schema)
    assert assistant == {"role": "assistant", "content": bad}
    assert user["role"] == "user" and "smaller than or equal to 4" in user["content"]


def test_waits_grow_and_a_reply_that_takes_too_long_is_not_waited_for(waits) -> None:
    with serving(lambda *_: "503") as stub:
        found = graded(judge(stub, max_attempts=5), requests(1))
    assert found[0].failure == "HTTP 503: busy; you sent Bearer [OPENAI_API_KEY]"
    bounds = [(0.25, 0.5), (0.5, 1.0), (1.0, 2.0), (2.0, 4.0)]
    assert len(waits) == 4
    for (low, high), told in zip(bounds, waits, strict=True):
        assert low <= told <= high
    with serving(lambda *_: "429 after") as stub:
        found = graded(judge(stub, max_wait=0.5), requests(1))
    assert found[0].attempts == 1 and found[0].failure is not None


@pytest.mark.parametrize(
    ("status", "body", "match"),
    [
        (401, "{}", "HTTP 401.* Check OPENAI_API_KEY"),
        (403, "no", "HTTP 403: no"),
        (404, '{"error": {"message": "no model m"}}', "404: no model m. .*judge.model"),
        (400, '{"error": "unknown option"}', "400: unknown option.* all would fail"),
        (307, "", "HTTP 307.* Redirects are not followed"),
        (429, '{"error": {"code": "insufficient_quota"}}', "HTTP 429.*no credit"),
    ],
)
def test_what_no_retry_can_mend_stops_the_run(status, body, match) -> None:
    with serving(lambda *_: f"status {status} {body}") as stub:
        with pytest.raises(UserError, match=match) as stopped:
            graded(judge(stub), requests(100))
    # What may be one request's own fault is tried once more.
    assert stub.total <= (16 if status == 400 else 8)
    assert KEY not in str(stopped.value)


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (400, '{"error": {"code": "content_filter", "message": "filtered"}}'),
        (400, '{"error": {"code": "context_length_exceeded"}}'),
        (413, ""),
        (400, "This model's maximum context length is 10 tokens"),
    ],
)
def test_what_concerns_one_request_fails_it_alone(status, body) -> None:
    mine = requests(9)
    bad = question({"messages": mine[0].messages})
    fails = f"status {status} {body}"
    with serving(lambda q, *_: fails if q == bad else "ok") as stub:
        found = graded(judge(stub, concurrency=1), mine)
    assert [n for n in found if found[n].failure is not None] == [0]
    assert found[0].attempts == 1 and str(found[0].failure).startswith(f"HTTP {status}")


def test_a_bad_request_before_a_success_is_that_requests() -> None:
    """The first request of a run, and the only one that a killed run has left."""
    mine = requests(9)
    bad = question({"messages": mine[0].messages})
    with serving(lambda q, *_: "status 400 odd" if q == bad else "ok") as stub:
        found = graded(judge(stub, concurrency=2), mine)
        assert [n for n in found if found[n].failure is not None] == [0]
        again = judge(stub)
        again.proven = True  # by the store
        assert graded(again, mine[:1])[0].failure == "HTTP 400: odd"


def test_a_bad_request_after_a_success_is_that_requests() -> None:
    mine = requests(3)
    bad = question({"messages": mine[1].messages})
    with serving(lambda q, *_: "status 400 odd" if q == bad else "ok") as stub:
        found = graded(judge(stub, concurrency=1), mine)
    assert [found[n].failure for n in range(3)] == [None, "HTTP 400: odd", None]


def test_a_server_that_is_not_there_stops_the_run() -> None:
    with serving() as stub:
        pass
    with pytest.raises(UserError, match="127.0.0.1.* cannot be reached"):
        graded(judge(stub), requests(50))


def test_what_was_on_its_way_is_kept_when_the_run_stops() -> None:
    mine = requests(20)
    bad = question({"messages": mine[4].messages})

    async def collected() -> int:
        count = 0
        with pytest.raises(UserError, match="HTTP 401"):
            async for _, verdict in judge(stub).grade(mine):
                assert verdict.value is not None
                count += 1
        return count

    with serving(lambda q, *_: "status 401 x" if q == bad else "ok") as stub:
        count = asyncio.run(collected())
        assert count == sum(stub.answered.values())


def test_no_more_than_concurrency_at_once_and_drawn_as_sent() -> None:
    drawn = 0

    def lazily() -> Iterable[JudgeRequest]:
        nonlocal drawn
        for request in requests(300):
            drawn += 1
            yield request

    async def most_ahead() -> int:
        most = taken = 0
        async for _ in judge(stub, concurrency=5).grade(lazily()):
            taken += 1
            most = max(most, drawn - taken)
            if taken % 50 == 0:
                await asyncio.sleep(0.05)  # a reader that is slow
        assert taken == 300
        return most

    with serving(latency=0.002) as stub:
        assert asyncio.run(most_ahead()) <= 10
    assert stub.most_at_once == 5


@pytest.mark.parametrize(
    ("options", "name", "calls"),
    [
        ({"max_requests": 7}, "max_requests", (7, 7)),
        ({"max_total_tokens": 550}, "max_total_tokens", (5, 7)),
        ({"max_cost": 0.001, "prompt_price": 2.0}, "max_cost", (5, 7)),
    ],
)
def test_a_budget_stops_cleanly(options, name, calls) -> None:
    async def collected(asked: Any) -> int:
        count = 0
        with pytest.raises(UserError, match=f"budget is spent: judge.{name}"):
            async for _ in asked.grade(requests(50)):
                count += 1
        return count

    with serving() as stub:
        count = asyncio.run(collected(judge(stub, concurrency=3, **options)))
    assert calls[0] <= stub.total <= calls[1]
    assert count == stub.total


def test_a_budget_of_tokens_needs_a_server_that_counts_them() -> None:
    with serving(lambda *_: "no usage") as stub:
        with pytest.raises(UserError, match="does not say how many tokens"):
            graded(judge(stub, max_total_tokens=10**6), requests(50))
        assert len(graded(judge(stub), requests(5))) == 5


def test_a_break_in_the_middle_leaves_nothing_running() -> None:
    async def partly() -> None:
        answers = judge(stub).grade(requests(500))
        async for _ in answers:
            break
        await answers.aclose()
        assert asyncio.all_tasks() == {asyncio.current_task()}

    with serving(latency=0.01) as stub:
        asyncio.run(partly())


def test_an_error_of_ours_is_raised_and_not_swallowed() -> None:
    def broken() -> Iterable[JudgeRequest]:
        yield from requests(2)
        raise ZeroDivisionError

    with serving() as stub, pytest.raises(ZeroDivisionError):
        graded(judge(stub), broken())


def test_votes_get_seeds_and_settings_have_no_secret(monkeypatch) -> None:
    (request,) = requests(1)
    again = JudgeRequest(*list(vars(request).values())[:4], vote=1)
    with serving() as stub:
        asked = judge(stub, temperature=0.7)
        graded(asked, [request, again])
    (calls,) = stub.calls.values()
    assert {call.body["seed"] for call in calls} == {0, 1}
    assert KEY not in json.dumps(dict(asked.settings))
    assert "127.0.0.1" not in json.dumps(dict(asked.settings))


@pytest.mark.parametrize(
    ("url", "match"),
    [
        ("http://user:secret@h/v1", "holds a user name or password"),
        ("http://h/v1?key=secret", "has a query"),
        ("ftp://h/v1", r"no http\(s\) URL"),
        ("localhost:8000", r"no http\(s\) URL"),
        ("http://h:port/v1", "is no URL"),
        ("http://h/v1/chat/completions", "names a route"),
        ("http://example.com/v1", "unencrypted"),
    ],
)
def test_urls_that_are_refused(url, match) -> None:
    with pytest.raises(UserError, match=match) as refused:
        make_judge(JudgeConfig(base_url=url, model="m"))
    assert "secret" not in str(refused.value).replace("a secret", "")


@pytest.mark.parametrize("key", ["", "  "])
def test_a_missing_key(monkeypatch, key) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(UserError, match="OPENAI_API_KEY is not set"):
        make_judge(JudgeConfig(model="m"))
    with serving() as stub:  # a server of one's own needs none
        assert graded(judge(stub), requests(1))[0].failure is None


def test_a_key_that_cannot_be_sent_is_not_shown(monkeypatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-\n-broken")
    with pytest.raises(UserError, match="holds blanks") as refused:
        make_judge(JudgeConfig(model="m"))
    assert "broken" not in str(refused.value)


def test_a_proxy_is_for_other_machines_only(monkeypatch) -> None:
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("https_proxy", "http://proxy:3128")
    monkeypatch.setenv("http_proxy", "http://proxy:3128")
    monkeypatch.setenv("no_proxy", "inside.example")
    assert endpoint.proxy_for("https://api.openai.com/v1") == "http://proxy:3128"
    assert endpoint.proxy_for("https://inside.example/v1") is None
    assert endpoint.proxy_for("http://127.0.0.1:8000/v1") is None
    with serving() as stub:
        assert graded(judge(stub), requests(1))[0].failure is None


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"model": None}, "judge.model is missing"),
        ({"concurrency": 0}, "judge.concurrency must be at least 1"),
        ({"timeout": float("inf")}, "judge.timeout must be above 0"),
        ({"temperature": 3.0}, "judge.temperature must be in 0..2"),
        ({"aspects": ()}, "at least one aspect"),
        ({"aspects": ("clarity", "clarity")}, "each once"),
        ({"aspects": ("clarty",)}, "no 'clarty' among our rubrics.*clarity"),
        ({"max_cost": 1.0}, "needs the prices"),
        ({"name": "rules", "base_url": "http://h"}, "base_url does nothing"),
        ({"wording": "/nowhere/at/all"}, "is no directory"),
    ],
)
def test_options_that_are_refused(options, match) -> None:
    with pytest.raises(UserError, match=match):
        JudgeConfig(**{"model": "m", **options})


@pytest.mark.parametrize(
    ("headers", "want"),
    [
        ({}, None),
        ({"retry-after": "7"}, 7.0),
        ({"retry-after": "-7"}, 0.0),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "inf"}, None),
        ({"retry-after-ms": "1500", "retry-after": "9"}, 1.5),
        ({"retry-after": "Thu, 01 Jan 1970 00:01:40 GMT"}, 40.0),
    ],
)
def test_how_long_it_says_to_wait(headers, want) -> None:
    assert attempts.told_to_wait(headers, now=60.0) == want


ESCAPED = "".join(f"\\u{ord(c):04x}" if c in "-9" else c for c in KEY)


def test_a_key_in_escapes_is_taken_out_too() -> None:
    """JSON undoes the escapes after the text was searched."""
    body = f'{{"error": {{"message": "Bearer {ESCAPED}"}}}}'
    with serving(lambda *_: f"status 413 {body}") as stub:
        found = graded(judge(stub), requests(1))
    assert found[0].failure == "HTTP 413: Bearer [OPENAI_API_KEY]"
    with serving(lambda *_: f"status 401 {body}") as stub:
        with pytest.raises(UserError, match="Bearer .OPENAI_API_KEY") as stopped:
            graded(judge(stub), requests(1))
    assert KEY not in str(stopped.value)
    key = endpoint.Key(KEY, "OPENAI_API_KEY")
    assert endpoint.holds_key({"claims": [f"it is {KEY}"]}, key)
    assert not endpoint.holds_key({"claims": ["it is blue"]}, key)
    assert KEY not in repr(key)


def test_a_placeholder_is_no_secret() -> None:
    assert endpoint.without_key("fox", endpoint.Key("x", "OPENAI_API_KEY")) == "fox"


def test_a_proxy_never_sees_the_key(monkeypatch) -> None:
    """Nor does anybody see the proxy's password."""
    seen: list[bytes] = []

    async def proxied(reader: asyncio.StreamReader, writer: Any) -> None:
        seen.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(b"HTTP/1.1 407 Who are you\r\nContent-Length: 0\r\n\r\n")
        writer.close()

    async def run() -> None:
        server = await asyncio.start_server(proxied, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        monkeypatch.setenv("https_proxy", f"me:hunter2@127.0.0.1:{port}")
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.delenv("NO_PROXY", raising=False)
        config = JudgeConfig(base_url="https://judge.example/v1", model="m")
        async with server:
            with pytest.raises(UserError, match="proxy .*HTTP 407") as stopped:
                async for _ in make_judge(config).grade(requests(3)):
                    raise AssertionError
        assert "hunter2" not in str(stopped.value)

    asyncio.run(run())
    assert seen and all(asked.startswith(b"CONNECT judge.example") for asked in seen)
    assert not any(KEY.encode() in asked for asked in seen)


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("OPENAI_ORG_ID", "orgé", "OPENAI_ORG_ID"),
        ("OPENAI_PROJECT_ID", "a\nb", "OPENAI_PROJECT_ID"),
        ("https_proxy", "socks5://127.0.0.1:1", "socks5: only http"),
    ],
)
def test_an_environment_that_cannot_be(monkeypatch, name, value, match) -> None:
    monkeypatch.setenv(name, value)
    monkeypatch.delenv("no_proxy", raising=False)
    config = JudgeConfig(base_url="https://judge.example/v1", model="m")
    with pytest.raises(UserError, match=match):
        graded(make_judge(config), requests(1))


def test_a_stop_does_not_wait_for_retries(monkeypatch) -> None:
    mine = requests(2)
    bad = question({"messages": mine[1].messages})
    monkeypatch.setattr(openai, "backoff", lambda *_, **__: 60.0)
    began = time.monotonic()
    with serving(lambda q, *_: "status 401 x" if q == bad else "503") as stub:
        with pytest.raises(UserError, match="HTTP 401"):
            graded(judge(stub), mine)
    assert time.monotonic() - began < 20
