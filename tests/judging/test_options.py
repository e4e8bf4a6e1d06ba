"""Options that a judge does not read are refused or said, those it reads are not."""

import dataclasses
from typing import Any

import pytest

from jaxalign import progress
from jaxalign.errors import UserError
from jaxalign.judging.config import JudgeConfig


JUDGES: dict[str, dict[str, Any]] = {
    "openai": {"name": "openai", "model": "m"},
    "python": {"name": "python"},
    "rules": {"name": "rules"},
    "reward": {"name": "reward", "model": "m"},
    "local": {"name": "local", "model": "m"},
    "local json": {"name": "local", "model": "m", "method": "json"},
}
PRICES = {"prompt_price": 1.0, "completion_price": 2.0}
ENDPOINT = ("openai",)
OPTIONS: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"timeout": 5.0}, ENDPOINT),
    ({"max_wait": 5.0}, ENDPOINT),
    ({"max_requests": 5}, ENDPOINT),
    ({"max_total_tokens": 5}, ENDPOINT),
    ({"max_cost": 5.0, **PRICES}, ENDPOINT),
    ({"base_url": "http://h/v1"}, ENDPOINT),
    ({"key_variable": "OTHER_KEY"}, ENDPOINT),
    ({"response_format": "none"}, ENDPOINT),
    # Of a function a dry run says what its requests would cost.
    ({"prompt_price": 1.0}, ("openai", "python")),
    ({"completion_price": 1.0}, ("openai", "python")),
    ({"concurrency": 2}, ("openai", "python")),
    ({"max_attempts": 2}, ("openai", "python")),
    ({"temperature": 0.5}, ("openai", "local json")),
    ({"max_reply_tokens": 5}, ("openai", "local json")),
    (
        {"chat_template_kwargs": {"enable_thinking": False}},
        ("openai", "local", "local json", "reward"),
    ),
]


@pytest.mark.parametrize("judge", JUDGES)
@pytest.mark.parametrize(("options", "read_by"), OPTIONS, ids=lambda x: next(iter(x)))
def test_an_option_has_an_effect_or_is_refused(judge, options, read_by, capsys) -> None:
    progress.say_once.cache_clear()
    values = {**JUDGES[judge], **options}
    if judge in read_by:
        config = JudgeConfig(**values)
        assert all(getattr(config, name) == value for name, value in options.items())
        return
    name = values["name"]
    if options.keys() & {"concurrency", "timeout", "max_wait", "max_attempts"}:
        JudgeConfig(**values)
        said = " ".join(capsys.readouterr().err.split())
        option = next(iter(options))
        assert f"judge.{option} has no effect with judge.name {name}" in said
        return
    refused = "|".join(options)
    with pytest.raises(UserError, match=f"judge.({refused}) does nothing .* {name}: "):
        JudgeConfig(**values)


def test_the_cure_names_a_judge_that_reads_the_option() -> None:
    with pytest.raises(UserError, match="choose judge.name openai or python$"):
        JudgeConfig(name="rules", prompt_price=2.0)
    cure = "choose judge.name openai or local with judge.method json$"
    for values in (JUDGES["local"], JUDGES["rules"]):
        with pytest.raises(UserError, match=cure):
            JudgeConfig(**values, temperature=0.5)


@pytest.mark.parametrize("judge", JUDGES)
def test_what_is_the_default_may_be_said(judge) -> None:
    config = JudgeConfig(**JUDGES[judge])
    again = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    assert JudgeConfig(**again) == config
