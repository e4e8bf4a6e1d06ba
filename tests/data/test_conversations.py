"""Turns beyond question and answer: thinking, tools, parts, answers that go on."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from jaxalign import progress
from jaxalign.data import chat, records
from jaxalign.data.chat import Branch, TokenizedPair
from jaxalign.data.pairs import truncate
from jaxalign.data.rendering import Renderer
from jaxalign.errors import UserError
from tests import synthetic


# As Qwen3 does: what was thought is printed anew for the last answer, else left out.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% set text = m['content'] or '' %}{% set thought = '' %}"
    "{% if m['role'] == 'assistant' %}"
    "{% if '</think>' in text %}"
    "{% set thought = text.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set text = text.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if loop.last %}<think>\n{{ thought }}\n</think>\n\n{% endif %}{% endif %}"
    "{{ text }}"
    "{% for c in m['tool_calls'] or [] %}\n<call>{{ c['function']['name'] }}</call>"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}"
    "<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
# As DeepSeek's distilled models do: generation begins inside of the thinking block.
OPENING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{{ m['content'].split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
# Prints lists of parts alone.
PARTS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% for part in m['content'] %}{{ part['text'] }}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Marks the answers, but not where they end.
MARKING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}"
    "{%- generation %}{{ m['content'] }}{% endgeneration %}"
    "{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def turn(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


ASK = turn("user", "Is it?")


def pair(tokenizer: Any, row: dict[str, Any], **options: Any) -> TokenizedPair:
    row = {"prompt": [ASK], "chosen": "the", "rejected": "not", **row}
    record = records.parse(row, "f.jsonl:7")
    (found,) = chat.tokenize([record], Renderer(tokenizer, options))
    return found


def whole(tokenizer: Any, found: TokenizedPair, branch: Branch) -> str:
    return _text(tokenizer, [*found.prompt, *branch.tokens])


def learnt(tokenizer: Any, branch: Branch) -> str:
    return _text(tokenizer, branch.tokens[branch.places])


def segment_text(tokenizer: Any, branch: Branch, index: int) -> str:
    return _text(tokenizer, branch.tokens[branch.places[branch.segments == index]])


def _text(tokenizer: Any, tokens: Any) -> str:
    return b"".join(synthetic.token_bytes(tokenizer, t) for t in tokens).decode()


def segment(start: int, end: int, **more: int) -> dict[str, Any]:
    return {"start": start, "end": end, "scores": {"x": 1.0}, **more}


# What follows a completion is learnt from the first of its kind.

TRIMMING = synthetic.CHATML.replace("m['content']", "m['content'] | trim")
SAYINGS = (
    "It is a river.",
    "  It is.",
    "It is.\n",
    "\n\n",
    "<think>\nthe river\n</think>\n\nIt is not.",
    "a</think>b",
    "<|im_end|>\n",
    "x",
)


@pytest.mark.parametrize(
    "template",
    [synthetic.CHATML, TRIMMING, THINKING, OPENING, PARTS, MARKING],
    ids=["chatml", "trimming", "thinking", "opening", "parts", "marking"],
)
def test_what_was_seen_around_others_changes_no_rendering(
    make_tokenizer: Callable[..., Any], template: str
) -> None:
    tokenizer = make_tokenizer(template=template)
    seasoned = Renderer(tokenizer)
    asked = [[turn("user", "Which?")], [turn("system", "Short."), turn("user", "Q")]]
    rows = [
        {"prompt": prompt, "chosen": said, "rejected": SAYINGS[number - 1]}
        for number, said in enumerate(SAYINGS)
        for prompt in asked
    ]
    for row in [*rows, *rows[::-1]]:
        record = records.parse(
            {**row, **{k: [turn("assistant", row[k])] for k in ("chosen", "rejected")}}
        )
        found, alone = (
            _renderings(renderer, record)
            for renderer in (seasoned, Renderer(tokenizer))
        )
        assert found == alone


def _renderings(renderer: Renderer, record: records.Record) -> Any:
    try:
        found = renderer.completions(record)
    except UserError as error:
        return str(error)
    return [
        (r.text, [(t.start, t.place.begin, *t.place.origins, t.stop) for t in r.turns])
        for r in found
    ]


def test_a_template_prints_each_completion_once(
    make_tokenizer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = make_tokenizer(template=synthetic.CHATML)
    printed, own = [], type(tokenizer).apply_chat_template

    def apply(self: Any, *given: Any, **options: Any) -> Any:
        printed.append(given)
        return own(self, *given, **options)

    renderer = Renderer(tokenizer)
    counts = []
    for text in ("a", "b"):
        row = {"prompt": [turn("user", text)]}
        row |= {k: [turn("assistant", f"{k} {text}")] for k in ("chosen", "rejected")}
        record = records.parse(row)
        if not counts:
            renderer.completions(record)
            monkeypatch.setattr(type(tokenizer), "apply_chat_template", apply)
        printed.clear()
        renderer.completions(record)
        counts.append(len(printed))
    assert counts == [3, 3]  # the prompt, and both with a completion


# Thinking.


@pytest.mark.parametrize(
    "said",
    [
        "<think>\nthe river\n</think>\n\nIt is not.",
        "<think>the river</think>It is not.",
        "the river</think>\nIt is not.",
        "  <think>\n\nthe river\n\n</think>\n\n\nIt is not.",
    ],
)
def test_what_was_thought_is_rendered_as_the_template_prints_it(
    said: str, make_tokenizer: Callable[..., Any]
) -> None:
    tokenizer = make_tokenizer(template=THINKING)
    answer = said.index("It")
    segments = [segment(0, answer), segment(answer, len(said))]
    found = pair(tokenizer, {"chosen": said, "chosen_segments": segments})
    expected = tokenizer.apply_chat_template(
        [ASK, turn("assistant", said)], tokenize=False
    ).removesuffix("\n")
    assert whole(tokenizer, found, found.chosen) == expected
    assert learnt(tokenizer, found.chosen) == (
        "<think>\nthe river\n</think>\n\nIt is not.<|im_end|>"
    )
    # Whose token is whose survives the template's whitespace and its own tags.
    assert segment_text(tokenizer, found.chosen, 1) == "It is not.<|im_end|>"
    assert "the river" in segment_text(tokenizer, found.chosen, 0)


def test_an_option_of_the_template_is_given_to_it(
    make_tokenizer: Callable[..., Any],
) -> None:
    tokenizer = make_tokenizer(template=THINKING)
    thinks = pair(tokenizer, {})
    assert learnt(tokenizer, thinks.chosen) == ("<think>\n\n</think>\n\nthe<|im_end|>")
    silent = pair(tokenizer, {}, enable_thinking=False)
    assert learnt(tokenizer, silent.chosen) == "the<|im_end|>"
    assert whole(tokenizer, silent, silent.chosen) == whole(
        tokenizer, thinks, thinks.chosen
    )
    # A record's own comes first.
    own = {"chat_template_kwargs": {"enable_thinking": True}}
    found = pair(tokenizer, own, enable_thinking=False)
    assert learnt(tokenizer, found.chosen) == learnt(tokenizer, thinks.chosen)


def test_an_option_without_effect_is_refused(
    make_tokenizer: Callable[..., Any],
) -> None:
    tokenizer = make_tokenizer(template=THINKING)
    with pytest.raises(UserError, match="enable_thinking.* has no effect: all prompts"):
        pair(tokenizer, {"prompt": "Q:"}, enable_thinking=False)


@pytest.mark.parametrize(
    ("said", "text"),
    [
        ("the river\n</think>\n\nIt is.", "the river\n</think>\n\nIt is."),
        ("<think>\nthe river\n</think>\n\nIt is.", "the river\n</think>\n\nIt is."),
        ("It is.", "It is."),
        ("", ""),
    ],
)
def test_where_generation_begins_in_the_thinking_so_does_training(
    said: str, text: str, make_tokenizer: Callable[..., Any]
) -> None:
    tokenizer = make_tokenizer(template=OPENING)
    segments = [segment(said.index("It"), len(said))] if said else None
    found = pair(tokenizer, {"chosen": said, "chosen_segments": segments})
    prompt = "<|im_start|>user\nIs it?<|im_end|>\n<|im_start|>assistant\n<think>\n"
    assert _text(tokenizer, found.prompt) == prompt
    assert learnt(tokenizer, found.chosen) == f"{text}<|im_end|>"
    if said:
        assert segment_text(tokenizer, found.chosen, 0) == "It is.<|im_end|>"


# Tools.


def test_tool_calls_are_learnt_with_the_answer(
    make_tokenizer: Callable[..., Any],
) -> None:
    tokenizer = make_tokenizer(template=THINKING)
    call = {"type": "function", "function": {"name": "the", "arguments": {}}}
    asked = turn("assistant", None, tool_calls=[call])
    prompt = [ASK, asked, turn("tool", "seven", tool_call_id="1")]
    found = pair(
        tokenizer,
        {
            "prompt": prompt,
            "chosen": [turn("assistant", "is", tool_calls=[call])],
            "chosen_segments": [segment(0, 2)],
        },
    )
    assert _text(tokenizer, found.prompt) == tokenizer.apply_chat_template(
        prompt, tokenize=False, add_generation_prompt=True
    )
    assert learnt(tokenizer, found.chosen) == (
        "<think>\n\n</think>\n\nis<call>the</call><|im_end|>"
    )
    # The call is no character of the text; the end of turn is the last segment's.
    assert segment_text(tokenizer, found.chosen, 0) == "is<|im_end|>"


# Several turns.

CHAIN = [
    turn("assistant", "the river is"),
    turn("user", "seven and"),
    turn("assistant", "not blue"),
]


def test_of_several_turns_the_assistant_s_are_learnt(
    make_tokenizer: Callable[..., Any],
) -> None:
    tokenizer = make_tokenizer()
    segments = [segment(0, 9), segment(10, 12), segment(0, 3, turn=1)]
    found = pair(tokenizer, {"chosen": CHAIN, "chosen_segments": segments})
    assert whole(tokenizer, found, found.chosen) == tokenizer.apply_chat_template(
        [ASK, *CHAIN], tokenize=False
    ).removesuffix("\n")
    assert learnt(tokenizer, found.chosen) == (
        "the river is<|im_end|>not blue<|im_end|>"
    )
    texts = [segment_text(tokenizer, found.chosen, i) for i in range(3)]
    assert texts == ["the river", " is", "not<|im_end|>"]
    assert found.chosen.num_completion_tokens == len(found.chosen.segments)
    # The other answer has one turn, and all of it is learnt.
    assert learnt(tokenizer, found.rejected) == "not<|im_end|>"


def test_what_the_template_marks_is_learnt_of_several_turns(
    make_tokenizer: Callable[..., Any],
) -> None:
    tokenizer = make_tokenizer(template=MARKING)
    found = pair(tokenizer, {"chosen": CHAIN})
    assert learnt(tokenizer, found.chosen) == "the river isnot blue"
    # Of one turn all is learnt, as TRL does.
    alone = pair(tokenizer, {"chosen": "the river"})
    assert learnt(tokenizer, alone.chosen) == "the river<|im_end|>"


def test_a_cut_completion_of_several_turns_loses_its_tail(
    make_tokenizer: Callable[..., Any],
) -> None:
    tokenizer = make_tokenizer()
    segments = [segment(0, 9), segment(0, 3, turn=1)]
    found = pair(tokenizer, {"chosen": CHAIN, "chosen_segments": segments})
    places = found.chosen.places
    assert len(places) < len(found.chosen.tokens)
    short = truncate(found._replace(prompt=found.prompt[-1:]), 1 + int(places[3]) + 1)
    assert short is not None
    assert short.chosen.places.tolist() == places[:4].tolist()
    assert len(short.chosen.segments) == 4
    assert short.chosen.scored.tolist() == [False, False]


def test_packed_rows_ask_for_the_learnt_tokens_alone(
    make_tokenizer: Callable[..., Any],
) -> None:
    from jaxalign.data import loader, pairs

    tokenizer = make_tokenizer()
    row = {"prompt": [ASK], "chosen": CHAIN, "rejected": "not"}
    data = pairs.prepare([records.parse(row)], tokenizer, max_length=None)
    batch = loader.single_batch(data, row_length=256)
    (found,) = data.pairs
    mine = batch.completions.response[0] == 0
    targets = batch.completions.target[0][mine]
    np.testing.assert_array_equal(targets, found.chosen.tokens[found.chosen.places])
    # Each is predicted from the token before it in the row.
    begin = len(found.prompt)
    np.testing.assert_array_equal(
        batch.completions.source[0][mine], begin + found.chosen.places - 1
    )


# Answers that go on.


def test_a_prompt_may_end_with_an_answer_that_goes_on(
    make_tokenizer: Callable[..., Any],
) -> None:
    tokenizer = make_tokenizer()
    prompt = [ASK, turn("assistant", "the river")]
    found = pair(
        tokenizer,
        {
            "prompt": prompt,
            "chosen": " is not",
            "rejected": [turn("assistant", " is seven")],
            "chosen_segments": [segment(1, 3)],
        },
    )
    assert _text(tokenizer, found.prompt).endswith("<|im_start|>assistant\nthe river")
    assert learnt(tokenizer, found.chosen) == " is not<|im_end|>"
    assert learnt(tokenizer, found.rejected) == " is seven<|im_end|>"
    assert segment_text(tokenizer, found.chosen, 0) == " is<|im_end|>"
    # As it will be generated.
    made = records.parse_prompt({"prompt": prompt})
    assert Renderer(tokenizer).prompt_tokens(made) == found.prompt.tolist()


# Parts and nulls.


@pytest.mark.parametrize("template", [synthetic.CHATML, PARTS], ids=["text", "parts"])
def test_parts_of_a_text_are_that_text(
    template: str, make_tokenizer: Callable[..., Any]
) -> None:
    tokenizer = make_tokenizer(template=template)

    def parts(*texts: str) -> list[dict[str, Any]]:
        return [{"type": "text", "text": text, "image": None} for text in texts]

    plain = pair(tokenizer, {"chosen": "the river"})
    found = pair(
        tokenizer,
        {
            "prompt": [turn("user", parts("Is ", "it?"))],
            "chosen": [turn("assistant", parts("the", " river"))],
        },
    )
    assert whole(tokenizer, found, found.chosen) == whole(
        tokenizer, plain, plain.chosen
    )
    assert learnt(tokenizer, found.chosen) == learnt(tokenizer, plain.chosen)


def test_a_null_is_no_value() -> None:
    row = {
        "prompt": [turn("user", "Q", tool_calls=None, name=None)],
        "chosen": [turn("assistant", "ab", tool_calls=None)],
        "rejected": "c",
        "tools": None,
        "chosen_segments": [
            {"start": 0, "end": 1, "scores": {"h": 3, "c": None}},
            {"start": 1, "end": 2, "scores": {"h": None, "c": None}},
        ],
    }
    found = records.parse(row)
    bare = {**row, "prompt": [turn("user", "Q")], "chosen": "ab", "tools": []}
    bare["chosen_segments"] = [
        {"start": 0, "end": 1, "scores": {"h": 3}},
        {"start": 1, "end": 2},
    ]
    assert found == records.parse(bare)
    assert records.aspects_of([found]) == ("h",)


@pytest.mark.parametrize("label", [1, 0, 1.0, True, False])
def test_labels_of_0_and_1(label: Any) -> None:
    row = {"prompt": "Q", "completion": "a", "label": label}
    assert records.parse(row).label is bool(label)


# Columns of others.


def test_a_column_that_trl_would_use_is_named_once(
    capsys: pytest.CaptureFixture[str],
) -> None:
    progress.say_once.cache_clear()
    row = {"prompt": "Q", "chosen": "a", "rejected": "b"}
    for _ in range(3):
        records.parse(row | {"ref_chosen_logps": -1.0, "margin": 0.5, "source": "x"})
    said = capsys.readouterr().err.splitlines()
    assert [line.split(" is not used")[0] for line in said] == [
        "column ref_chosen_logps",
        "column margin",
    ]
