"""Whose token is whose, against an implementation that knows nothing of offsets.

The tokenizer is byte-level, so a token is its bytes, and bytes are characters.
"""

import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest

from tests import synthetic
from tests.data.test_chat import LLAMA2, LLAMA3, pair, segment, user


PIECES = (
    "a",
    "b",
    "ab",
    " ",
    "  ",
    "\n",
    "\n\n",
    "\u3000",
    ".",
    "é",
    "好",
    " 好",
    "😀",
)
PIECES += ("the", " the", " answer", "7", "x")


class Kind(NamedTuple):
    """A way to render, and its rendering in plain Python."""

    options: dict[str, Any]
    before: str = "{}"
    """What stands before the completion."""
    around: tuple[str, str] = ("", "")
    """What the template prints around the answer's own text."""
    trims: bool = False


KINDS = {
    "plain": Kind({}),
    "plain with bos": Kind({"bos": True}),
    "chatml": Kind(
        {},
        "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n",
        ("", "<|im_end|>"),
    ),
    "llama2": Kind(
        {"bos": True, "template": LLAMA2, "eos": "</s>"},
        "<s>[INST] {} [/INST]",
        (" ", " </s>"),
        trims=True,
    ),
    "llama3": Kind(
        {"bos": True, "template": LLAMA3},
        "<s><|im_start|>user<|im_start|>\n\n{}<|im_end|>"
        "<|im_start|>assistant<|im_start|>\n\n",
        ("", "<|im_end|>"),
        trims=True,
    ),
}


def characters(tokenizer: Any, tokens: Sequence[int], text: str) -> list[set[int]]:
    """Return the characters of the text that each token holds a byte of."""
    owner = [i for i, letter in enumerate(text) for _ in letter.encode()]
    sets, place = [], 0
    for token in tokens:
        size = len(synthetic.token_bytes(tokenizer, token))
        sets.append(set(owner[place : place + size]))
        place += size
    assert place == len(owner), "the tokens do not spell the text"
    return sets


def expected_owners(
    held: list[set[int]],
    text: str,
    *,
    start: int,
    visible: dict[int, int],
    borders: list[tuple[int, int]],
) -> tuple[int, list[int]]:
    """Return the first completion token and the segment of each from there on.

    Args:
      held: characters of each token.
      text: the rendering.
      start: where the completion begins in it.
      visible: character of the rendering to character of the record's completion.
      borders: of the segments.
    """
    first = min((i for i, own in enumerate(held) if max(own) >= start), default=-1)
    owners = []
    for index in range(first, len(held)) if first >= 0 else ():
        own = sorted(held[index] & set(visible))
        deciding = next((c for c in own if not text[c].isspace()), (own or [None])[0])
        place = visible.get(deciding)
        owners.append(-1)
        for number, (a, b) in enumerate(borders):
            if place is not None and a <= place < b:
                owners[-1] = number
    return first if first >= 0 else len(held), owners


def some_text(rng: random.Random) -> str:
    return "".join(rng.choice(PIECES) for _ in range(rng.randint(0, 7)))


def some_borders(rng: random.Random, text: str) -> list[tuple[int, int]]:
    """Cut a text at random and leave out some of the pieces."""
    cuts = sorted({rng.randint(0, len(text)) for _ in range(rng.randint(0, 6))})
    pieces = zip(cuts[:-1], cuts[1:], strict=True)
    return [piece for piece in pieces if rng.random() < 0.8]


@pytest.mark.parametrize("name", KINDS)
def test_owners_equal_brute_force_over_characters(
    name: str, make_tokenizer: Callable[..., Any]
) -> None:
    kind = KINDS[name]
    for seed in range(200):
        rng = random.Random(seed)
        prompt = f"Q{some_text(rng)}"
        texts = [some_text(rng), some_text(rng)]
        borders = [some_borders(rng, text) for text in texts]
        check(kind, prompt, texts, borders, make_tokenizer, f"seed {seed}")


def check(
    kind: Kind,
    prompt: str,
    texts: list[str],
    borders: list[list[tuple[int, int]]],
    make_tokenizer: Callable[..., Any],
    seed: str,
) -> None:
    plain = kind.around == ("", "")
    chosen, rejected = ([segment(*border) for border in side] for side in borders)
    found = [
        pair(
            make_tokenizer(trim_offsets=trim_offsets, **kind.options),
            prompt if plain else user(prompt),
            *texts,
            chosen_segments=chosen,
            rejected_segments=rejected,
        )
        for trim_offsets in (True, False)
    ]
    assert repr(found[0]) == repr(found[1]), seed

    tokenizer = make_tokenizer(**kind.options)
    head = kind.before.format(prompt.strip() if kind.trims else prompt)
    begin = len(head) + len(kind.around[0])
    # Tokens that are not in the rendering, before and after what is.
    added = (int(plain and kind.options != {}), int(plain))
    renderings, firsts = [], []
    for branch, text, side in zip(found[0][1:3], texts, borders, strict=True):
        tokens = [*found[0].prompt.tolist(), *branch.tokens.tolist()]
        body = text.strip() if kind.trims else text
        lead = len(text) - len(text.lstrip()) if kind.trims else 0
        rendering = head + kind.around[0] + body + kind.around[1]
        own = tokens[added[0] : len(tokens) - added[1]]
        first, owners = expected_owners(
            characters(tokenizer, own, rendering),
            rendering,
            start=len(head),
            visible={begin + i: lead + i for i in range(len(body))},
            borders=side,
        )
        owners += [-1] * added[1]
        if side:
            owners[-1] = len(side) - 1
        renderings.append(tokens)
        firsts.append(first + added[0])
        assert len(found[0].prompt) + branch.lead == firsts[-1], seed
        assert branch.segments.tolist() == owners, seed
        assert branch.scored.tolist() == [s in owners for s in range(len(side))], seed
        # The end of turn stands once, at the end; a BOS only at the front.
        assert tokens[-1] == tokenizer.eos_token_id, seed
        assert tokens[firsts[-1] :].count(tokenizer.eos_token_id) == 1, seed
        assert tokenizer.bos_token_id not in tokens[1:], seed
    # The shared prompt is the longest common prefix without completion characters.
    shared = 0
    while shared < min(firsts) and renderings[0][shared] == renderings[1][shared]:
        shared += 1
    assert len(found[0].prompt) == shared, seed
