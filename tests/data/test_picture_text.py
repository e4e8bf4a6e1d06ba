"""Records with pictures as text and tokens: what stands where, and what is refused."""

import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from jaxalign.data import chat, records
from jaxalign.data.rendering import Renderer
from jaxalign.errors import UserError
from tests import synthetic
from tests.data.mosaic import seeing


trl = pytest.importorskip("trl")

TRL = Path(trl.__file__).parent / "chat_templates"

ONEVISION = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }} "
    "{% for c in m['content'] | selectattr('type', 'equalto', 'image') %}<image>\n"
    "{% endfor %}{% for c in m['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ c['text'] }}{% endfor %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""LLaVA-OneVision's: ``assistant `` in a conversation, ``assistant\\n`` to generate."""

VICUNA = (
    "{% for m in messages %}{% if m['role'] == 'user' %}USER: {{ m['content'] }} "
    "{% else %}ASSISTANT: {{ m['content'] }}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
"""LLaVA-1.5's, which prints nothing but texts."""

QWEN = (TRL / "qwen2_5_vl.jinja").read_text()
QWEN = QWEN.replace("<|vision_start|><|image_pad|><|vision_end|>", "<see><pad></see>")

TEMPLATES = {
    "llava_next": (TRL / "llava_next.jinja").read_text(),
    "smolvlm": (TRL / "smolvlm.jinja").read_text(),
    "idefics3": (TRL / "idefics3.jinja").read_text(),
    "qwen2_5_vl": QWEN,
    "onevision": ONEVISION,
}


def png(width: int, height: int, seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def parts(*given: str | None) -> list[dict[str, str]]:
    """Return content: None is a picture, whatever else a text."""
    return [
        {"type": "image"} if part is None else {"type": "text", "text": part}
        for part in given
    ]


def user(*given: str | None) -> dict[str, Any]:
    return {"role": "user", "content": parts(*given)}


ROW: dict[str, Any] = {
    "prompt": [
        user(None, "Is the answer blue?"),
        {"role": "assistant", "content": parts("It is not.")},
        user("And", None, "this one?"),
    ],
    "images": [png(16, 24), png(9, 17)],
    "chosen": "the river is seven",
    "rejected": "blue and  not",
    "chosen_segments": [
        {"start": 0, "end": 9, "scores": {"x": 1.0}},
        {"start": 10, "end": 18, "scores": {"x": 2.0}},
    ],
    "rejected_segments": [{"start": 5, "end": 13, "scores": {"x": 3.0}}],
}


@pytest.fixture
def made(make_tokenizer: Callable[..., Any]) -> Callable[..., Renderer]:
    def make(template: str | None = synthetic.CHATML, **options: Any) -> Renderer:
        tokenizer, patcher = seeing(make_tokenizer(template=template), **options)
        return Renderer(tokenizer, patcher=patcher)

    return make


def tokens_of(renderer: Renderer, row: dict[str, Any]) -> chat.TokenizedPair:
    return next(chat.tokenize([records.parse(row, "f.jsonl:3")], renderer))


def options_of(name: str) -> dict[str, Any]:
    return {"axes": 3} if name == "qwen2_5_vl" else {}


def without_pictures(row: dict[str, Any]) -> dict[str, Any]:
    turns = [
        {**turn, "content": [p for p in turn["content"] if p["type"] == "text"]}
        for turn in row["prompt"]
    ]
    return {**row, "prompt": turns, "images": []}


@pytest.mark.parametrize("name", TEMPLATES)
def test_tokens_are_those_of_the_template_with_placeholders_replaced(
    made: Callable[..., Renderer], name: str
) -> None:
    renderer = made(TEMPLATES[name], **options_of(name))
    pair, patcher = tokens_of(renderer, ROW), renderer.patcher
    assert patcher is not None
    said = renderer.tokenizer.apply_chat_template(
        ROW["prompt"], tokenize=False, add_generation_prompt=True
    )
    # As transformers' processors do it: the k-th placeholder by the k-th text.
    texts = iter(patcher.layout(w, h).text for w, h in ((16, 24), (9, 17)))
    said = re.sub(re.escape(patcher.placeholder), lambda _: next(texts), said)
    expected = renderer.tokenizer(said, add_special_tokens=False)["input_ids"]
    assert pair.prompt.tolist() == expected
    assert [picture.source for picture in pair.images] == ROW["images"]
    # 16 x 24 pixels are 6 x 4 patches and 3 x 2 features; 9 x 17 are 2 x 1.
    assert [layout.grids for layout in pair.layouts] == [((6, 4),), ((4, 2),)]
    assert pair.units == 6 + 2 and len(pair.feature_places) == 8
    assert (pair.prompt[pair.feature_places] == patcher.token_id).all()
    assert (pair.prompt == patcher.token_id).sum() == 8
    for (begin, end), size in zip(pair.stretches, (6, 2), strict=True):
        assert end - begin == size + 2
    # What generation sees is the same prompt.
    prompt = records.parse_prompt({k: ROW[k] for k in ("prompt", "images")})
    encoding = renderer.prompt_encoding(prompt)
    assert encoding.tokens == pair.prompt.tolist()
    assert encoding.feature_places.tolist() == pair.feature_places.tolist()
    assert encoding.layouts == pair.layouts
    if patcher.axes == 3:
        np.testing.assert_array_equal(encoding.positions, pair.positions)
    else:
        assert encoding.positions is None and pair.positions is None


@pytest.mark.parametrize("name", [*TEMPLATES, "vicuna", "chatml"])
def test_pictures_change_nothing_of_the_completions(
    made: Callable[..., Renderer], name: str
) -> None:
    template = {**TEMPLATES, "vicuna": VICUNA, "chatml": synthetic.CHATML}[name]
    renderer = made(template, **options_of(name))
    seen, blind = (tokens_of(renderer, row) for row in (ROW, without_pictures(ROW)))
    assert not blind.images and not blind.units and not len(blind.feature_places)
    assert len(seen.prompt) > len(blind.prompt)
    for with_picture, without in (
        (seen.chosen, blind.chosen),
        (seen.rejected, blind.rejected),
    ):
        assert with_picture.lead == without.lead
        assert with_picture.offsets == without.offsets
        for field in ("tokens", "segments", "scores", "scored", "places"):
            np.testing.assert_array_equal(
                getattr(with_picture, field), getattr(without, field)
            )
    assert seen.chosen.scored.all()


def test_of_several_turns_the_same_tokens_are_learnt(
    made: Callable[..., Renderer],
) -> None:
    turns = [
        {"role": "assistant", "content": parts("blue")},
        user("Is it?"),
        {"role": "assistant", "content": parts("it is")},
    ]
    row = {"prompt": [user(None, "What?")], "images": [png(40, 40)], "rejected": "not"}
    row["chosen"] = turns
    for name in ("smolvlm_training", "smolvlm"):
        renderer = made((TRL / f"{name}.jinja").read_text())
        seen, blind = (tokens_of(renderer, r) for r in (row, without_pictures(row)))
        assert seen.chosen.learnt is not None and blind.chosen.learnt is not None
        assert 0 < seen.chosen.learnt.sum() < len(seen.chosen.learnt)
        np.testing.assert_array_equal(seen.chosen.learnt, blind.chosen.learnt)
        np.testing.assert_array_equal(seen.chosen.tokens, blind.chosen.tokens)


def test_a_template_of_texts_gets_the_placeholder_and_a_line_break(
    made: Callable[..., Renderer],
) -> None:
    row = {"images": [png(8, 8)], "prompt": [user(None, "What?")]}
    prompt = records.parse_prompt(row)
    assert made(VICUNA).prompt_text(prompt) == "USER: <image>\nWhat? ASSISTANT:"
    # No part says where: before the first user turn's text (TRL's rule).
    row["prompt"] = [{"role": "user", "content": "What?"}]
    prompt = records.parse_prompt(row)
    assert made(VICUNA).prompt_text(prompt) == "USER: <image>\nWhat? ASSISTANT:"
    tokens = made(VICUNA).prompt_encoding(prompt).tokens
    text = made(VICUNA).tokenizer.decode(tokens)
    assert text == "USER: <frame><image><frame>\nWhat? ASSISTANT:"


def test_a_plain_text_holds_its_own_placeholders(
    made: Callable[..., Renderer],
) -> None:
    renderer = made(None)
    row: dict[str, Any] = {
        "prompt": "<image> or <image>?",
        "chosen": "a",
        "rejected": "b",
    }
    row["images"] = [png(8, 8), png(40, 16)]
    pair = tokens_of(renderer, row)
    # 40 x 16 pixels are wider than twice their height: two tiles of 4 x 4 patches.
    assert [layout.grids for layout in pair.layouts] == [((2, 2),), ((4, 4),) * 2]
    text = "<frame><image><frame> or "
    text += "<frame>" + "<image>" * 4 + "\n<frame>" + "<image>" * 4 + "<frame>?"
    assert renderer.tokenizer.decode(pair.prompt) == text
    assert pair.units == 1 + 8


def refused(
    renderer: Renderer, match: str, row: dict[str, Any], **changed: Any
) -> None:
    with pytest.raises(UserError, match=match) as error:
        tokens_of(renderer, {**row, **changed})
    assert "f.jsonl:3" in str(error.value)


def test_what_does_not_fit_is_refused_with_file_and_line(
    made: Callable[..., Renderer],
) -> None:
    plain, talk = made(None), made(TEMPLATES["smolvlm"])
    qwen = made(QWEN, axes=3)
    row: dict[str, Any] = {"prompt": "<image>Q ", "chosen": "a", "rejected": "b"}
    row["images"] = [png(8, 8)]
    no_place = r"2 picture\(s\), but the prompt has 1 place"
    refused(plain, no_place, row, images=[png(8, 8)] * 2)
    refused(plain, r"0 picture\(s\), but the prompt has 1", row, images=[])
    refused(plain, "a text holds <image>", row, rejected="an <image>")
    bare = {**row, "prompt": "<see><pad></see> and <pad>?"}
    refused(qwen, "the text holds <pad> where no picture is", bare)
    said = [user(None, "What is <image>?")]
    refused(talk, 'holds <image>, .* a part {"type": "image"}', row, prompt=said)
    wide = {**row, "images": [png(100, 4)]}
    refused(plain, "100 x 4 pixels: wider than 20 times", wide)
    blind = Renderer(plain.tokenizer)
    refused(blind, "does not see: it takes texts only", row)
    prompt = records.parse_prompt({**row, "prompt": said}, "f.jsonl:3")
    with pytest.raises(UserError, match="does not see"):
        blind.prompt_tokens(prompt)


def test_a_template_that_leaves_a_picture_out_is_refused(
    made: Callable[..., Renderer],
) -> None:
    # It prints what stands in the first turn only.
    template = TEMPLATES["smolvlm"].replace(
        "line['type'] == 'image'", "line['type'] == 'image' and loop.index == 1"
    )
    row = {**ROW, "prompt": [user(None, "Two", None, "of them?")]}
    refused(made(template), r"2 picture\(s\), but the prompt has 1", row)


def test_a_picture_may_be_the_last_of_a_plain_prompt(
    made: Callable[..., Renderer],
) -> None:
    row = {"prompt": "Q <image>", "images": [png(8, 8)]}
    pair = tokens_of(made(None), {**row, "chosen": "a", "rejected": "b"})
    assert made(None).tokenizer.decode(pair.prompt) == "Q <frame><image><frame>"
    assert pair.stretches == ((len(pair.prompt) - 3, len(pair.prompt)),)


def test_a_tokenizer_that_reads_the_text_otherwise_is_no_users_fault(
    made: Callable[..., Renderer],
) -> None:
    renderer = made(None)
    other = Renderer(renderer.tokenizer, patcher=seeing(renderer.tokenizer)[1])
    assert other.patcher is not None
    object.__setattr__(other.patcher, "token_id", 0)
    row = {"prompt": "<image>Q ", "images": [png(8, 8)], "chosen": "a", "rejected": "b"}
    with pytest.raises(ValueError, match=r"f.jsonl:3: 0 tokens 0 .* for 1 features"):
        tokens_of(other, row)


def positions_by_hand(pair: chat.TokenizedPair) -> Sequence[Sequence[int]]:
    assert pair.positions is not None
    return pair.positions.T.tolist()


def test_positions_of_multimodal_rotary_by_hand(made: Callable[..., Renderer]) -> None:
    # The example of the specification: a, vs, 2 x 3 features, ve, b, c.
    renderer = made(None, axes=3)
    row = {"prompt": "a<see><pad></see>bc", "images": [png(24, 16)]}
    pair = tokens_of(renderer, {**row, "chosen": " d", "rejected": " ee"})
    assert positions_by_hand(pair) == [
        [0, 1, 2, 2, 2, 2, 2, 2, 5, 6, 7],
        [0, 1, 2, 2, 2, 3, 3, 3, 5, 6, 7],
        [0, 1, 2, 3, 4, 2, 3, 4, 5, 6, 7],
    ]
    assert len(pair.prompt) == 11
    # A text's three are the same number.
    pair = tokens_of(renderer, {"prompt": "cdc", "chosen": " d", "rejected": " e"})
    assert positions_by_hand(pair) == [[0, 1, 2]] * 3
