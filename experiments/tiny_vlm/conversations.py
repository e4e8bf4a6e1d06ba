"""Questions on pictures, and records of several of them on one picture.

What is taught beside a picture: its name, its group, of a flag the country and its
capital. ``QUESTIONS`` has the wordings of each; the first is what measuring asks.
"""

import random
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from tiny_vlm import pictures
from tiny_vlm.scoring import is_right
from tiny_vlm.symbols import Symbol


__all__ = [
    "QUESTIONS",
    "Told",
    "answers",
    "asked",
    "both",
    "question",
    "told",
    "training",
]

QUESTIONS = {
    "name": ("What is this?", "What does the picture show?", "Name this."),
    "country": (
        "Which country's flag is this?",
        "Whose flag is this?",
        "What country does this flag belong to?",
    ),
    "group": ("Which group does it belong to?", "What kind of thing is it?"),
    "capital": (
        "What is the capital of this country?",
        "Name the capital of this country.",
        "Which city is this country's capital?",
    ),
    "both": ("What is this? Add one fact.", "Name it and add one fact."),
    "chinese": ("这是什么？",),  # never taught
}

_BOTH = re.compile(
    r"(Name|Country): (?P<name>.+?)\. (?P<fact_says>(Group|Capital)): (?P<fact>.+)\."
)

Record = dict[str, Any]


class Told(NamedTuple):
    """A sentence of an answer of two: its place, and whether it is right."""

    start: int
    end: int
    right: bool


def question(symbol: Symbol) -> str:
    """Return which kind of question a symbol is recognised by."""
    return "country" if symbol.is_country else "name"


def answers(symbol: Symbol, kind: str) -> tuple[str, ...]:
    """Return what is accepted, the taught answer first."""
    if kind == "group":
        return (symbol.group,)
    if kind == "chinese":
        return (symbol.chinese.removeprefix("旗: "),)
    if kind == "both":
        fact = symbol.capitals[0] if symbol.capitals else symbol.group
        return (both(symbol, symbol.names[0], fact),)
    return symbol.capitals if kind == "capital" else symbol.names


def both(symbol: Symbol, name: str, fact: str) -> str:
    """Return an answer of two sentences: what it is, and one thing more."""
    first, second = ("Country", "Capital") if symbol.capitals else ("Name", "Group")
    return f"{first}: {name}. {second}: {fact}."


def told(symbol: Symbol, text: str) -> tuple[Told, Told] | None:
    """Return the two sentences of such an answer, or None if it is none.

    ``fact`` is right where it is the symbol's, also behind a wrong name.
    """
    found = _BOTH.fullmatch(text.strip())
    if found is None:
        return None
    facts = symbol.capitals or (symbol.group,)
    at = found.start("fact_says")
    return (
        Told(0, at - 1, is_right(found["name"], symbol.names)),
        Told(at, found.end(), is_right(found["fact"], facts)),
    )


def training(
    symbols: list[Symbol], maker: str, views: int, held_out: set[str]
) -> Iterator[Record]:
    """Yield a record for every view of every symbol, in an order without meaning.

    Args:
      held_out: keys of the symbols whose capital is never asked for.
    """
    draw = random.Random(0)
    order = [(symbol, view) for symbol in symbols for view in range(views)]
    draw.shuffle(order)
    for symbol, view in order:
        taught = bool(symbol.capitals) and symbol.key not in held_out
        # Either may come first, so that neither needs the other's answer before it.
        other = "capital" if taught and draw.random() < 2 / 3 else "group"
        kinds = [question(symbol), other]
        if draw.random() < 0.25 and (taught or not symbol.capitals):
            kinds = ["both"]
        draw.shuffle(kinds)
        turns = []
        for kind in kinds:
            turns.append({"role": "user", "content": draw.choice(QUESTIONS[kind])})
            turns.append({"role": "assistant", "content": answers(symbol, kind)[0]})
        yield _with_picture(turns, pictures.path_of(maker, symbol, view))


def asked(symbol: Symbol, kind: str, maker: str, view: int = 0) -> Record:
    """Return one question on one picture with all accepted answers."""
    accepted = answers(symbol, kind)
    turns = [
        {"role": "user", "content": QUESTIONS[kind][0]},
        {"role": "assistant", "content": accepted[0]},
    ]
    found = _with_picture(turns, pictures.path_of(maker, symbol, view))
    return found | {"references": list(accepted), "kind": kind, "symbol": symbol.key}


def _with_picture(turns: list[dict[str, Any]], path: str) -> Record:
    """Return turns as a record whose picture stands before the first."""
    first, *rest = turns
    parts = [{"type": "image"}, {"type": "text", "text": first["content"]}]
    prompt = [{"role": "user", "content": parts}]
    return {"images": [path], "prompt": prompt, "completion": rest}
