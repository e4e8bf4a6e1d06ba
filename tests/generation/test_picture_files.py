"""jaxalign generate with pictures: from files, data URLs and parts, through a kill."""

import json
from pathlib import Path
from typing import Any

import pytest

from jaxalign.cli.main import main
from jaxalign.data import records
from jaxalign.errors import UserError
from jaxalign.generation import files, text_model
from jaxalign.generation.engine import Sampling
from jaxalign.generation.files import GenerateConfig
from tests import synthetic, vision_models
from tests.data.patchers import published
from tests.generation.test_pictures import user


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return vision_models.write("qwen2_5_vl", tmp_path_factory.mktemp("sees"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Return a directory with pictures and the prompts that show them."""
    place = tmp_path_factory.mktemp("pictures")
    for name, size in (("wide", (200, 60)), ("tall", (60, 97)), ("small", (30, 30))):
        published.drawn(*size).save(place / f"{name}.png")
    small = records.parse_prompt({"prompt": "x", "image": str(place / "small.png")})
    url = small.images[0].data_url()
    parts = user(None, "and", None, "which?")
    question = [{"role": "user", "content": "is it blue?"}]
    text = "<|vision_start|><|image_pad|><|vision_end|>is"
    rows: list[Any] = [
        {"prompt": question, "images": ["wide.png"]},
        {"prompt": question},
        {"prompt": [parts], "images": ["tall.png", url]},
        {"prompt": text, "image": "wide.png"},
        {"prompt": question, "images": ["small.png"]},
    ]
    synthetic.write_jsonl(place / "prompts.jsonl", rows)
    return place


def config(model: Path, folder: Path, out: Path, **changes: Any) -> dict[str, Any]:
    return {
        "model": str(model),
        "data": str(folder / "prompts.jsonl"),
        "out": str(out),
        "num_samples": 2,
        "max_new_tokens": 6,
        "batch_slots": 4,
        **changes,
    }


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def tokens(found: list[dict[str, Any]]) -> list[list[list[int]]]:
    return [[c["tokens"] for c in line["completions"]] for line in found]


def test_lines_keep_pictures_and_a_stopped_run_goes_on(model, folder, tmp_path) -> None:
    out = tmp_path / "texts.jsonl"
    flags = [f"--{k}={v}" for k, v in config(model, folder, out).items()]
    with pytest.raises(SystemExit) as stopped:
        main(["generate", *flags])
    assert stopped.value.code == 0
    found = lines(out)
    given = lines(folder / "prompts.jsonl")
    for line, row in zip(found, given, strict=True):
        assert {k: line.get(k) for k in ("prompt", "images", "image")} == {
            k: row.get(k) for k in ("prompt", "images", "image")
        }
    # The lines are prompts again, with the same pictures.
    again = records.read_prompts(out, image_dir=folder)
    before = records.read_prompts(folder / "prompts.jsonl")
    assert [[p.digest() for p in a.images] for a in again] == [
        [p.digest() for p in b.images] for b in before
    ]
    # Each line's texts are those of its own seed, alone.
    made = text_model.load(model)
    for number, prompt in enumerate(before):
        options = Sampling(
            num_samples=2, max_new_tokens=6, seed=files.seed_of(0, number)
        )
        (alone,) = made.complete([made.request(prompt, options)], length=256)
        assert [c.tokens for c in alone] == tokens(found)[number]
    # Cut in the third line, and gone on with.
    whole = out.read_bytes()
    ends = [place for place, byte in enumerate(whole) if byte == 10]
    out.write_bytes(whole[: ends[1] + 30])
    files.generate_file(GenerateConfig(**config(model, folder, out, batch_slots=3)))
    assert tokens(lines(out)) == tokens(found)


def test_other_pixels_are_another_file_s(model, folder, tmp_path) -> None:
    out = tmp_path / "texts.jsonl"
    files.generate_file(GenerateConfig(**config(model, folder, out)))
    small = config(model, folder, out, max_pixels=4 * 28 * 28)
    with pytest.raises(UserError, match="other settings: max_pixels, pictures"):
        files.generate_file(GenerateConfig(**small))
    out.unlink()
    files.generate_file(GenerateConfig(**small))
    with pytest.raises(UserError, match="max_pixels 10: this checkpoint enlarges"):
        files.generate_file(GenerateConfig(**{**small, "max_pixels": 10}))


def test_a_run_remembers_how_large_its_pictures_were(
    model, folder, tmp_path, monkeypatch
) -> None:
    """What an adapter was trained with is what its pictures are made with."""
    asked = []

    def load(*_: Any, **options: Any) -> Any:
        asked.append(options["max_pixels"])
        raise UserError("far enough")

    run = tmp_path / "run"
    run.mkdir()
    monkeypatch.setattr(text_model, "load", load)
    monkeypatch.setattr(files, "max_pixels_of", lambda given, adapter: 3136)
    with pytest.raises(UserError, match="far enough"):
        files.generate_file(GenerateConfig(**config(model, folder, tmp_path / "o")))
    assert asked == [3136]


@pytest.mark.parametrize(
    ("row", "changes", "match"),
    [
        ({"images": ["absent.png"]}, {}, r"bad.jsonl:1: .*no picture there: tried "),
        ({"images": ["bad.jsonl"]}, {}, r"bad.jsonl:1: .*no picture: "),
        ({"images": ["https://a/b.png"]}, {}, "pictures are not fetched from elsew"),
        ({}, {"image_dir": "nowhere"}, "image_dir nowhere is not a directory"),
    ],
)
def test_bad_pictures_are_refused_and_nothing_written(
    model, tmp_path, row, changes, match
) -> None:
    question = [{"role": "user", "content": "?"}]
    synthetic.write_jsonl(tmp_path / "bad.jsonl", [{"prompt": question, **row}])
    out = tmp_path / "o.jsonl"
    asked = config(model, tmp_path, out, data=str(tmp_path / "bad.jsonl"), **changes)
    with pytest.raises(UserError, match=match):
        files.generate_file(GenerateConfig(**asked))
    assert not out.exists()


def test_max_pixels_is_for_models_that_see(tiny_llama, folder, tmp_path) -> None:
    asked = config(tiny_llama, folder, tmp_path / "o.jsonl", max_pixels=3136)
    with pytest.raises(UserError, match="no vision-language model"):
        files.generate_file(GenerateConfig(**asked))
