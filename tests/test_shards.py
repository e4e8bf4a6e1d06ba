"""Parts: which rows they have, and which make a whole."""

import shlex

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxalign import configs
from jaxalign.cli import parsing
from jaxalign.errors import UserError
from jaxalign.evaluation.config import EndpointConfig, EvalConfig
from jaxalign.feedback.judge_file import JudgeFileConfig
from jaxalign.generation.files import GenerateConfig
from jaxalign.judging.config import JudgeConfig
from jaxalign.parallel.mesh import MeshConfig
from jaxalign.shards import Shard, check_parts, parse


@given(st.integers(0, 60), st.integers(1, 70))
def test_every_row_is_in_one_part_and_parts_are_even(total: int, count: int) -> None:
    parts = [list(Shard(index, count).rows(total)) for index in range(count)]
    assert sorted(row for part in parts for row in part) == list(range(total))
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1 and sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("2/2", r"the 2 part\(s\) are 0/2 to 1/2"),
        ("5/3", r"the 3 part\(s\) are 0/3 to 2/3"),
        ("0/0", "there are no parts"),
        ("a/b", "'a/b' is no part of anything: expected i/n"),
        ("-1/3", "'-1/3' is no part"),
        ("1", "'1' is no part"),
        ("1/3/4", "is no part"),
        ("1/ 3", "is no part"),
        ("", "'' is no part"),
        ("0/99999999999999999999", "is no part"),
    ],
)
def test_what_is_no_part_is_refused(text: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        parse(text)
    with pytest.raises(UserError, match=said):
        GenerateConfig(model="m", data="d", out="o", shard=text)


def test_grades_of_a_file_have_no_parts() -> None:
    with pytest.raises(UserError, match="no effect with grades"):
        EvalConfig(tasks=("xstest",), out="o", grades="g.jsonl", shard="0/2")


def test_which_parts_make_a_whole() -> None:
    check_parts([(Shard(n, 3), n) for n in (2, 0, 1)])
    many = [(Shard(n, 9), n) for n in (0, 8)]
    with pytest.raises(UserError, match="7 of 9 parts are missing: 1/9, .* and 2 more"):
        check_parts(many)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("generate", GenerateConfig(model="m", data="a b.jsonl", out="o", shard="1/3")),
        (
            "generate",
            GenerateConfig(
                model="m",
                data="d",
                out="o",
                stop=("it's", "\n"),
                chat_template_kwargs={"enable_thinking": False},
                mesh=MeshConfig(fsdp=2),
            ),
        ),
        (
            "judge",
            JudgeFileConfig(
                data="d",
                out="o",
                judge=JudgeConfig(name="rules", aspects=("correctness",)),
            ),
        ),
        (
            "eval",
            EvalConfig(
                tasks=("a", "b"),
                out="o",
                endpoint=EndpointConfig(model="m", concurrency=3),
                judge=JudgeConfig(name="rules", concurrency=3),
                agreement=False,
            ),
        ),
        (
            "eval",
            EvalConfig(tasks=("a",), out="o", model="m", judge=JudgeConfig(model="j")),
        ),
    ],
)
def test_a_command_says_its_options(name: str, config) -> None:
    """What is printed gives the same options when it is pasted."""
    from jaxalign.cli import eval as evaluating

    words = shlex.split(configs.as_command(name, config))
    assert words[:2] == ["jaxalign", name]
    arguments = words[2:]
    if name == "eval":
        arguments = evaluating._with_lists(parsing.with_judge(arguments))
    parser = parsing.make_parser(name, type(config), description="")
    assert parsing.parse(parser, arguments, type(config)) == config
