"""Preference pairs of a model's own mistakes in answers of two sentences."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxalign.generation.files import GenerateConfig, generate_file
from jaxalign.whole_file import write_lines
from tiny_vlm import conversations
from tiny_vlm.conversations import Told
from tiny_vlm.files import KNOWN, Data
from tiny_vlm.measuring import lines
from tiny_vlm.symbols import Symbol


__all__ = ["ASPECTS", "pair", "pairs"]

ASPECTS = ("recognition", "knowledge")
"""What the first and the second sentence are scored for, 0 or 4."""

_SAMPLES = 2


def pairs(data: Data, model: Path) -> Path:
    """Write the pairs, one a picture at most, and return their file.

    The pictures are views of the known drawings that were not trained on. A symbol's
    rejected answer is the first of the samples that has both sentences and is wrong in
    one; the chosen one is the right answer. Symbols whose capital is held out are left
    out here too.
    """
    asked, out = data.folder / "mistakes.asked.jsonl", data.folder / "pairs.jsonl"
    symbols = [s for s in data.symbols if s.key not in data.without_capital]
    view = data.size.views
    rows = [conversations.asked(s, "both", KNOWN, view) for s in symbols]
    write_lines(asked, rows)
    samples = data.folder / "mistakes.jsonl"
    generate_file(
        GenerateConfig(
            model=str(model),
            data=str(asked),
            image_dir=str(data.folder),
            out=str(samples),
            num_samples=_SAMPLES,
            batch_slots=data.size.slots,
            temperature=1.0,
            max_new_tokens=32,
        )
    )
    found = _pairs(zip(symbols, rows, lines(samples), strict=True))
    write_lines(out, list(found))
    return out


def _pairs(answered: Any) -> Iterator[dict[str, Any]]:
    for symbol, row, line in answered:
        for sample in line["completions"]:
            text = sample["text"].strip()
            told = conversations.told(symbol, text)
            if told is not None and not all(part.right for part in told):
                yield pair(symbol, row, text, told)
                break


def pair(
    symbol: Symbol, row: dict[str, Any], text: str, told: tuple[Told, Told]
) -> dict[str, Any]:
    """Return the record of a mistake: a symbol's question, and what was said to it."""
    right = row["references"][0]
    truth = conversations.told(symbol, right)
    assert truth is not None, right
    return {
        "images": row["images"],
        "prompt": row["prompt"],
        "chosen": [{"role": "assistant", "content": right}],
        "rejected": [{"role": "assistant", "content": text}],
        "chosen_segments": _segments(truth),
        "rejected_segments": _segments(told),
    }


def _segments(told: tuple[Told, Told]) -> list[dict[str, Any]]:
    return [
        {"start": part.start, "end": part.end, "scores": {aspect: 4 * part.right}}
        for part, aspect in zip(told, ASPECTS, strict=True)
    ]
