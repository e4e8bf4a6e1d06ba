"""From records to tokens: what is a completion, and whose token is whose."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxalign.data import chat, records
from jaxalign.data.chat import Branch, TokenizedPair
from jaxalign.errors import UserError
from tests import synthetic


# Trims the content, prints the BOS itself and a space around the answer.
LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}"
    "<s>[INST] {{ m['content'] | trim }} [/INST]"
    "{% else %} {{ m['content'] | trim }} </s>{% endif %}{% endfor %}"
)
# Trims the content; the header is of special tokens; nothing after the end of turn.
LLAMA3 = (
    "<s>{% for m in messages %}<|im_start|>{{ m['role'] }}<|im_start|>\n\n"
    "{{ m['content'] | trim }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant<|im_start|>\n\n{% endif %}"
)
# Prints text and special tokens after the end of turn.
CHATTY = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>"
    "\n-- end of turn --</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# An answer begins with something that the generation prompt does not print.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}not\n\n{% endif %}"
    "{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def segment(start: int, end: int, **scores: float) -> dict[str, Any]:
    return {"start": start, "end": end, "scores": scores or {"x": 1.0}}


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def pair(
    tokenizer: Any,
    prompt: Any,
    chosen: str,
    rejected: str = "no",
    *,
    chosen_segments: Sequence[dict[str, Any]] | None = None,
    rejected_segments: Sequence[dict[str, Any]] | None = None,
    aspects: tuple[str, ...] | None = None,
) -> TokenizedPair:
    columns = {
        "prompt": prompt,
        "chosen": chosen,
        "rejected": rejected,
        "chosen_segments": chosen_segments,
        "rejected_segments": rejected_segments,
    }
    record = records.parse(columns, "f.jsonl:7")
    (found,) = chat.tokenize([record], tokenizer, aspects=aspects)
    return found


def user(content: str = "Is it?") -> list[dict[str, str]]:
    return [turn("user", content)]


def names(tokenizer: Any, tokens: np.ndarray) -> list[str]:
    return tokenizer.convert_ids_to_tokens(tokens.tolist())


def text_of(tokenizer: Any, tokens: Sequence[int] | np.ndarray) -> str:
    return b"".join(synthetic.token_bytes(tokenizer, t) for t in tokens).decode()


def completion(branch: Branch) -> np.ndarray:
    return branch.tokens[branch.lead :]


# What a completion is.


def test_chatml_completion_ends_with_the_end_of_turn_once(
    make_tokenizer: Callable[..., Any],
) -> None:
    tokenizer = make_tokenizer()
    assert tokenizer.pad_token_id == tokenizer.eos_token_id  # must not matter
    found = pair(tokenizer, user(), "the answer", chosen_segments=[segment(0, 3)])
    assert text_of(tokenizer, found.prompt) == (
        "<|im_start|>user\nIs it?<|im_end|>\n<|im_start|>assistant\n"
    )
    # Not the newline that ChatML prints after it.
    assert names(tokenizer, completion(found.chosen)) == [
        *("t", "h", "e", "Ġanswer", "<|im_end|>")
    ]
    assert found.chosen.lead == 0
    # " answer" is in no segment; the end of turn is a token of the last one.
    assert found.chosen.segments.tolist() == [0, 0, 0, -1, 0]
    assert names(tokenizer, found.rejected.tokens) == ["n", "o", "<|im_end|>"]


def test_special_tokens_inside_the_text_do_not_end_it(
    make_tokenizer: Callable[..., Any],
) -> None:
    tokenizer = make_tokenizer()
    found = pair(tokenizer, user(), "ab</s>ab<|im_end|>ab ", "</s>")
    assert names(tokenizer, completion(found.chosen)) == [
        *("ab", "</s>", "ab", "<|im_end|>", "ab", "Ġ", "<|im_end|>")
    ]
    assert names(tokenizer, completion(found.rejected)) == ["</s>", "<|im_end|>"]


def test_end_of_turn_that_swallows_whitespace(
    make_tokenizer: Callable[..., Any],
) -> None:
    tokenizer = make_tokenizer(swallow=True)
    segments = [segment(0, 2), segment(2, 4)]
    found = pair(tokenizer, user(), "ab \n", chosen_segments=segments).chosen
    # The text's own " \n" and the template's "\n" are in the end of turn.
    assert names(tokenizer, found.tokens) == ["ab", "<|im_end|>"]
    assert found.segments.tolist() == [0, 1]


def test_plain_completion_gets_one_eos(make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer()
    found = pair(
        tokenizer,
        "Q:",
        " the",
        "",
        rejected_segments=[],
        chosen_segments=[segment(0, 4)],
    )
    assert names(tokenizer, found.prompt) == ["Q", ":"]
    assert names(tokenizer, found.chosen.tokens) == ["Ġthe", "<|im_end|>"]
    assert found.chosen.segments.tolist() == [0, 0]
    assert names(tokenizer, found.rejected.tokens) == ["<|im_end|>"]
    # One that the text already ends with is not doubled.
    found = pair(tokenizer, "Q:", " the<|im_end|>", " the")
    assert found.chosen.tokens.tolist() == found.rejected.tokens.tolist()


def test_no_eos_token_no_eos(make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer(eos=None)
    segments = [segment(0, 1), segment(1, 4)]
    found = pair(tokenizer, "Q:", " the.", chosen_segments=segments)
    assert names(tokenizer, found.chosen.tokens) == ["Ġthe", "."]
    # The last token is no end of turn that would be the last segment's.
    assert found.chosen.segments.tolist() == [1, -1]
    assert found.chosen.scored.tolist() == [False, True]


@pytest.mark.parametrize("trim_offsets", [True, False])
def test_bos_stands_once_and_only_at_the_front(
    make_tokenizer: Callable[..., Any], trim_offsets: bool
) -> None:
    # The defect of Tunix 0.1.7: each response tokenised like a document of its own.
    tokenizer = make_tokenizer(bos=True, trim_offsets=trim_offsets, template=LLAMA3)
    for prompt in ("Q:", user()):
        found = pair(tokenizer, prompt, " the answer", "ab")
        assert found.prompt[0] == tokenizer.bos_token_id
        for tokens in (found.prompt[1:], found.chosen.tokens, found.rejected.tokens):
            assert tokenizer.bos_token_id not in tokens
    # An empty prompt is one token all the same.
    found = pair(tokenizer, "", "the", chosen_segments=[segment(0, 3)])
    assert names(tokenizer, found.prompt) == ["<s>"]
    assert found.chosen.segments.tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("bos", [True, False])
def test_chat_gets_no_bos_that_the_template_does_not_print(
    make_tokenizer: Callable[..., Any], bos: bool
) -> None:
    found = pair(make_tokenizer(bos=bos), user(), "the")
    assert names(make_tokenizer(), found.prompt)[0] == "<|im_start|>"


TEMPLATES = {
    # name: (template, EOS, rendering of a user turn and an answer up to its end)
    "chatml": (
        synthetic.CHATML,
        "<|im_end|>",
        ("<|im_start|>user\nIs it?<|im_end|>\n<|im_start|>assistant\n", "  ab b \n"),
        "<|im_end|>",
    ),
    "llama2": (LLAMA2, "</s>", ("<s>[INST] Is it? [/INST]", " ab b"), " </s>"),
    "llama3": (
        LLAMA3,
        "<|im_end|>",
        (
            "<s><|im_start|>user<|im_start|>\n\nIs it?<|im_end|>"
            "<|im_start|>assistant<|im_start|>\n\n",
            "ab b",
        ),
        "<|im_end|>",
    ),
    # The EOS is not the end of turn, and is printed after it.
    "chatty": (
        CHATTY,
        "</s>",
        (
            "<|im_start|>user\nIs it?<|im_end|>\n-- end of turn --</s>\n"
            "<|im_start|>assistant\n",
            "  ab b \n",
        ),
        "<|im_end|>",
    ),
    "thinking": (
        THINKING,
        "<|im_end|>",
        (
            "<|im_start|>user\nIs it?<|im_end|>\n<|im_start|>assistant\n",
            "not\n\n  ab b \n",
        ),
        "<|im_end|>",
    ),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_completion_is_what_the_template_prints_up_to_the_end_of_turn(
    name: str, make_tokenizer: Callable[..., Any]
) -> None:
    template, eos, (prompt, printed), end = TEMPLATES[name]
    tokenizer = make_tokenizer(bos=True, template=template, eos=eos)
    found = pair(tokenizer, user(), "  ab b \n", "the")
    assert text_of(tokenizer, found.prompt) == prompt
    assert text_of(tokenizer, completion(found.chosen)) == printed + end


def test_segments_follow_a_text_that_the_template_trims(
    make_tokenizer: Callable[..., Any],
) -> None:
    tokenizer = make_tokenizer(bos=True, template=LLAMA2, eos="</s>")
    #            0123456789
    segments = [segment(0, 2), segment(2, 5), segment(5, 6), segment(6, 8)]
    found = pair(tokenizer, user(), "  ab b  ", chosen_segments=segments).chosen
    assert names(tokenizer, found.tokens) == ["Ġa", "b", "Ġ", "b", "Ġ", "</s>"]
    # The last space is printed by the template, where the text had its own: it is no
    # character of [6, 8), which has the end of turn only because it is listed last.
    assert found.segments.tolist() == [1, 1, 1, 2, -1, 3]
    assert found.scored.tolist() == [False, True, True, True]
    more = [*segments[:3], segment(6, 7), segment(7, 8)]
    found = pair(tokenizer, user(), "  ab b  ", chosen_segments=more).chosen
    assert found.segments.tolist() == [1, 1, 1, 2, -1, 4]
    assert found.scored.tolist() == [False, True, True, False, True]
    # The same in front: the template's space is not the one of [0, 2).
    found = pair(
        tokenizer, user(), "  7", chosen_segments=[segment(0, 2), segment(2, 3)]
    ).chosen
    assert names(tokenizer, found.tokens) == ["Ġ", "7", "Ġ", "</s>"]
    assert found.segments.tolist() == [-1, 1, -1, 1]
    assert found.scored.tolist() == [False, True]


def test_what_a_template_prints_before_the_answer_is_unscored(
    make_tokenizer: Callable[..., Any],
) -> None:
    tokenizer = make_tokenizer(template=THINKING)
    found = pair(tokenizer, user(), "the", chosen_segments=[segment(0, 3)]).chosen
    assert names(tokenizer, found.tokens) == [
        *("n", "o", "t", "Ċ", "Ċ", "t", "h", "e", "<|im_end|>")
    ]
    assert found.segments.tolist() == [-1] * 5 + [0] * 4


def test_segment_of_whitespace_owns_nothing_and_is_unscored(
    make_tokenizer: Callable[..., Any],
) -> None:
    # "the answer": the space is a character of the token " answer".
    segments = [segment(0, 3), segment(3, 4, y=2.0), segment(4, 10)]
    found = pair(make_tokenizer(), user(), "the answer", chosen_segments=segments)
    assert found.chosen.segments.tolist() == [0, 0, 0, 2, 2]
    assert found.chosen.scored.tolist() == [True, False, True]
    # Aspects x and y, in order of their names.
    expected = [[1, np.nan], [np.nan, 2], [1, np.nan]]
    np.testing.assert_array_equal(found.chosen.scores, expected)
    assert found.chosen.offsets == ((0, 3, 0), (3, 4, 0), (4, 10, 0))


def test_scores_stand_in_the_order_of_the_aspects_asked_for(
    make_tokenizer: Callable[..., Any],
) -> None:
    found = pair(
        make_tokenizer(),
        user(),
        "ab",
        chosen_segments=[segment(0, 2, a=1.0, b=2.0)],
        aspects=("b", "unjudged", "a"),
    )
    np.testing.assert_array_equal(found.chosen.scores, [[2, np.nan, 1]])
    assert found.rejected.scores.shape == (0, 3)


def test_turns_and_system_prompt_are_all_prompt(
    make_tokenizer: Callable[..., Any],
) -> None:
    turns = [turn("system", "the"), *user("is"), turn("assistant", "ab"), *user("not")]
    tokenizer = make_tokenizer()
    found = pair(tokenizer, turns, "ab")
    assert text_of(tokenizer, found.prompt) == (
        "<|im_start|>system\nthe<|im_end|>\n<|im_start|>user\nis<|im_end|>\n"
        "<|im_start|>assistant\nab<|im_end|>\n<|im_start|>user\nnot<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert names(tokenizer, found.chosen.tokens) == ["ab", "<|im_end|>"]


# The border between prompt and completion.


def test_token_merged_over_the_border_belongs_to_the_completion(
    make_tokenizer: Callable[..., Any],
) -> None:
    tokenizer = make_tokenizer()
    # "a" + "b" is one token; "a" + "c" are two.
    found = pair(tokenizer, "Q:a", "b", "c", chosen_segments=[segment(0, 1)])
    assert names(tokenizer, found.prompt) == ["Q", ":"]
    assert names(tokenizer, found.chosen.tokens) == ["ab", "<|im_end|>"]
    assert (found.chosen.lead, found.chosen.num_completion_tokens) == (0, 2)
    assert found.chosen.segments.tolist() == [0, 0]
    # The rejected rendering's "a" is still prompt: not scored, but not shared either.
    assert names(tokenizer, found.rejected.tokens) == ["a", "c", "<|im_end|>"]
    assert (found.rejected.lead, found.rejected.num_completion_tokens) == (1, 2)
    assert found.rejected.segments.tolist() == [-1, -1]
    assert found.length == 2 + 2 + 3
    assert found.longest == 2 + 3
    # "ba" is one token, but of "bab" the "ab" is: the prompt's tokens change too.
    found = pair(tokenizer, "Q:ba", "b", "c")
    assert names(tokenizer, found.prompt) == ["Q", ":"]
    assert names(tokenizer, found.chosen.tokens) == ["b", "ab", "<|im_end|>"]
    assert names(tokenizer, found.rejected.tokens) == ["ba", "c", "<|im_end|>"]
    assert (found.chosen.lead, found.rejected.lead) == (1, 1)
    # Both merge, to the same: what they share before it is prompt.
    found = pair(tokenizer, "Q:ba", "b", "bc")
    assert names(tokenizer, found.prompt) == ["Q", ":", "b"]
    assert names(tokenizer, found.rejected.tokens) == ["ab", "c", "<|im_end|>"]
    assert (found.chosen.lead, found.rejected.lead) == (0, 0)


def test_shared_prefix_ends_at_the_completion_even_where_the_answers_agree(
    make_tokenizer: Callable[..., Any],
) -> None:
    tokenizer = make_tokenizer()
    found = pair(tokenizer, user(), "the same start, then x", "the same start, then y")
    assert text_of(tokenizer, found.prompt).endswith("<|im_start|>assistant\n")
    assert found.chosen.lead == found.rejected.lead == 0
    assert np.array_equal(found.chosen.tokens[:5], found.rejected.tokens[:5])


# What is refused.


@pytest.mark.parametrize(
    ("prompt", "chosen", "options", "expected"),
    [
        (user(), "the", {"template": None}, "f.jsonl:7: .* has no chat template. Use"),
        ("", "the", {}, "f.jsonl:7: field prompt: no token comes before"),
        # One token holds prompt and completion.
        ("a", "b", {}, "f.jsonl:7: field prompt: no token comes before"),
        ("Q", "", {"eos": None}, "field chosen: the completion has no token: it is"),
        (
            user(),
            "",
            {"template": synthetic.CHATML.replace("<|im_end|>\n", ""), "eos": None},
            "field chosen: the completion has no token: it is empty, and no end of",
        ),
        (
            user(),
            "ab</s>ab",
            {"template": synthetic.CHATML.replace("}}", ".split('</s>')[-1] }}")},
            "f.jsonl:7: the chat template changes the completion's text .*Use another",
        ),
        (
            user(),
            "ab",
            {"template": synthetic.CHATML.replace("}}", "| upper }}")},
            "f.jsonl:7: the chat template does not print the assistant's text as it is",
        ),
        (
            [turn("tool", "x")],
            "ab",
            {"template": "{{ raise_exception('no tools here') }}"},
            "f.jsonl:7: the chat template refuses the roles tool: no tools here",
        ),
        (user(), "ab", {"template": "{{ messages[0].content + 1 }}"}, "roles user: "),
    ],
)
def test_refused(
    make_tokenizer: Callable[..., Any],
    prompt: Any,
    chosen: str,
    options: dict[str, Any],
    expected: str,
) -> None:
    with pytest.raises(UserError, match=expected):
        pair(make_tokenizer(**options), prompt, chosen)


def test_load_tokenizer(tiny_llama: Path, tmp_path: Path) -> None:
    assert chat.load_tokenizer(str(tiny_llama)).eos_token == "<|im_end|>"
    with pytest.raises(UserError, match="its tokenizer cannot be loaded: .*Expected"):
        chat.load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("place", ["chat_template.jinja", "tokenizer_config.json"])
def test_a_chat_template_in_either_file(tiny_llama, tmp_path, place) -> None:
    """transformers 5 writes a file of its own, transformers 4 a field."""
    shutil.copytree(tiny_llama, tmp_path / "model")
    file = tmp_path / "model" / "chat_template.jinja"
    template = file.read_text()
    config = tmp_path / "model" / "tokenizer_config.json"
    values = json.loads(config.read_text())
    assert "chat_template" not in values
    if place == "tokenizer_config.json":
        file.unlink()
        config.write_text(json.dumps(values | {"chat_template": template}))
    tokenizers = [chat.load_tokenizer(str(p)) for p in (tiny_llama, file.parent)]
    record = records.parse(synthetic.feedback_records(1)[0])
    got = [list(chat.tokenize([record], tokenizer)) for tokenizer in tokenizers]
    assert tokenizers[1].chat_template == template == synthetic.CHATML
    assert repr(got[0]) == repr(got[1])


def test_chunks_change_nothing(make_tokenizer: Callable[..., Any]) -> None:
    made = synthetic.feedback_records(7)
    made += synthetic.feedback_records(6, seed=1, chat=False)
    made.insert(2, made.pop())
    parsed = [records.parse(record) for record in made]
    tokenizer = make_tokenizer(bos=True)
    whole = list(chat.tokenize(parsed, tokenizer))
    single = [p for r in parsed for p in chat.tokenize([r], tokenizer)]
    for chunked in (single, list(chat.tokenize(parsed, tokenizer, chunk=3))):
        for a, b in zip(whole, chunked, strict=True):
            assert repr(a) == repr(b)


@pytest.mark.data
def test_tokens_of_a_real_segment_spell_its_text(
    shared_data: Path, make_tokenizer: Callable[..., Any]
) -> None:
    tokenizer = make_tokenizer()
    found = records.read(shared_data / "qa_feedback" / "records.jsonl")
    assert len(found) == 399
    found = found[::4]
    checked = 0
    for record, made in zip(found, chat.tokenize(found, tokenizer), strict=True):
        for branch, text, segments in (
            (made.chosen, record.chosen, record.chosen_segments),
            (made.rejected, record.rejected, record.rejected_segments),
        ):
            end = completion(branch)[-1]
            assert end == tokenizer.eos_token_id
            spelt = text_of(tokenizer, completion(branch)[:-1])
            assert spelt == text, record.where  # the text itself may be offensive
            for number, one in enumerate(segments or ()):
                own = completion(branch)[branch.segments == number]
                own = own[:-1] if own[-1] == end else own
                same = (
                    text_of(tokenizer, own).strip() == text[one.start : one.end].strip()
                )
                assert same, f"{record.where}, segment {number}"
                checked += 1
    assert checked > 300
