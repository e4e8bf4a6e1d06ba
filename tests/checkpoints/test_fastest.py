"""``--dtype fastest``: what is chosen, said and remembered."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from jaxalign import progress
from jaxalign.checkpoints import convert, fastest
from jaxalign.configs import read_yaml
from jaxalign.errors import UserError
from jaxalign.generation.files import GenerateConfig, generate_file


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(progress, "say", lines.append)
    fastest._say.cache_clear()
    return lines


def as_if(monkeypatch: pytest.MonkeyPatch, ratio: float) -> None:
    monkeypatch.setattr(fastest, "speed_of_bfloat16", lambda *_: ratio)


@pytest.mark.parametrize(
    ("option", "ratio", "chosen", "line"),
    [
        ("fastest", 2.14, "bfloat16", "dtype: bfloat16 (2.1 × float32's products"),
        ("fastest", 0.63, "float32", "dtype: float32 (bfloat16 makes 0.6 × float32's"),
        ("fastest", 1.02, "float32", "dtype: float32 (bfloat16 makes 1.0 × float32's"),
        ("bfloat16", 0.63, "bfloat16", "dtype: bfloat16 makes 0.6 × float32's"),
        ("bfloat16", 2.14, "bfloat16", None),
        ("float32", 2.14, "float32", None),
        ("auto", 0.63, "auto", None),
    ],
)
def test_a_cpu_chooses_by_trial(
    option: Any,
    ratio: float,
    chosen: str,
    line: str | None,
    tiny_llama: Path,
    said: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    as_if(monkeypatch, ratio)
    for _ in range(2):  # said once
        assert fastest.resolve(option, tiny_llama) == chosen
    assert len(said) == (line is not None)
    assert all(each.startswith(line or "") for each in said)


def test_gpus_and_tpus_need_no_trial(
    tiny_llama: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    @dataclasses.dataclass
    class Device:
        platform: str = "tpu"
        device_kind: str = "TPU v5 lite"

    monkeypatch.setattr(fastest.jax, "local_devices", lambda: [Device()])
    monkeypatch.delattr(fastest, "speed_of_bfloat16")
    assert fastest.resolve("fastest", tiny_llama) == "bfloat16"
    assert fastest.resolve("bfloat16", tiny_llama) == "bfloat16"
    assert said == ["dtype: bfloat16 (what a TPU v5 lite multiplies fastest)"]


def test_the_trial_measures_something() -> None:
    assert 0.01 < fastest.speed_of_bfloat16(64, 128) < 100


def test_an_output_keeps_what_was_chosen(
    tiny_llama: Path,
    tmp_path: Path,
    said: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    prompts.write_text('{"prompt": "one"}\n{"prompt": "two"}\n', encoding="utf-8")
    config = GenerateConfig(
        model=str(tiny_llama),
        data=str(prompts),
        out=str(out),
        max_new_tokens=2,
        batch_slots=2,
        dtype="fastest",
    )
    as_if(monkeypatch, 2.0)
    generate_file(config)
    kept = json.loads(out.with_name("out.jsonl.settings.json").read_text())
    assert kept["dtype"] == "bfloat16"
    whole = out.read_bytes()
    out.write_bytes(whole[: whole.index(b"\n") + 1])
    as_if(monkeypatch, 0.5)  # another machine
    generate_file(config)
    assert out.read_bytes() == whole
    assert "dtype: bfloat16 (what it was begun with)" in said
    with pytest.raises(UserError, match="other settings: dtype"):
        generate_file(dataclasses.replace(config, dtype="float32"))


def test_a_run_keeps_what_was_chosen(tmp_path: Path, tiny_llama: Path) -> None:
    config = tmp_path / "config.yaml"
    assert fastest.kept_in(config) is None
    config.write_text("dtype: bfloat16\n", encoding="utf-8")
    assert read_yaml(config) == {"dtype": "bfloat16"}
    kept = fastest.kept_in(config)
    assert fastest.resolve("fastest", tiny_llama, kept=kept) == "bfloat16"
    # What is asked for by name is compared with what is there, elsewhere.
    assert fastest.resolve("float32", tiny_llama, kept=kept) == "float32"


def test_a_converted_checkpoint_has_no_machine(
    tiny_llama: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="depends on the machine"):
        convert.convert(tiny_llama, tmp_path / "out", dtype="fastest")
