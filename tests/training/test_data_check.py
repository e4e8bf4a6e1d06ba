"""``jaxalign data check``: what is shown of a file before anything is trained."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from jaxalign.cli.main import main
from jaxalign.data.rendering import Renderer
from jaxalign.data.tokenizer import load_tokenizer
from jaxalign.training import data_check
from tests import synthetic
from tests.data.mosaic import seeing


def shown(capsys: pytest.CaptureFixture[str], *arguments: Any, code: int = 0) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(["data", "check", *map(str, arguments)])
    captured = capsys.readouterr()
    assert stop.value.code == code, captured.err
    return captured.out if code == 0 else captured.out + captured.err


def segment(start: int, end: int, score: float) -> dict[str, Any]:
    return {"start": start, "end": end, "scores": {"clarity": score}}


def rows(count: int, words: int = 1) -> list[dict[str, Any]]:
    return [
        {
            "prompt": [{"role": "user", "content": f"Is it? {n}"}],
            "chosen": "the river is " * words + "not",
            "rejected": "seven",
            "chosen_segments": [segment(0, 9, 4), segment(10, 12, 1)],
            "rejected_segments": [segment(0, 5, 2)],
        }
        for n in range(count)
    ]


def test_counts_lengths_and_examples(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = synthetic.write_jsonl(tmp_path / "f.jsonl", [*rows(3), *rows(2, words=40)])
    out = shown(capsys, path, "--model", tiny_llama, "--max_length", 64)
    assert "5 records: 5 pairs, 0 single completions; 5 of conversations" in out
    assert "15 scored segments, 1.5 a response, on clarity" in out
    assert "2 dropped: longer than max_length 64" in out
    assert f"  {path}:5: " in out
    assert "3 kept, in 1 rows of 2048 places" in out
    # Three examples, with what is learnt and whose token is whose.
    assert out.count("\n--- ") == 3
    assert "⟦1: the river⟧⟦2:  is⟧⟦ not⟧⟦2: <|im_end|>⟧" in out
    assert "⟦1: seven<|im_end|>⟧" in out
    assert "  1: clarity 4\n  2: clarity 1" in out
    cut = shown(
        capsys,
        *(path, "--model", tiny_llama, "--max_length", 64, "--overflow", "truncate"),
        *("--examples", 0),
    )
    assert "2 cut: longer" in cut and "5 kept" in cut and "---" not in cut


def test_single_completions_and_another_layout(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "f.json"
    turns = [{"from": "human", "value": "Is it?"}, {"from": "gpt", "value": "not"}]
    path.write_text(json.dumps([{"conversations": turns, "kto_tag": True}] * 2))
    out = shown(capsys, path, "--model", tiny_llama, "--objective.name", "sft")
    assert "2 records: 0 pairs, 2 single completions" in out
    assert "completion:\n⟦not<|im_end|>⟧" in out
    refused = shown(capsys, path, "--model", tiny_llama, "--layout", "hh", code=2)
    assert "field chosen: is missing. Expected a text; the row has conv" in refused


def test_what_training_would_refuse_is_shown_and_refused(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = [{k: v for k, v in row.items() if "segments" not in k} for row in rows(2)]
    path = synthetic.write_jsonl(tmp_path / "f.jsonl", bare)
    out = shown(capsys, path, "--model", tiny_llama, code=2)
    assert "2 records: 2 pairs" in out and "2 kept" in out
    assert "f.jsonl:1: field chosen_segments is missing, which dpo2d needs" in out
    assert shown(capsys, path, "--model", tiny_llama, "--objective.name", "dpo")
    usage = "expected `jaxalign data check FILE --model M`"
    with pytest.raises(SystemExit) as stop:
        main(["data", "look", str(path)])
    assert stop.value.code == 2 and usage in capsys.readouterr().err


def test_what_pictures_take_is_shown(
    tiny_llama: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokenizer, patcher = seeing(load_tokenizer(tiny_llama))
    renderer = Renderer(tokenizer, patcher=patcher)
    monkeypatch.setattr(data_check, "open_renderer", lambda *_, **__: renderer)
    given = rows(3)
    # 2 x 2 patches are one feature between two frames; 4 x 10 in two tiles are twice
    # 2 x 2 features, with three frames and a line break.
    for row, size in zip(given, ((8, 8), (40, 16)), strict=False):
        Image.new("RGB", size).save(tmp_path / f"{size[0]}.png")
        row["images"] = [str(tmp_path / f"{size[0]}.png")]
    path = synthetic.write_jsonl(tmp_path / "f.jsonl", given)
    out = shown(capsys, path, "--model", tiny_llama, "--row_length", 128)
    # (3 + 12) / 2 tokens, (4 + 32) / 2 patches.
    assert "2 pictures: 8 tokens a picture, most 12; 18 patches, most 32" in out
    assert "in 1 rows of 128 places" in out
    assert "% full; 36 patches a row, 100% full" in out
    assert "⟨picture of 3 tokens: 2 x 2 patches⟩\nIs it? 0" in out
    assert "⟨picture of 12 tokens: 4 x 4, 4 x 4 patches⟩\nIs it? 1" in out
