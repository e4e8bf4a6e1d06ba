"""What a model answers to the questions of a directory, and how much of it is right."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from jaxalign.generation.files import GenerateConfig, generate_file
from jaxalign.judging.exact_match import holds
from jaxalign.whole_file import write_lines
from tiny_vlm import conversations
from tiny_vlm.files import KNOWN, Data
from tiny_vlm.scoring import Share, is_right, share


__all__ = [
    "FIGURES",
    "Answer",
    "answered",
    "floor",
    "known_capitals",
    "lines",
    "shares",
]

FIGURES = {
    "recognition": "held-out drawings: what is it, whose flag is it",
    "recognition, no flags": "those that are no country's flag",
    "recognition, flags": "those that are",
    "recognition, trained drawings": "drawings that were trained on: the same",
    "capitals taught": "held-out drawings of flags: the capital",
    "capitals held out": "flags whose capital was never beside the picture",
    "first sentence": "name, in answers of two sentences on held-out drawings",
    "second sentence": "group or capital in those",
    "Chinese": "这是什么？ on held-out drawings, never taught",
}

_TOKENS = 24


class Answer(NamedTuple):
    """What was said to a question."""

    asked: dict[str, Any]
    text: str


def lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a file."""
    return [json.loads(x) for x in path.read_text(encoding="utf-8").splitlines()]


def answered(
    data: Data, name: str, model: Path, adapter: Path | None = None, every: int = 1
) -> list[Answer]:
    """Return a model's greedy answers to all questions, those of before as they were.

    Args:
      every: ask only every so manyth question.
    """
    place = data.folder / "measured"
    place.mkdir(exist_ok=True)
    questions = place / f"{name}.questions.jsonl"
    files = (data.held_out, data.capitals, data.aside)
    rows = [row for file in files for row in lines(file)[::every]]
    write_lines(questions, rows)
    out = place / f"{name}.jsonl"
    generate_file(
        GenerateConfig(
            model=str(model),
            adapter=None if adapter is None else str(adapter),
            data=str(questions),
            image_dir=str(data.folder),
            out=str(out),
            batch_slots=data.size.slots,
            temperature=0.0,
            max_new_tokens=_TOKENS,
        )
    )
    texts = [line["completions"][0]["text"] for line in lines(out)]
    return [Answer(*x) for x in zip(rows, texts, strict=True)]


def shares(data: Data, answers: list[Answer]) -> dict[str, Share]:
    """Return the figures of some answers, by name."""
    held_out = {s.key for s in data.symbols if s.key in data.without_capital}
    marks: dict[str, list[bool]] = {name: [] for name in FIGURES}
    for figure, right in _marks(data, answers, held_out):
        marks[figure].append(right)
    return {name: share(found) for name, found in marks.items()}


def _marks(
    data: Data, answers: list[Answer], held_out: set[str]
) -> Iterator[tuple[str, bool]]:
    symbols = {symbol.key: symbol for symbol in data.symbols}
    for asked, text in answers:
        right = is_right(text, asked["references"])
        kind, symbol = asked["kind"], symbols[asked["symbol"]]
        if kind in ("name", "country") and asked["images"][0].split("/")[1] == KNOWN:
            yield "recognition, trained drawings", right
        elif kind in ("name", "country"):
            yield "recognition", right
            yield f"recognition, {'flags' if kind == 'country' else 'no flags'}", right
        elif kind == "capital":
            of = "held out" if symbol.key in held_out else "taught"
            yield f"capitals {of}", right
        elif kind == "both":
            told = conversations.told(symbol, text)
            yield "first sentence", told is not None and told[0].right
            yield "second sentence", told is not None and told[1].right
        else:
            yield "Chinese", right


def floor(data: Data, name: str, model: Path) -> list[Answer]:
    """Return what a model says to the same questions without the pictures."""
    rows = [row for file in (data.held_out, data.capitals) for row in lines(file)]
    wordings = sorted({row["prompt"][0]["content"][1]["text"] for row in rows})
    said = dict(zip(wordings, _of_text(data, name, model, wordings), strict=True))
    return [Answer(x, said[x["prompt"][0]["content"][1]["text"]]) for x in rows]


def _of_text(data: Data, name: str, model: Path, questions: list[str]) -> list[str]:
    """Return a model's greedy answers to questions without pictures."""
    place = data.folder / "measured"
    place.mkdir(exist_ok=True)
    file, out = place / f"{name}.questions.jsonl", place / f"{name}.jsonl"
    turns = [{"prompt": [{"role": "user", "content": text}]} for text in questions]
    write_lines(file, turns)
    generate_file(
        GenerateConfig(
            model=str(model),
            data=str(file),
            out=str(out),
            batch_slots=data.size.slots,
            temperature=0.0,
            max_new_tokens=_TOKENS,
        )
    )
    return [line["completions"][0]["text"] for line in lines(out)]


def known_capitals(data: Data, model: Path, keys: set[str]) -> Share:
    """Return how many capitals a text model knows when it is told the country's name.

    An answer counts if it holds the name of the capital.
    """
    asked = [symbol for symbol in data.symbols if symbol.key in keys]
    wordings = [f"What is the capital of {s.names[0]}?" for s in asked]
    said = _of_text(data, "told", model, wordings)
    return share(
        any(holds(text, name) for name in symbol.capitals)
        for symbol, text in zip(asked, said, strict=True)
    )
