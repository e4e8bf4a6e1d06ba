"""Requests for prose: what of a prompt's row reaches an endpoint and a checkpoint."""

import json
from pathlib import Path
from typing import Any

from jaxalign.checkpoints.renderer import open_renderer
from jaxalign.data.records import Message
from jaxalign.judging.bodies import body
from jaxalign.judging.config import JudgeConfig
from jaxalign.judging.graders import make_request, prose_request
from jaxalign.judging.in_process import prompt_of
from jaxalign.judging.judge import Subject, request_key


TURNS = [{"role": "user", "content": "Look."}]
TOOL = {"type": "function", "function": {"name": "look", "parameters": {}}}


def sent(config: JudgeConfig, subject: Subject) -> dict[str, Any]:
    request = prose_request(TURNS, subject, options={"max_tokens": 8})
    return json.loads(body(config, request, request.messages))


def test_an_endpoint_gets_tools_and_what_the_template_is_given() -> None:
    common = {"enable_thinking": True, "date": "today"}
    config = JudgeConfig(model="m", chat_template_kwargs=common)
    given = {"tools": [TOOL], "enable_thinking": False}
    made = sent(config, Subject("Look.", "", template_kwargs=given))
    assert made["tools"] == [TOOL]
    assert made["chat_template_kwargs"] == {"enable_thinking": False, "date": "today"}
    plain = sent(config, Subject("Look.", ""))
    assert "tools" not in plain and plain["chat_template_kwargs"] == common


def test_a_request_for_a_verdict_gets_none_of_it() -> None:
    subject = Subject("Look.", "", template_kwargs={"tools": [TOOL]})
    asked = make_request("verify", "verify", {}, {"type": "object"}, subject, None)
    assert "tools" not in json.loads(
        body(JudgeConfig(model="m"), asked, asked.messages)
    )


def test_what_a_template_is_given_makes_another_request() -> None:
    given = [None, {"enable_thinking": False}, {"tools": [TOOL]}]
    keys = {
        request_key(prose_request(TURNS, Subject("", "", template_kwargs=one)), {})
        for one in given
    }
    assert len(keys) == 3


def test_a_checkpoint_s_template_sees_all_of_a_turn(tiny_llama: Path) -> None:
    call = {"type": "function", "function": {"name": "look", "arguments": {}}}
    turns = [
        *TURNS,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "A river.", "name": "look"},
    ]
    found = prompt_of(turns, {}, open_renderer(tiny_llama)).text
    assert all(isinstance(turn, Message) for turn in found)
    assert [turn.turn() for turn in found] == turns  # pyright: ignore
