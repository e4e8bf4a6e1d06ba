"""jaxalign generate: files of prompts in, files of completions out, through a kill."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxalign.adapters.hybrid import H2LPTConfig
from jaxalign.adapters.lora import LoRAConfig
from jaxalign.checkpoints import adapter_files
from jaxalign.cli.main import main
from jaxalign.data import records
from jaxalign.errors import UserError
from jaxalign.generation import files, text_model
from jaxalign.generation.engine import Request, Sampling, generate
from jaxalign.generation.files import GenerateConfig
from tests import synthetic
from tests.adapters import scenes
from tests.generation.test_engine import by_layer


PROMPTS: list[Any] = [
    {"prompt": "Tell me a story", "id": 7},
    {"prompt": [{"role": "user", "content": "What is 2 + 2?"}]},
    {"prompt": "Tell me a story"},
    *({"prompt": f"Count to {n}"} for n in range(9)),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic.write_jsonl(tmp_path_factory.mktemp("data") / "p.jsonl", PROMPTS)


@pytest.fixture
def config(tiny_llama: Path, data: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "model": str(tiny_llama),
        "data": str(data),
        "out": str(tmp_path / "out" / "texts.jsonl"),
        "num_samples": 2,
        "max_new_tokens": 7,
        "batch_slots": 4,
        "top_p": 0.9,
    }


def lines(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_the_file_has_every_prompt_in_order(config, tiny_llama, capsys) -> None:
    flags = [f"--{name}={value}" for name, value in config.items()]
    with pytest.raises(SystemExit) as stopped:
        main(["generate", *flags, "--stop", '["zzzz"]'])
    assert stopped.value.code == 0
    last = capsys.readouterr().out.splitlines()[-1]
    found = lines(config["out"])
    assert [line["index"] for line in found] == list(range(len(PROMPTS)))
    assert [line["prompt"] for line in found] == [p["prompt"] for p in PROMPTS]
    count = 0
    made = text_model.load(str(tiny_llama))
    text_of = text_model.text_with(made.tokenizer)
    for line in found:
        assert len(line["completions"]) == 2
        for completion in line["completions"]:
            assert set(completion) == {"text", "tokens", "logp", "finish_reason"}
            tokens, ended = completion["tokens"], completion["finish_reason"] == "stop"
            assert 1 <= len(tokens) <= 7 and (ended or len(tokens) == 7)
            assert (tokens[-1] in made.stop_tokens) == ended
            assert completion["text"] == text_of(tokens[:-1] if ended else tokens)
            assert completion["logp"] < 0
            count += len(tokens)
    words = last.split()
    assert words[:3] == [str(count), "tokens", "in"] and words[5] == "compile"
    # The same prompt twice: other samples; the two samples of one differ too.
    texts = [
        completion["tokens"] for n in (0, 2) for completion in found[n]["completions"]
    ]
    assert len({tuple(tokens) for tokens in texts}) == 4
    # A line's text is that of its own seed, alone.
    tokens = made.tokenizer("Tell me a story")["input_ids"]
    options = Sampling(
        num_samples=2, max_new_tokens=7, top_p=0.9, seed=files.seed_of(0, 2)
    )
    request = Request(tokens, options, made.stop_tokens)
    (alone,) = generate(made.model, made.variables, [request], length=128)
    assert [c.tokens for c in alone] == texts[2:]
    np.testing.assert_allclose(
        [sum(c.logps) for c in alone],
        [c["logp"] for c in found[2]["completions"]],
        atol=1e-4,
    )


def test_what_is_there_is_not_made_again(config) -> None:
    report = files.generate_file(GenerateConfig(**config))
    out = Path(config["out"])
    whole = out.read_bytes()
    assert report.tokens == sum(
        len(c["tokens"]) for line in lines(config["out"]) for c in line["completions"]
    )
    assert files.generate_file(GenerateConfig(**config)).tokens == 0
    assert out.read_bytes() == whole
    # Cut in the middle of the sixth line, and gone on with in other slots.
    ends = [place for place, byte in enumerate(whole) if byte == 10]
    out.write_bytes(whole[: ends[4] + 30])
    config |= {"batch_slots": 3}
    again = files.generate_file(GenerateConfig(**config))
    assert 0 < again.tokens < report.tokens
    found, want = lines(config["out"]), [json.loads(x) for x in whole.splitlines()]
    for one, other in zip(found, want, strict=True):
        for a, b in zip(one["completions"], other["completions"], strict=True):
            assert a["tokens"] == b["tokens"] and a["text"] == b["text"]
    # Other settings are another file's.
    before = out.read_bytes()
    with pytest.raises(UserError, match="other settings: seed, temperature"):
        files.generate_file(GenerateConfig(**config, seed=3, temperature=0.5))
    (out.parent / "texts.jsonl.settings.json").unlink()
    with pytest.raises(UserError, match="not made by jaxalign generate"):
        files.generate_file(GenerateConfig(**config))
    assert out.read_bytes() == before


def test_another_tokenizer_makes_another_file(config, make_llama) -> None:
    model = make_llama()
    config |= {"model": str(model), "max_new_tokens": 2}
    files.generate_file(GenerateConfig(**config))
    ends = model / "generation_config.json"
    ends.write_text(json.dumps({"eos_token_id": 7}))
    with pytest.raises(UserError, match="other settings: tokenizer"):
        files.generate_file(GenerateConfig(**config))


def test_a_special_token_is_a_stop_text(config, tiny_llama) -> None:
    """Decoding leaves it out, so no text would ever show it."""
    made = text_model.load(str(tiny_llama))
    begin = made.tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert begin not in made.stop_tokens
    asked = GenerateConfig(**config, stop=("<|im_start|>", "a"))
    (prompt, *_) = records.read_prompts(config["data"])
    request = files._request(asked, prompt, 0, made, ())
    assert request.stop_tokens == made.stop_tokens | {begin}
    assert made.ends(("a", "im_start")) == made.stop_tokens


def test_killed_in_the_middle_it_ends_with_the_same_lines(config, tmp_path) -> None:
    """kill -9 as soon as two lines are there."""
    config |= {"batch_slots": 2, "max_new_tokens": 40}
    want = tmp_path / "want.jsonl"
    files.generate_file(GenerateConfig(**{**config, "out": str(want)}))
    flags = [f"--{name}={value}" for name, value in config.items()]
    command = [sys.executable, "-m", "jaxalign.cli.main", "generate", *flags]
    out = Path(config["out"])
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline:
        if out.exists() and out.read_bytes().count(b"\n") >= 2:
            process.send_signal(signal.SIGKILL)
            break
        os.sched_yield()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    kept = out.read_bytes()
    assert 2 <= kept.count(b"\n") < len(PROMPTS)
    files.generate_file(GenerateConfig(**config))
    assert out.read_bytes().startswith(kept[: kept.rfind(b"\n") + 1])
    assert [
        [c["tokens"] for c in line["completions"]] for line in lines(config["out"])
    ] == [[c["tokens"] for c in line["completions"]] for line in lines(str(want))]


@pytest.mark.parametrize(
    "options",
    [LoRAConfig(rank=2, alpha=4.0), H2LPTConfig(rank=2, prefix_length=3)],
    ids=str,
)
def test_an_adapter_on_top(tiny_llama, tmp_path, options) -> None:
    made = scenes.adapted(tiny_llama, options)
    path = adapter_files.save_adapter(
        made.checkpoint, made.collections, tmp_path / "adapter"
    )
    loaded = text_model.load(str(tiny_llama), str(path))
    requests = [Request([5, 9, 30], Sampling(max_new_tokens=8, seed=1))]
    (got,) = generate(loaded.model, loaded.variables, requests)
    (want,) = generate(*by_layer(made), requests)
    assert got[0].tokens == want[0].tokens


@pytest.mark.parametrize(
    ("changes", "row", "match"),
    [
        ({}, {"text": "hi"}, r"bad.jsonl:1: expected an object with the field prompt"),
        ({}, {"prompt": 3}, "expected a text or a list of"),
        ({}, {"prompt": ""}, r"bad.jsonl:1: .*no token"),
        ({}, {"prompt": [{"role": "user"}]}, "field prompt.*content is missing"),
        ({}, {"prompt": "hi", "images": ["a.png"]}, "does not see: it takes"),
        ({"out": "."}, {"prompt": "hi"}, "not an ordinary file"),
        ({"out": "x" * 300}, {"prompt": "hi"}, "cannot be written"),
        ({"adapter": "nowhere"}, {"prompt": "hi"}, "nowhere"),
    ],
)
def test_bad_input_is_refused_and_nothing_written(
    config, tmp_path, changes, row, match
) -> None:
    bad = synthetic.write_jsonl(tmp_path / "bad.jsonl", [row])
    with pytest.raises(UserError, match=match):
        files.generate_file(GenerateConfig(**{**config, "data": str(bad), **changes}))
    assert not Path(config["out"]).exists()


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (["--temperature", "-1"], "temperature must be at least 0"),
        (["--temperature", "0", "--top_p", "0.9"], "top_p 0.9 has no effect with temp"),
        (
            ["--temperature=0", "--top_p", "1", "--top_k", "5"],
            "top_k 5 has no effect with temperature 0",
        ),
        (
            ["--temperature=0", "--top_p", "1", "--min_p=0.1"],
            "min_p 0.1 has no effect with temperature",
        ),
        (["--temperature", "1e39"], "temperature must be at least 0"),
        (["--top_k", "3000000000"], "top_k must be in"),
        (["--top_p", "1.5"], "top_p must be in"),
        (["--batch_slots", "0"], "batch_slots must be at least 1"),
        (["--num_sample", "2"], "Did you mean --num_samples"),
        (["--max_new_tokens", "many"], "max_new_tokens"),
        (["--stop", ""], "stop has an empty text"),
    ],
)
def test_flags_that_are_refused(config, capsys, flags, match) -> None:
    import re

    given = [f"--{k}={v}" for k, v in config.items() if f"--{k}" not in flags]
    with pytest.raises(SystemExit) as stopped:
        main(["generate", *given, *flags])
    assert stopped.value.code == 2
    assert re.search(match, capsys.readouterr().err)
