"""What the server understands beyond sampling: structures, penalties, tools, keys."""

import dataclasses
import functools
import http.client
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import openai
import pydantic
import pytest
from prometheus_client.parser import text_string_to_metric_families

from jaxalign.cli import serve as serve_command
from jaxalign.cli.main import main
from jaxalign.data.rendering import Renderer
from jaxalign.errors import UserError
from jaxalign.generation import text_model
from jaxalign.generation.serving import access, neutral, service, wire
from jaxalign.generation.steering import Masks, Steering
from jaxalign.generation.structure import choice, grammar, json_schema, regex
from tests.generation.scenes import TURNS, alone, serving, tokens_of, until


SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "answer": {"enum": ["yes", "好", "no"]},
        "score": {"type": "integer", "minimum": 0, "maximum": 4},
    },
    "required": ["answer", "score"],
    "additionalProperties": False,
}
FORMAT = {
    "type": "json_schema",
    "json_schema": {"name": "verdict", "schema": SCHEMA, "strict": True},
}
AB = 'start: "a" b\nb: "b" "好"?'
GBNF = 'root ::= "a" | "b"'
CHAT: dict[str, Any] = {"model": "tiny", "messages": TURNS, "max_tokens": 150}
TEXT: dict[str, Any] = {"model": "tiny", "prompt": "the answer", "max_tokens": 150}


def test_a_schema_is_kept_to_and_streamed(served, client) -> None:
    """As the engine keeps to it, and so that everything is valid."""
    options: dict[str, Any] = {**CHAT, "n": 6, "seed": 5, "response_format": FORMAT}
    made = client.chat.completions.create(**options)
    steering = Steering(structure=json_schema(SCHEMA))
    want = alone(
        *(served, tokens_of(served, TURNS)),
        steering=steering,
        num_samples=6,
        max_new_tokens=150,
        seed=5,
    )
    texts = [choice.message.content for choice in made.choices]
    assert texts == [completion.text for completion in want]
    for choice_, text in zip(made.choices, texts, strict=True):
        assert choice_.finish_reason == "stop"
        jsonschema.validate(json.loads(text), SCHEMA)
    pieces = {n: "" for n in range(6)}
    for chunk in client.chat.completions.create(**options, stream=True):
        for one in chunk.choices:
            pieces[one.index] += one.delta.content or ""
    assert list(pieces.values()) == texts


class Verdict(pydantic.BaseModel):
    """What the official client turns into a schema, and an answer into."""

    better: bool
    score: int = pydantic.Field(ge=0, le=4)


def test_the_official_client_parses_what_it_asked_for(client) -> None:
    made = client.chat.completions.parse(
        model="tiny", messages=TURNS, response_format=Verdict, max_tokens=150, seed=1
    )
    verdict = made.choices[0].message.parsed
    assert isinstance(verdict, Verdict) and 0 <= verdict.score <= 4


@pytest.mark.parametrize(
    ("field", "structure"),
    [
        ({"guided_json": SCHEMA}, json_schema(SCHEMA)),
        ({"guided_json": json.dumps(SCHEMA)}, json_schema(SCHEMA)),
        ({"guided_regex": r"(ab|好)-\d"}, regex(r"(ab|好)-\d")),
        ({"guided_choice": ["yes", "no", "好"]}, choice(["yes", "no", "好"])),
        (
            {"structured_outputs": {"json": SCHEMA, "disable_any_whitespace": True}},
            json_schema(SCHEMA, one_line=True),
        ),
        ({"structured_outputs": {"regex": "[ab]{3}"}}, regex("[ab]{3}")),
        ({"structured_outputs": {"choice": ["a", "b"]}}, choice(["a", "b"])),
        ({"guided_grammar": AB}, grammar(AB)),
        ({"structured_outputs": {"grammar": GBNF}}, grammar(GBNF)),
    ],
    ids=str,
)
def test_vllm_s_ways_to_say_it(served, client, field, structure) -> None:
    made = client.completions.create(**TEXT, seed=2, extra_body=field)
    (want,) = alone(
        *(served, tokens_of(served, "the answer")),
        steering=Steering(structure=structure),
        max_new_tokens=150,
        seed=2,
    )
    assert made.choices[0].text == want.text and want.finish_reason == "stop"


def test_any_json_object(client) -> None:
    """Whatever ends is an object; what is cut says so."""
    for field in (
        {"response_format": {"type": "json_object"}},
        {"extra_body": {"structured_outputs": {"json_object": True}}},
    ):
        made = client.chat.completions.create(**CHAT, n=12, seed=3, **field)
        for one in made.choices:
            assert one.message.content.startswith("{")
            if one.finish_reason == "stop":
                assert isinstance(json.loads(one.message.content), dict)
        assert {one.finish_reason for one in made.choices} <= {"stop", "length"}


def test_structures_that_cannot_be_followed(client) -> None:
    for field, param in (
        ({"guided_regex": "(?=a)b"}, "guided_regex"),
        ({"guided_json": {"uniqueItems": True}}, "guided_json"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs.regex"),
        ({"guided_grammar": "start: nothing"}, "guided_grammar"),
        ({"guided_grammar": "%llguidance {}\nstart: /a/"}, "guided_grammar"),
        (
            {"response_format": {**FORMAT, "json_schema": {"schema": {"not": {}}}}},
            "response_format",
        ),
    ):
        with pytest.raises(openai.BadRequestError, match="cannot be followed") as told:
            client.completions.create(**TEXT, extra_body=field)
        assert told.value.param == param


def test_a_structure_has_all_the_room_that_is_left(served, monkeypatch) -> None:
    """Where the request does not say: half an object is no use to anybody."""
    config = dataclasses.replace(served.service.config, max_new_tokens=5)
    monkeypatch.setattr(served.service, "config", config)
    body = {"model": "tiny", "messages": TURNS}
    room = 200 - len(tokens_of(served, TURNS))
    for field, most in (
        ({}, 5),
        ({"response_format": FORMAT}, room),
        ({"guided_regex": "a+", "max_tokens": 7}, 7),
    ):
        asked = wire.parse(json.dumps({**body, **field}).encode(), wire.ChatBody)
        (request,) = served.service._requests_of(asked)
        assert request.sampling.max_new_tokens == most


@pytest.mark.parametrize("stream", [False, True])
def test_a_structure_that_fails_on_the_way(served, client, monkeypatch, stream) -> None:
    advance = Masks.advance

    def fail(self: Masks, texts: Any) -> Any:
        advance(self, texts)
        return {slot: "error" for slot, _, tokens in texts if len(tokens) == 3}

    monkeypatch.setattr(Masks, "advance", fail)
    field = {"guided_regex": "[ab]{9}"}
    with pytest.raises(openai.APIError, match="guided_regex is too ambiguous"):
        made = client.completions.create(**TEXT, stream=stream, extra_body=field)
        list(made)
    monkeypatch.undo()
    until(served.is_idle, "an idle server")
    assert client.completions.create(**TEXT, extra_body=field).choices[0].text


def test_penalties_and_biases_are_the_engine_s(served, client) -> None:
    options: dict[str, Any] = {"temperature": 0.0, "max_tokens": 25}
    plain = client.chat.completions.create(model="tiny", messages=TURNS, **options)
    changed = {"presence_penalty": 1.5, "frequency_penalty": -0.7}
    made = client.chat.completions.create(
        model="tiny",
        messages=TURNS,
        **options,
        **changed,
        logit_bias={"77": 3, "9": -2},
    )
    (want,) = alone(
        *(served, tokens_of(served, TURNS)),
        steering=Steering(logit_bias=((77, 3.0), (9, -2.0)), **changed),
        temperature=0.0,
        max_new_tokens=25,
    )
    assert made.choices[0].message.content == want.text
    assert want.text != plain.choices[0].message.content
    made = client.completions.create(
        model="tiny", prompt="the", max_tokens=4, logit_bias={"60": 100}
    )
    tokenizer = served.service.made.tokenizer
    assert made.choices[0].text == tokenizer.decode([60] * 4)
    with pytest.raises(openai.BadRequestError, match="names the token 99999") as told:
        client.completions.create(model="tiny", prompt="a", logit_bias={"99999": 1})
    assert told.value.param == "logit_bias"


def test_what_ends_a_text(served, client) -> None:
    """Many stop texts, further stop tokens, no end of turn, a least length."""
    prompt = tokens_of(served, "the river")
    ask = functools.partial(
        client.completions.create,
        model="tiny",
        prompt="the river",
        temperature=0,
        max_tokens=30,
    )
    body = {"repetition_penalty": 1.8}
    options: dict[str, Any] = {"temperature": 0.0, "repetition_penalty": 1.8}
    (whole,) = alone(served, prompt, max_new_tokens=30, ends=frozenset(), **options)
    pair = re.search(r"[ -~]{2}", whole.text)
    assert pair is not None
    stops = [f"never {n}" for n in range(60)] + [pair[0]]
    made = ask(stop=stops, extra_body={**body, "ignore_eos": True})
    assert made.choices[0].text == whole.text[: pair.start()]
    stop = whole.tokens[6]
    first = whole.tokens.index(stop)
    made = ask(extra_body={**body, "stop_token_ids": [stop], "ignore_eos": True})
    assert made.choices[0].finish_reason == "stop"
    assert made.usage.completion_tokens == first + 1
    made = ask(
        extra_body={
            **{**body, "stop_token_ids": [stop], "ignore_eos": True},
            "min_tokens": first + 5,
        }
    )
    assert made.usage.completion_tokens > first + 5
    made = ask(extra_body={**body, "ignore_eos": True}, logprobs=0)
    assert made.usage.completion_tokens == 30
    assert made.choices[0].text == whole.text


def test_a_stop_text_before_the_least_length_streams_on(served, client) -> None:
    field = {"guided_regex": "(ab){8}", "min_tokens": 4}
    for stream in (False, True):
        made = client.completions.create(
            **TEXT, stop="ab", seed=1, stream=stream, extra_body=field
        )
        text = made.choices[0].text if not stream else ""
        for chunk in made if stream else ():
            text += chunk.choices[0].text
        assert text.startswith("ab") and not text.endswith("ab" * 8)
    with pytest.raises(openai.BadRequestError, match="min_tokens 300 is above"):
        client.completions.create(**TEXT, extra_body={"min_tokens": 300})


DEFAULTS: dict[str, Any] = {
    # As clients of OpenAI and of vLLM send them whatever they want.
    **{name: values[0] for name, (values, _) in neutral._ONLY.items() if values},
    **{"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "min_tokens": 0},
    **{"presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}},
    **{"stop": [], "stop_token_ids": [], "ignore_eos": False, "stream": False},
    **{"service_tier": "auto", "prompt_cache_key": "k", "safety_identifier": "u"},
    **{"request_id": "r", "priority": 0, "cache_salt": "s", "prediction": None},
    **{"guided_json": None, "structured_outputs": None, "response_format": None},
    **{"user": "me", "metadata": {}, "store": False, "seed": 3, "suffix": ""},
    "guided_decoding_backend": "auto",
}


def test_neutral_values_change_nothing(served, client) -> None:
    with httpx.Client(base_url=f"{served.url}/v1/", timeout=60) as raw:
        for path, body, more in (
            (
                "chat/completions",
                {**CHAT, "max_tokens": 9},
                {
                    **{"parallel_tool_calls": True, "tool_choice": "auto"},
                    **{"add_generation_prompt": True, "continue_final_message": False},
                    **{"chat_template_kwargs": {}, "add_special_tokens": False},
                    **{"echo": False, "tools": []},
                },
            ),
            (
                "completions",
                {**TEXT, "max_tokens": 9},
                {"add_special_tokens": True, "echo": False},
            ),
        ):
            want = raw.post(path, json={**body, "seed": 3})
            made = raw.post(path, json={**body, **DEFAULTS, **more})
            assert made.status_code == 200, made.text
            assert made.json()["choices"] == want.json()["choices"]


@pytest.mark.parametrize("name", neutral._ONLY)
def test_other_values_are_refused_by_name(name) -> None:
    """Also 0 for false: what is no boolean is not what it stands for."""
    values, _ = neutral._ONLY[name]
    for value in ("something else", 0 if False in values else 7):
        if value in values and type(value) in {type(one) for one in values}:
            continue
        body = json.dumps({**TEXT, name: value}).encode()
        kind: Any = wire.CompletionBody
        if name in kind.model_fields:
            kind, body = wire.ChatBody, json.dumps({**CHAT, name: value}).encode()
        with pytest.raises(wire.ApiError, match=f"{name} is not supported") as told:
            wire.parse(body, kind)
        assert told.value.param == name and told.value.status == 400


TEMPLATE = (
    "{% if tools %}TOOLS {{ tools | tojson }}\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}"
    "{% if m.name %}({{ m.name }}){% endif %}\n{{ m.content or '' }}"
    "{% if m.reasoning_content %}({{ m.reasoning_content }}){% endif %}"
    "{% for c in m.tool_calls or [] %}CALL {{ c.function.name }}"
    " {{ c.function.arguments.city }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is false %}<none>{% endif %}{% endif %}"
)
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "of a city",
            "parameters": {"type": "object", "properties": {"city": {}}},
        },
    }
]


def call(arguments: Any) -> dict[str, Any]:
    function = {"name": "weather", "arguments": arguments}
    return {"id": "c1", "type": "function", "function": function}


TOOL_TURNS: list[Any] = [
    *TURNS,
    {"role": "assistant", "content": None, "tool_calls": [call('{"city": "Rome"}')]},
    {"role": "tool", "tool_call_id": "c1", "name": "weather", "content": "warm"},
]
# As transformers' templates take it: arguments are objects.
AS_TEMPLATES_TAKE_IT = [
    *TURNS,
    {"role": "assistant", "content": None, "tool_calls": [call({"city": "Rome"})]},
    TOOL_TURNS[-1],
]
BEGUN = [*TURNS, {"role": "assistant", "content": "It is"}]


@pytest.mark.parametrize(
    ("messages", "options", "as_given", "template_options"),
    [
        (TURNS, {"tools": TOOLS}, TURNS, {"tools": TOOLS}),
        (TURNS, {"tools": TOOLS, "tool_choice": "none"}, TURNS, {}),
        (
            *(TURNS, {"chat_template_kwargs": {"enable_thinking": False}}),
            *(TURNS, {"enable_thinking": False}),
        ),
        (TOOL_TURNS, {}, AS_TEMPLATES_TAKE_IT, {}),
        (
            [{**BEGUN[-1], "reasoning_content": "so", "refusal": None}, *TURNS],
            {},
            [{**BEGUN[-1], "reasoning_content": "so"}, *TURNS],
            {},
        ),
        (TURNS, {"add_generation_prompt": False}, TURNS, {"add": False}),
        (
            *(BEGUN, {"continue_final_message": True, "add_generation_prompt": False}),
            *(BEGUN, {"add": False, "continue_final_message": True}),
        ),
        (BEGUN, {"continue_final_message": True}, BEGUN, {"add": False, "go": True}),
        (BEGUN, {"add_generation_prompt": True}, BEGUN, {}),
    ],
    ids=str,
)
def test_prompts_are_transformers_rendering(
    served, monkeypatch, messages, options, as_given, template_options
) -> None:
    """What the engine is asked, and what /tokenize tells."""
    tokenizer = served.service.made.tokenizer
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE)
    names = {"add": "add_generation_prompt", "go": "continue_final_message"}
    given = {names.get(name, name): v for name, v in template_options.items()}
    text = tokenizer.apply_chat_template(
        as_given, tokenize=False, **{"add_generation_prompt": True, **given}
    )
    want = tokenizer(text, add_special_tokens=False)["input_ids"]
    body = {"model": "tiny", "messages": messages, **options}
    asked = wire.parse(json.dumps(body).encode(), wire.ChatBody)
    (request,) = served.service._requests_of(asked)
    assert request.tokens == want
    if "tool_choice" not in options:
        told = httpx.post(f"{served.url}/tokenize", json=body).json()
        assert told["tokens"] == want


def test_the_server_s_own_template_options(served, monkeypatch) -> None:
    """A request's come first."""
    made = served.service.made
    own = Renderer(made.tokenizer, {"enable_thinking": False})
    monkeypatch.setattr(served.service, "made", made._replace(renderer=own))
    monkeypatch.setattr(made.tokenizer, "chat_template", TEMPLATE)
    for given, count in ({}, 1), ({"enable_thinking": True}, 0):
        body = {"messages": TURNS, "chat_template_kwargs": given}
        told = httpx.post(f"{served.url}/tokenize", json=body).json()
        text = made.tokenizer.decode(told["tokens"])
        assert text.count("<none>") == count
        asked = wire.parse(
            json.dumps({**body, "model": "tiny"}).encode(), wire.ChatBody
        )
        (request,) = served.service._requests_of(asked)
        assert request.tokens == told["tokens"]


def test_an_effort_needs_a_template_that_looks_at_it(
    served, client, monkeypatch
) -> None:
    options = {**CHAT, "max_tokens": 3, "reasoning_effort": "high"}
    with pytest.raises(openai.BadRequestError, match="does not look at it") as told:
        client.chat.completions.create(**options)
    assert told.value.param == "reasoning_effort"
    template = "{{ reasoning_effort }}: {{ messages[0].content }}"
    monkeypatch.setattr(served.service.made.tokenizer, "chat_template", template)
    made = client.chat.completions.create(**options)
    want = tokens_of(served, f"high: {TURNS[0]['content']}")
    assert made.usage.prompt_tokens == len(want)


def test_tokens_of_texts_and_back(served) -> None:
    tokenizer = served.service.made.tokenizer
    ask = lambda path, **body: httpx.post(f"{served.url}/{path}", json=body)  # noqa: E731
    want = tokenizer("Über 好")["input_ids"]
    made = ask("tokenize", prompt="Über 好", return_token_strs=True).json()
    assert made == {
        "count": len(want),
        "max_model_len": 200,
        "tokens": want,
        "token_strs": tokenizer.convert_ids_to_tokens(want),
    }
    made = ask("tokenize", model="tiny", messages=TURNS).json()
    assert made["tokens"] == tokens_of(served, TURNS) and made["token_strs"] is None
    assert ask("detokenize", tokens=want).json() == {"prompt": "Über 好"}
    special = ask("detokenize", tokens=tokens_of(served, TURNS)).json()["prompt"]
    assert special.startswith("<|im_start|>user\nWhat is")
    for path, body, match in (
        ("tokenize", {}, "either a prompt or messages"),
        ("tokenize", {"prompt": "a", "messages": TURNS}, "either a prompt or messages"),
        ("tokenize", {"prompt": "a", "model": "other"}, "is not served here"),
        ("tokenize", {"promt": "a"}, "Did you mean prompt"),
        ("detokenize", {"tokens": [10**6]}, "tokens has 1000000"),
        ("detokenize", {"tokens": "x"}, "tokens: input should be a valid list"),
    ):
        refused = ask(path, **body)
        assert refused.status_code in (400, 404), refused.text
        assert match in refused.json()["error"]["message"]


KEY = "sk-made-up-for-this-test"


def test_without_the_key_nothing_is_told(tiny_llama, capfd) -> None:
    options = {"batch_slots": 8, "allowed_origins": ("https://a.example",)}
    with serving(tiny_llama, key=KEY, **options) as served:
        for given in (
            None,
            "Bearer",
            f"Bearer {KEY}x",
            f"Basic {KEY}",
            f"Bearer x{KEY}",
        ):
            headers = {} if given is None else {"Authorization": given}
            for path in ("v1/models", "metrics", "tokenize", "nowhere"):
                answer = httpx.get(f"{served.url}/{path}", headers=headers)
                assert answer.status_code == 401
                assert answer.headers["www-authenticate"] == "Bearer"
                error = answer.json()["error"]
                assert error["code"] == "invalid_api_key" and KEY not in answer.text
                assert set(error) == {"message", "type", "param", "code"}
        assert httpx.get(f"{served.url}/health").status_code == 200
        with served.client(api_key=f"{KEY}-not") as client:
            with pytest.raises(openai.AuthenticationError):
                client.models.list()
        with served.client(api_key=KEY) as client:
            assert [model.id for model in client.models.list()] == ["tiny"]
            assert client.chat.completions.create(**{**CHAT, "max_tokens": 2}).choices
        lower = httpx.get(
            f"{served.url}/v1/models", headers={"Authorization": f"bearer {KEY}"}
        )
        assert lower.status_code == 200
        # A browser asks for leave without a key; its pages may read a refusal.
        ask = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
        ask["Access-Control-Request-Headers"] = "authorization,content-type"
        answer = httpx.options(f"{served.url}/v1/chat/completions", headers=ask)
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == "https://a.example"
        assert "authorization" in answer.headers["access-control-allow-headers"].lower()
        told = httpx.get(f"{served.url}/v1/models", headers={"Origin": ask["Origin"]})
        assert told.status_code == 401
        assert told.headers["access-control-allow-origin"] == "https://a.example"
        other = httpx.options(
            f"{served.url}/v1/models", headers={**ask, "Origin": "https://b.example"}
        )
        assert other.status_code == 400
        assert "access-control-allow-origin" not in other.headers
    out, err = capfd.readouterr()
    assert KEY not in out + err


def test_no_origin_may_read_answers_by_default(served) -> None:
    headers = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
    for method in ("GET", "OPTIONS"):
        answer = httpx.request(method, f"{served.url}/v1/models", headers=headers)
        assert "access-control-allow-origin" not in answer.headers


def test_where_the_key_comes_from(tmp_path, monkeypatch) -> None:
    monkeypatch.delenv(access.KEY_VARIABLE, raising=False)
    assert access.read_key(None) is None
    monkeypatch.setenv(access.KEY_VARIABLE, "from-the-environment")
    assert access.read_key(None) == "from-the-environment"
    path = tmp_path / "key"
    path.write_text("from-a-file\n")
    assert access.read_key(str(path)) == "from-a-file"
    for text, match in (
        (" \n", "is empty: expected a key"),
        ("two\nlines", "holds no key that can be sent"),
        ("ключ", "holds no key that can be sent"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=match) as told:
            access.read_key(str(path))
        assert text.strip() == "" or text.strip() not in str(told.value)
    with pytest.raises(UserError, match="cannot be read: No such file"):
        access.read_key(str(tmp_path / "none"))
    monkeypatch.setenv(access.KEY_VARIABLE, "")
    with pytest.raises(UserError, match="JAXALIGN_API_KEY is empty"):
        access.read_key(None)


def test_options_of_the_command(tmp_path, monkeypatch, capsys) -> None:
    """An empty key ends the command before anything is loaded; names of others."""
    from jaxalign.generation.serving import server

    path = tmp_path / "key"
    path.write_text("")
    with pytest.raises(SystemExit) as stop:
        main(["serve", "--model", "none", "--port", "0", "--api_key_file", str(path)])
    assert stop.value.code == 2
    assert f"--api_key_file {path} is empty" in capsys.readouterr().err
    found: list[service.ServeConfig] = []
    monkeypatch.setattr(server, "serve", found.append)
    given = ["--model", "m", "--allowed_origins", '["http://a:1", "*"]']
    given += ["--chat_template_kwargs", '{"enable_thinking": false}']
    for name in (["--served_model_name", "mine"], ["--served_model_name=mine"]):
        assert serve_command.run([*given, *name]) == 0
    assert [config.model_name for config in found] == ["mine", "mine"]
    assert found[0].allowed_origins == ("http://a:1", "*")
    assert found[0].chat_template_kwargs == {"enable_thinking": False}
    loaded: list[Any] = []

    def load(*_: Any, **options: Any) -> None:
        loaded.append(options["template_kwargs"])
        raise UserError("far enough")

    monkeypatch.undo()
    monkeypatch.delenv(access.KEY_VARIABLE, raising=False)
    monkeypatch.setattr(text_model, "load", load)
    with pytest.raises(UserError, match="far enough"):
        server.serve(dataclasses.replace(found[0], port=0))
    assert loaded == [{"enable_thinking": False}]
    with pytest.raises(UserError, match="chat_template_kwargs: tokenize is set by"):
        service.ServeConfig(model="m", chat_template_kwargs={"tokenize": True})
    for origin in ("a.example", "https://a.example/", "https://"):
        with pytest.raises(UserError, match="must hold origins as browsers send them"):
            service.ServeConfig(model="m", allowed_origins=(origin,))


def figures(url: str) -> dict[tuple[str, ...], float]:
    answer = httpx.get(f"{url}/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): (
            sample.value
        )
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


def test_metrics(served, client) -> None:
    before = figures(served.url)
    made = client.chat.completions.create(**CHAT, n=2, extra_body={"ignore_eos": True})
    chunks = client.completions.create(model="tiny", prompt="the", stream=True, seed=1)
    count = len(list(chunks)) and client.completions.create(
        model="tiny", prompt="the", seed=1
    )
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model="tiny", prompt="")
    until(served.is_idle, "an idle server")
    after = figures(served.url)
    grown = {name: after[name] - before.get(name, 0) for name in after}
    path = "/v1/completions"
    assert grown["jaxalign_requests_total", path, "200"] == 2
    assert grown["jaxalign_requests_total", path, "400"] == 1
    assert grown["jaxalign_requests_total", "/v1/chat/completions", "200"] == 1
    tokens = made.usage.completion_tokens + 2 * count.usage.completion_tokens
    assert grown["jaxalign_completion_tokens_total",] == tokens
    read = made.usage.prompt_tokens + 2 * count.usage.prompt_tokens
    assert grown["jaxalign_prompt_tokens_total",] == read
    assert grown["jaxalign_request_seconds_count", path] == 3
    assert grown["jaxalign_request_seconds_sum", path] > 0
    assert after["jaxalign_completions_running",] == 0
    served.gate.shut()
    body = {"model": "tiny", "prompt": "a", "n": 12, "stream": True, "max_tokens": 40}
    waiting = client.completions.create(**body, extra_body={"ignore_eos": True})
    served.gate.let(4)
    until(lambda: figures(served.url)["jaxalign_completions_running",] == 8, "8 texts")
    assert figures(served.url)["jaxalign_completions_waiting",] == 4
    served.gate.open()
    assert list(waiting)


def test_a_raw_client_reads_the_stream(served) -> None:
    """By sockets and the format of server-sent events alone."""
    host, port = served.url.removeprefix("http://").split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=60)
    body = {**CHAT, "response_format": FORMAT, "stream": True, "seed": 4}
    body["stream_options"] = {"include_usage": True}
    connection.request(
        "POST",
        "/v1/chat/completions",
        json.dumps(body),
        {"Accept": "text/event-stream"},
    )
    answer = connection.getresponse()
    assert answer.status == 200
    assert answer.getheader("content-type", "").startswith("text/event-stream")
    text, usage, events = "", None, []
    for event in answer.read().decode("ascii").split("\n\n"):
        if not event:
            continue
        name, _, data = event.partition(": ")
        assert name == "data" and "\n" not in data
        events.append(data)
        if data == "[DONE]":
            continue
        chunk = json.loads(data)
        usage = chunk["usage"]
        for one in chunk["choices"]:
            text += one["delta"].get("content", "")
    connection.close()
    assert events[-1] == "[DONE]" and usage["completion_tokens"] > 3
    jsonschema.validate(json.loads(text), SCHEMA)


@pytest.mark.parametrize("kind", ["local-chat-completions", "local-completions"])
def test_lm_eval_s_clients(served, kind) -> None:
    """The harness's own classes, where it is installed, against this server."""
    if importlib.util.find_spec("lm_eval") is None:
        pytest.skip("lm_eval is not installed")
    from lm_eval.api.instance import Instance
    from lm_eval.api.registry import get_model

    chat = kind == "local-chat-completions"
    path = "chat/completions" if chat else "completions"
    model = get_model(kind)(
        model="tiny",
        base_url=f"{served.url}/v1/{path}",
        tokenizer_backend=None if chat else "huggingface",
        tokenizer=str(served.service.config.model),
        max_retries=1,
    )
    context: Any = json.dumps(TURNS) if chat else "the answer is"
    options = {"until": ["\n\n"], "max_gen_toks": 8, "temperature": 0.0}
    if chat:
        from lm_eval.models.api_models import JsonChatStr

        context = JsonChatStr(context)
    asked = Instance("generate_until", {}, (context, options), 0)
    (text,) = model.generate_until([asked])
    prompt = tokens_of(served, TURNS if chat else "the answer is")
    (want,) = alone(served, prompt, temperature=0.0, max_new_tokens=8, stop=("\n\n",))
    assert text == want.text
    if not chat:
        judged = Instance("loglikelihood", {}, ("the answer is", " not"), 0)
        ((logp, greedy),) = model.loglikelihood([judged])
        tokens = tokens_of(served, "the answer is not")
        made = served.client().completions.create(
            model="tiny", prompt=tokens, echo=True, logprobs=1, max_tokens=1
        )
        count = len(tokens) - len(prompt)
        found = made.choices[0].logprobs.token_logprobs[len(prompt) :][:count]
        assert logp == pytest.approx(sum(found), abs=1e-4) and greedy in (True, False)


def test_the_key_is_in_no_option() -> None:
    fields = service.ServeConfig.__dataclass_fields__
    assert {name for name in fields if "key" in name} == {"api_key_file"}
    assert Path(access.__file__).read_text().count("compare_digest") == 1
