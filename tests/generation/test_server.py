"""The server, by the official client: answers are the engine's, and none is lost."""

import asyncio
import json
import random
import re
import signal
import sys
import threading
from typing import Any

import httpx
import jax
import jax.numpy as jnp
import numpy as np
import openai
import pytest

from jaxalign.cli.main import main
from jaxalign.errors import UserError
from jaxalign.generation import text_model
from jaxalign.generation.engine import (
    Engine,
    Event,
    Request,
    Sampling,
)
from jaxalign.generation.serving import service, wire
from jaxalign.generation.serving.answers import Growing
from jaxalign.generation.serving.driver import Driver
from jaxalign.types import ModelInputs
from tests.generation.scenes import (
    TURNS,
    Served,
    alone,
    command,
    serving,
    tokens_of,
    until,
)


def test_models_and_health(served, client) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "jaxalign"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("owner/other")
    assert caught.value.code == "model_not_found"
    health = httpx.get(f"{served.url}/health")
    assert (health.status_code, health.json()) == (200, {"status": "ok"})


def test_a_chat_is_what_the_engine_makes(served, client) -> None:
    options: dict[str, Any] = {"model": "tiny", "messages": TURNS, "n": 2, "seed": 7}
    options |= {"max_tokens": 20, "temperature": 0.8, "top_p": 0.9, "logprobs": True}
    extra = {"top_k": 50, "repetition_penalty": 1.2}
    made = client.chat.completions.create(**options, extra_body=extra)
    assert made.object == "chat.completion" and made.model == "tiny"
    tokens = tokens_of(served, TURNS)
    want = alone(
        *(served, tokens),
        num_samples=2,
        max_new_tokens=20,
        seed=7,
        temperature=0.8,
        top_p=0.9,
        **extra,
    )
    for choice, completion in zip(made.choices, want, strict=True):
        assert choice.message.content == completion.text
        assert choice.message.role == "assistant"
        assert choice.finish_reason == completion.finish_reason
        content = choice.logprobs.content
        assert [entry.logprob for entry in content] == pytest.approx(
            completion.logps, abs=1e-4
        )
        names = [name_of(served, token) for token in completion.tokens]
        assert [entry.token for entry in content] == names
        for entry in content:
            assert entry.bytes is None or bytes(entry.bytes).decode() == entry.token
            assert entry.top_logprobs == []
    count = sum(len(completion.tokens) for completion in want)
    assert made.usage.completion_tokens == count
    assert made.usage.prompt_tokens == len(tokens)
    assert made.usage.total_tokens == len(tokens) + count


def test_parts_roles_and_nulls(served, client) -> None:
    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "it?"}]
    turns: Any = [
        {"role": "developer", "content": "Answer.", "type": "text"},
        {"role": "user", "content": parts, "name": "me"},
    ]
    made = client.chat.completions.create(
        model="tiny",
        messages=turns,
        temperature=0,
        max_completion_tokens=8,
        stop=None,
        user="me",
        frequency_penalty=0,
        response_format={"type": "text"},
    )
    same = [
        {"role": "system", "content": "Answer."},
        {"role": "user", "content": "What is it?"},
    ]
    (want,) = alone(served, tokens_of(served, same), temperature=0.0, max_new_tokens=8)
    assert made.choices[0].message.content == want.text


def test_without_a_seed_answers_differ(client) -> None:
    ask = lambda **seed: client.completions.create(  # noqa: E731
        model="tiny", prompt="the river", temperature=1.5, **seed
    )
    assert len({ask().choices[0].text for _ in range(4)}) > 1
    assert len({ask(seed=-5).choices[0].text for _ in range(3)}) == 1
    assert ask(max_tokens=3).usage.completion_tokens <= 3
    assert ask(seed=1).usage.completion_tokens <= 16


@pytest.mark.parametrize("kind", ["texts", "tokens"])
def test_completions_of_several_prompts(served, client, kind) -> None:
    prompts = ["the answer is", "Über 好", "the answer is"]
    tokens = [tokens_of(served, prompt) for prompt in prompts]
    made = client.completions.create(
        model="tiny",
        prompt=prompts if kind == "texts" else tokens,
        n=2,
        best_of=2,
        max_tokens=12,
        seed=3,
        logprobs=1,
    )
    assert [choice.index for choice in made.choices] == list(range(6))
    choices = iter(made.choices)
    for prompt in tokens:
        want = alone(served, prompt, num_samples=2, max_new_tokens=12, seed=3)
        for completion in want:
            choice = next(choices)
            assert choice.text == completion.text
            logprobs = choice.logprobs
            assert logprobs.token_logprobs == pytest.approx(completion.logps, abs=1e-4)
            assert len(logprobs.tokens) == len(completion.tokens)
            pairs = zip(logprobs.top_logprobs, logprobs.token_logprobs, strict=True)
            for best, logp in pairs:
                assert len(best) in (1, 2) and max(best.values()) >= logp
                assert logp in best.values()
            offsets = logprobs.text_offset
            assert offsets[0] == 0 and offsets == sorted(offsets)
            assert offsets[-1] <= len(choice.text)
    assert made.usage.prompt_tokens == sum(map(len, tokens))
    one = client.completions.create(model="tiny", prompt=tokens[1], temperature=0)
    (want,) = alone(served, tokens[1], temperature=0.0, max_new_tokens=16)
    assert one.choices[0].text == want.text and one.choices[0].logprobs is None


def name_of(served: Served, token: int) -> str:
    tokenizer = served.service.made.tokenizer
    text = tokenizer.decode([token])
    return tokenizer.convert_ids_to_tokens(token) if "\ufffd" in text else text


def judged(served: Served, tokens: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return log p of each token but the first, and of all tokens in its place.

    In one pass over the whole text, without a cache.
    """
    made = served.service.made
    whole = np.asarray([tokens], np.int32)
    ones = np.ones_like(whole)
    places = np.arange(len(tokens), dtype=np.int32)[None]
    arrays: Any = map(jnp.asarray, (whole, places, ones, 0 * ones))
    inputs = ModelInputs(*arrays)
    hidden = made.model.hidden_fn(made.variables, inputs)
    logps = jax.nn.log_softmax(made.model.logits_fn(made.variables, hidden)[0])
    logps = np.asarray(logps[:-1])
    return logps[np.arange(len(logps)), tokens[1:]], logps


@pytest.mark.parametrize("characters", [3, 40, 160])
def test_an_echoed_prompt_is_judged(served, client, characters) -> None:
    """As lm-eval asks for the likelihood of a text: pieces of 32 and 128 tokens."""
    text = " ".join(f"the river {n}" for n in range(20))[:characters]
    tokens = tokens_of(served, text)
    want, table = judged(served, tokens)
    made = client.completions.create(
        model="tiny", prompt=tokens, max_tokens=1, logprobs=3, echo=True, temperature=0
    )
    (choice,) = made.choices
    found, names = choice.logprobs.token_logprobs, choice.logprobs.tokens
    assert len(found) == len(names) == len(tokens) + 1
    assert found[0] is None and choice.logprobs.top_logprobs[0] is None
    assert found[1:-1] == pytest.approx(want, abs=1e-4)
    assert names[:-1] == [name_of(served, token) for token in tokens]
    for best, logps in zip(choice.logprobs.top_logprobs[1:-1], table, strict=True):
        top = np.sort(logps)[::-1][:3]
        assert sorted(best.values())[-3:] == pytest.approx(sorted(top), abs=1e-4)
        assert name_of(served, int(logps.argmax())) in best
    offsets = choice.logprobs.text_offset
    assert offsets[0] == 0 and offsets == sorted(offsets)
    assert choice.text.startswith(text) and made.usage.completion_tokens == 1
    (alone_,) = alone(served, tokens, temperature=0.0, max_new_tokens=1)
    assert choice.text == text + alone_.text
    assert found[-1] == pytest.approx(alone_.logps[0], abs=1e-4)


def test_a_prompt_alone_is_echoed_and_judged(served, client) -> None:
    prompts = ["the answer is", "Über 好"]
    made = client.completions.create(
        model="tiny", prompt=prompts, max_tokens=0, logprobs=0, echo=True, n=2
    )
    assert [choice.text for choice in made.choices] == [
        p for p in prompts for _ in "12"
    ]
    assert made.usage.completion_tokens == 0
    for choice, prompt in zip(made.choices[::2], prompts, strict=True):
        want, _ = judged(served, tokens_of(served, prompt))
        assert choice.logprobs.token_logprobs[1:] == pytest.approx(want, abs=1e-4)
        assert choice.logprobs.top_logprobs is None
        assert choice.finish_reason == "length"
    with pytest.raises(openai.BadRequestError, match="needs echo: true"):
        client.completions.create(model="tiny", prompt="x", max_tokens=0)


def test_an_echo_streams_first(served, client) -> None:
    options: dict[str, Any] = {"model": "tiny", "prompt": "the answer is", "seed": 3}
    whole = client.completions.create(**options, echo=True).choices[0].text
    chunks = list(client.completions.create(**options, echo=True, stream=True))
    assert chunks[0].choices[0].text == "the answer is"
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole
    plain = client.completions.create(**options).choices[0].text
    assert whole == "the answer is" + plain


def test_the_most_probable_tokens_of_a_chat(served, client) -> None:
    """Beside a request that wants none, and whatever the temperature is."""
    made = client.chat.completions.create(
        model="tiny",
        messages=TURNS,
        seed=2,
        temperature=1.7,
        max_tokens=10,
        logprobs=True,
        top_logprobs=20,
    )
    prompt = tokens_of(served, TURNS)
    (text,) = alone(served, prompt, seed=2, temperature=1.7, max_new_tokens=10)
    _, table = judged(served, prompt + text.tokens)
    content = made.choices[0].logprobs.content
    assert len(content) == len(text.tokens)
    for entry, logps in zip(content, table[len(prompt) - 1 :], strict=True):
        found = [best.logprob for best in entry.top_logprobs]
        assert found == pytest.approx(np.sort(logps)[::-1][:20], abs=1e-4)
        assert entry.top_logprobs[0].token == name_of(served, int(logps.argmax()))


def streamed(chunks: Any) -> tuple[dict[int, str], dict[int, list[Any]], Any]:
    """Return texts, log-probs and the last usage; check the order of chunks."""
    texts: dict[int, str] = {}
    logps: dict[int, list[Any]] = {}
    ended: set[int] = set()
    usage = None
    for chunk in chunks:
        usage = chunk.usage
        for choice in chunk.choices:
            index = choice.index
            assert index not in ended
            if hasattr(choice, "delta"):
                first = index not in texts
                assert choice.delta.role == ("assistant" if first else None)
                text = choice.delta.content or ""
                found = [e.logprob for e in getattr(choice.logprobs, "content", [])]
            else:
                text, found = (
                    choice.text,
                    getattr(choice.logprobs, "token_logprobs", []),
                )
            texts[index] = texts.get(index, "") + text
            logps.setdefault(index, []).extend(found)
            if choice.finish_reason:
                ended.add(index)
    assert ended == set(texts)
    return texts, logps, usage


def test_a_stream_is_the_same_text(client) -> None:
    options: dict[str, Any] = {"model": "tiny", "seed": 11, "max_tokens": 40, "n": 3}
    usage = {"stream_options": {"include_usage": True}}
    talk = {**options, "messages": TURNS, "logprobs": True}
    whole = client.chat.completions.create(**talk)
    chunks = client.chat.completions.create(**talk, stream=True, **usage)
    texts, logps, last = streamed(chunks)
    for choice in whole.choices:
        assert texts[choice.index] == choice.message.content
        want = [entry.logprob for entry in choice.logprobs.content]
        assert logps[choice.index] == pytest.approx(want, abs=1e-4)
    assert last == whole.usage
    write = {**options, "prompt": ["the", "好"], "logprobs": 0}
    whole = client.completions.create(**write)
    texts, logps, last = streamed(client.completions.create(**write, stream=True))
    assert texts == {choice.index: choice.text for choice in whole.choices}
    assert last is None
    for choice in whole.choices:
        want = choice.logprobs.token_logprobs
        assert logps[choice.index] == pytest.approx(want, abs=1e-4)


def test_stop_texts(served, client) -> None:
    tokens = tokens_of(served, "the river")
    options = {"temperature": 0.0, "repetition_penalty": 1.8}
    (whole,) = alone(served, tokens, max_new_tokens=30, **options)
    places = [m.start() for m in re.finditer(r"[ -~]{2}", whole.text)]
    for at in (places[0], places[len(places) // 2]):
        stops = ["never there", whole.text[at : at + 2]]
        ask: dict[str, Any] = {"model": "tiny", "prompt": "the river", "stop": stops}
        ask |= {"max_tokens": 30, "temperature": 0}
        ask["extra_body"] = {"repetition_penalty": 1.8}
        made = client.completions.create(**ask)
        assert made.choices[0].finish_reason == "stop"
        assert made.choices[0].text == whole.text[: whole.text.find(stops[1])]
        texts, _, _ = streamed(client.completions.create(**ask, stream=True))
        assert texts == {0: made.choices[0].text}


def growing(tokenizer: Any, tokens: list[int], stop: tuple[str, ...] = ()) -> list[str]:
    """Return the pieces of a text whose tokens come one by one."""
    request = Request([1], Sampling(stop=stop), frozenset())
    text = Growing(request, text_model.text_with(tokenizer))
    pieces = []
    for i, token in enumerate(tokens):
        reason = "length" if i == len(tokens) - 1 else None
        pieces.append(text.add(Event(0, 0, token, 0.0, reason)))
    return [piece.text for piece in pieces if piece is not None]


def test_pieces_are_whole_characters_and_no_part_of_a_stop(served) -> None:
    tokenizer = served.service.made.tokenizer
    text = "Über 好好 the ababac river abab"
    tokens = tokenizer(text)["input_ids"]
    pieces = growing(tokenizer, tokens)
    assert "".join(pieces) == text and not any("\ufffd" in p for p in pieces)
    assert len(pieces) > 10
    for stop in ("abac", "好 the", "ababab", "river abab", "r"):
        want = text.partition(stop)[0]
        assert "".join(growing(tokenizer, tokens, (stop, "zz"))) == want
    # Any bytes at all, and special tokens between them.
    rng = random.Random(0)
    for _ in range(100):
        some = [rng.randrange(len(tokenizer)) for _ in range(40)]
        assert "".join(growing(tokenizer, some)) == text_model.text_with(tokenizer)(
            some
        )


def test_64_at_once_get_what_each_gets_alone(served) -> None:
    def ask(client: Any, n: int) -> Any:
        options: dict[str, Any] = {"model": "tiny", "seed": n, "n": 1 + n % 2}
        options |= {"max_tokens": 5 + n % 20, "temperature": 1.2}
        if n % 3:
            turns = [{"role": "user", "content": "the river " * (n % 5 + 1)}]
            return client.chat.completions.create(messages=turns, **options)
        return client.completions.create(prompt=f"the answer {n}", **options)

    def texts(made: Any) -> list[str]:
        return [getattr(c, "text", None) or c.message.content for c in made.choices]

    async def all_of_them() -> list[Any]:
        async with served.client(openai.AsyncOpenAI) as client:
            return await asyncio.gather(*(ask(client, n) for n in range(64)))

    together = asyncio.run(all_of_them())
    with served.client() as client:
        for n in range(64):
            assert texts(ask(client, n)) == texts(together[n])
    assert all(made.usage.completion_tokens for made in together)


VALID: tuple[tuple[str, dict[str, Any]], ...] = (
    ("chat/completions", {"model": "tiny", "messages": TURNS, "max_tokens": 2}),
    ("completions", {"model": "tiny", "prompt": "the", "max_tokens": 2}),
)

HUGE = 10**30
NEVER: tuple[Any, ...] = ({}, {"a": [1]}, "x", True, [[]], -1, HUGE, -HUGE)
MALFORMED: dict[str, tuple[Any, ...]] = {
    "model": (1, [], {}, "", "tiny2", "x" * 5000, None, True),
    "max_tokens": (*NEVER, 0, 1.5, 10**6, 2**31 - 1),
    "temperature": (*NEVER[:-3], HUGE, -0.1, float("nan"), float("inf"), [0.5]),
    "top_p": (*NEVER, 1.01, float("-inf")),
    "n": (*NEVER, 0, 129, 2.5),
    "seed": (*NEVER[:5], 0.5, HUGE),
    "stop": (1, {}, True, "", [""], ["a"] * 300, [1], "x" * 2000, [["a"]]),
    "stream": (1, "true", [], {}),
    "stream_options": ({"include_usage": True}, 1, [], {"what": 1}),
    "top_k": (*NEVER[:5], -2, HUGE, -HUGE, 0.5),
    "min_p": (*NEVER, 2),
    "repetition_penalty": (*NEVER, 0),
    "user": (1, [], {}),
    "metadata": (1, "x", []),
    "frequency_penalty": (2.5, "x", [], {}),
    "presence_penalty": (-2.5, "x", [], {}),
    "logit_bias": ({"5": 101}, {"x": 1}, {"-1": 1}, {"999999": 1}, {"5": "x"}, [], 1),
    "min_tokens": (*NEVER, 3, 0.5),
    "ignore_eos": (1, "x", []),
    "stop_token_ids": (1, ["x"], [-1], {}),
    "use_beam_search": (True, 0, "x"),
    "guided_regex": (1, [], "(", "(?=a)b", r"a\1"),
    "guided_choice": ("x", [], [""], [1], {}),
    "guided_json": (1, [], "x", {"type": "king"}, {"uniqueItems": True}, False),
    "structured_outputs": (
        *(1, [], {"json": {}, "regex": "a"}, {"grammar": "("}, {"choice": []}),
        *({"regex": "("}, {"disable_additional_properties": True}),
    ),
    "tools": ([{"type": "function"}], "x", {}, [1]),
    "response_format": (
        *("json", [], {}, {"type": "xml"}, {"type": "json_schema"}),
        {"type": "json_object", "json_schema": {"schema": {}}},
        {"type": "json_schema", "json_schema": {"schema": {"type": "king"}}},
        {"type": "json_schema", "json_schema": {"schema": [1]}},
        {"type": "json_schema", "json_schema": {"name": "x"}},
    ),
    "temprature": (1,),
    "": (1, {}),
    "好" * 100: (1,),
}
MALFORMED_IN = {
    "chat/completions": {
        "messages": (
            *(None, "x", 1, {}, [], [1], [[]], [{}], [None]),
            [{"role": "user"}],
            [{"content": "x"}],
            [{"role": "user", "content": 1}],
            [{"role": "king", "content": "x"}],
            [{"role": "user", "content": "x", "nmae": "y"}],
            [{"role": "user", "content": []}],
            [{"role": "user", "content": [{"type": "text"}]}],
            [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
            [*TURNS, {"role": "assistant", "content": "So"}],
            [*TURNS, {"role": "assistant", "content": None}],
            [*TURNS, {"role": "assistant", "tool_calls": [{}]}],
            [{"role": "assistant", "tool_calls": [{"function": {"name": 1}}]}, *TURNS],
            [{"role": "user", "content": "the " * 500}],
            TURNS * 100,
        ),
        "logprobs": (1, "yes", [], {}),
        "top_logprobs": (1, 20, -1, "x", []),
        "max_completion_tokens": (*NEVER, 3),
        "tool_choice": ("required", 1, {}),
        "chat_template_kwargs": (
            "x",
            1,
            [],
            {"tokenize": True},
            {"chat_template": "x"},
        ),
        "add_generation_prompt": (1, "x", {}),
        "continue_final_message": (1, "x", {}, True),
        "reasoning_effort": ("high", 1),
        "prompt": ("x",),
    },
    "completions": {
        "prompt": (
            *(None, "", 1, {}, [], True, [""], [[]], [None], [1, "x"], ["x", 1]),
            *(
                [-1],
                [10**9],
                [HUGE],
                [1.5],
                [[1], []],
                [[1], "x"],
                [[[1]]],
                "the " * 500,
            ),
            *([5] * 500, [5] * 9999 + ["x"], ["x"] * 2049),
        ),
        "logprobs": (21, -1, True, "x", 0.5),
        "echo": ("x", 1.5),
        "suffix": ("x", 1),
        "best_of": (2, 0, "x"),
        "messages": (TURNS,),
    },
}


def malformed(rng: random.Random) -> tuple[str, bytes]:
    """Return a path and a body that must be refused."""
    path, body = rng.choice(VALID)
    whole = json.dumps(body).encode()
    how = rng.randrange(10)
    if how == 0:  # half of it
        return path, whole[: rng.randrange(len(whole))]
    if how == 1:  # no UTF-8, or no JSON
        at = rng.randrange(len(whole))
        return path, whole[:at] + rng.choice((b"\xff", b"\xc3(", b"\0")) + whole[at:]
    if how == 2:
        deep = rng.choice((b"[", b'{"a":')) * rng.choice((300, 100_000))
        other = (b"null", b"[]", b"1", b'"x"', b"", b"NaN", b"9" * 5000)
        half = b'{"model": "tiny", "prompt": "\\ud800", "messages": "\\udfff"}'
        return path, rng.choice((deep, half, *other))
    fields = {**MALFORMED, **MALFORMED_IN[path]}
    wrong = dict(body)
    name = rng.choice([*fields])
    wrong[name] = rng.choice(fields[name])
    for more in rng.sample([*fields], rng.randrange(3)):
        wrong.setdefault(more, rng.choice(fields[more]))
    return path, json.dumps(wrong).encode()


def test_1000_malformed_requests(served, client) -> None:
    rng = random.Random(0)
    with httpx.Client(base_url=f"{served.url}/v1/", timeout=60) as raw:
        for _ in range(1000):
            path, body = malformed(rng)
            answer = raw.post(path, content=body)
            assert 400 <= answer.status_code < 500, (body[:300], answer.text)
            error = answer.json()["error"]
            assert set(error) == {"message", "type", "param", "code"}
            assert error["type"] == "invalid_request_error" and error["message"]
            assert len(answer.content) < 1000, answer.text
        for path, body in VALID:
            assert raw.post(path, json=body).status_code == 200
    assert not served.engine.waiting and not served.service.driver.texts


@pytest.mark.parametrize(
    ("options", "match", "param"),
    [
        ({"temprature": 1}, "Did you mean temperature", "temprature"),
        ({"tools": [{}]}, 'hold {"type": "function", "function": {"name"', "tools"),
        (
            {"tool_choice": "required"},
            "input should be 'none' or 'auto'",
            "tool_choice",
        ),
        ({"functions": [{}]}, "functions is not supported: the server", "functions"),
        ({"frequency_penalty": 3}, "less than or equal to 2", "frequency_penalty"),
        ({"use_beam_search": True}, "Leave it out or give False", "use_beam_search"),
        ({"guided_choice": []}, "none of them empty: got a list", "guided_choice"),
        (
            {"guided_regex": "a", "response_format": {"type": "json_object"}},
            "response_format and guided_regex each say",
            "guided_regex",
        ),
        (
            {"response_format": {"type": "json_schema"}},
            "json_schema.schema is missing",
            "response_format.json_schema",
        ),
        ({"logit_bias": {"x": 1}}, "got 'x' as a token", "logit_bias"),
        ({"min_tokens": 3}, "min_tokens 3 is above max_tokens 2", "min_tokens"),
        ({"top_logprobs": 3}, "goes with logprobs: true", "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "equal to 20", "top_logprobs"),
        ({"messages": None}, "messages is missing", "messages"),
        ({"n": "x"}, "n: input should be a valid integer: got 'x'", "n"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "image_url is missing",
            "messages[0].content[0].image_url",
        ),
        (
            {"messages": [{"role": "user", "content": 3}]},
            "expected a text or a list",
            "messages[0].content",
        ),
        ({"max_completion_tokens": 3}, "mean the same", "max_tokens"),
    ],
)
def test_errors_say_what_is_wrong(options, match, param) -> None:
    body = json.dumps({**VALID[0][1], **options}).encode()
    with pytest.raises(wire.ApiError, match=re.escape(match)) as caught:
        wire.parse(body, wire.ChatBody)
    assert caught.value.param == param and caught.value.status == 400


def test_what_is_too_long(served, client) -> None:
    for options in ({"prompt": "the " * 300}, {"prompt": "a", "max_tokens": 200}):
        with pytest.raises(openai.BadRequestError, match="is 200 tokens") as caught:
            client.completions.create(model="tiny", **options)
        assert caught.value.code == "context_length_exceeded"
        assert caught.value.param == "prompt"
    answer = httpx.post(f"{served.url}/v1/completions", content=b" " * (5 * 2**20))
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "request_too_large"
    # As long as there is room for, where the request does not say.
    tokens = [5] * 190
    made = client.completions.create(model="tiny", prompt=tokens, seed=0)
    assert made.usage.completion_tokens <= 10


def test_unknown_paths_and_methods(served) -> None:
    for method, path, status in (
        ("GET", "/", 404),
        ("POST", "/v1/embeddings", 404),
        ("GET", "/v1/completions", 405),
        ("POST", "/v1/models", 405),
    ):
        answer = httpx.request(method, served.url + path)
        assert answer.status_code == status
        assert answer.json()["error"]["type"] == "invalid_request_error"


class _Done(Engine):
    """Has said everything at its first step."""

    def __init__(self) -> None:
        self._asked = 0

    @property
    def busy(self) -> bool:
        return bool(self._asked)

    def submit(self, request: Request) -> int:
        self._asked = request.sampling.num_samples
        return 0

    def step(self, *, chunks: int | None = None) -> list[Event]:
        count, self._asked = self._asked, 0
        return [Event(0, sample, 7, -1.0, "length", ()) for sample in range(count)]


def test_texts_that_are_done_before_anybody_listens() -> None:
    """A stream begins in a task of its own, which may come late."""

    async def late() -> list[Event]:
        driver = Driver(_Done(), most=8)
        driver.start()
        sampling = Sampling(max_new_tokens=1, num_samples=2)
        call = driver.submit([Request([5, 9], sampling)])
        while call.texts_left:
            await asyncio.sleep(0.01)
        found = [event async for _, event in call.events()]
        driver.stop()
        return found

    found = asyncio.run(late())
    assert [event.sample for event in found] == [0, 1]


def test_too_many_at_once(served, client, monkeypatch) -> None:
    monkeypatch.setattr(served.service.driver, "most", 12)
    served.gate.shut()
    options: dict[str, Any] = {"model": "tiny", "prompt": "the", "max_tokens": 4}
    found: list[Any] = []
    first = threading.Thread(
        target=lambda: found.append(client.completions.create(**options, n=12))
    )
    first.start()
    until(lambda: served.service.driver.texts == 12, "the first request")
    with pytest.raises(openai.RateLimitError, match="try again later") as caught:
        client.completions.create(**options)
    assert caught.value.code == "rate_limit_exceeded"
    served.gate.open()
    first.join()
    assert len(found[0].choices) == 12
    assert client.completions.create(**options).choices


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_frees_its_slots(served, stream) -> None:
    driver, gate = served.service.driver, served.gate
    gate.shut()
    body = {"model": "tiny", "prompt": "the", "max_tokens": 150, "n": 12}
    body |= {"stream": stream, "temperature": 0}
    url = f"{served.url}/v1/completions"
    if stream:
        with httpx.stream("POST", url, json=body) as answer:
            gate.let(30)
            next(answer.iter_lines())
    else:
        with pytest.raises(httpx.ReadTimeout):
            gate.let(30)
            httpx.post(url, json=body, timeout=httpx.Timeout(60, read=0.2))
    until(lambda: not driver.texts, "the request's end")
    gate.open()
    until(served.is_idle, "free slots")
    assert not any(served.engine._texts) and not served.engine.waiting
    assert gate.steps < 40


def test_an_engine_that_fails(tiny_llama) -> None:
    def fail(**_: Any) -> None:
        raise RuntimeError("out of luck")

    with serving(tiny_llama, batch_slots=2) as served, served.client() as client:
        served.gate.shut()
        options: dict[str, Any] = {"model": "tiny", "prompt": "the", "max_tokens": 90}
        options["temperature"] = 0
        chunks = client.completions.create(**options, stream=True)
        served.gate.let(5)
        next(chunks)
        found: list[Any] = []

        def ask() -> None:
            with pytest.raises(openai.InternalServerError) as caught:
                client.completions.create(**options)
            found.append(caught.value)

        other = threading.Thread(target=ask)
        other.start()
        until(lambda: served.service.driver.texts == 2, "the second request")
        served.engine.step = fail
        served.gate.open()
        other.join()
        assert found[0].status_code == 500 and found[0].code == "engine_failed"
        with pytest.raises(openai.APIError, match="the engine failed: RuntimeError"):
            list(chunks)
        assert httpx.get(f"{served.url}/health").status_code == 503
        with pytest.raises(openai.InternalServerError) as caught:
            client.completions.create(**options)
        assert caught.value.status_code == 503


def test_sigterm_drains(tiny_llama) -> None:
    options = ("--batch_slots", "2", "--max_length", "1024", "--model_name", "tiny")
    with command(tiny_llama, *options) as (process, url):
        with openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as client:
            chunks = client.completions.create(
                model="tiny", prompt="the", max_tokens=600, temperature=0, stream=True
            )
            reasons = [next(chunks).choices[0].finish_reason]
            process.send_signal(signal.SIGTERM)
            health = until(
                lambda: (h := httpx.get(f"{url}/health")).status_code == 503 and h,
                "draining",
            )
            assert health.json() == {"status": "draining"}
            with pytest.raises(openai.InternalServerError) as caught:
                client.completions.create(model="tiny", prompt="the")
            assert (caught.value.status_code, caught.value.code) == (503, "draining")
            reasons += [chunk.choices[0].finish_reason for chunk in chunks]
        assert reasons[-1] == "length" and len(reasons) > 100
        assert process.wait(60) == 0


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"port": 70000}, r"port must be in \[0, 65535\]: got 70000"),
        ({"batch_slots": 0}, "batch_slots must be at least 1"),
        ({"max_length": 1}, "max_length must be at least 2"),
        ({"max_waiting": -1}, "max_waiting must be at least 0"),
        ({"cache_dtype": "auto"}, "cache_dtype auto means nothing"),
        ({"model_name": ""}, "model_name is empty"),
    ],
)
def test_options_that_are_refused(options, match) -> None:
    with pytest.raises(UserError, match=match):
        service.ServeConfig(model="any", **options)


def test_without_the_extra_and_without_the_port(
    monkeypatch, capsys, served, tiny_llama
) -> None:
    port = served.url.rpartition(":")[2]
    with pytest.raises(SystemExit) as stop:
        main(["serve", "--model", str(tiny_llama), "--port", port])
    assert stop.value.code == 2
    assert f"cannot listen on 127.0.0.1, port {port}" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "jaxalign.generation.serving.server")
    with pytest.raises(SystemExit) as stop:
        main(["serve", "--model", "any"])
    assert stop.value.code == 2
    assert "pip install 'jaxalign[serve]'" in capsys.readouterr().err
