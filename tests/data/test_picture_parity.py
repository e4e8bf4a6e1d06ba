"""Prompts with pictures as tokens beside transformers' own processors."""

import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from transformers.models.smolvlm import processing_smolvlm

from jaxalign.data import chat, loader, pairs, records
from jaxalign.data.patches import Patcher
from jaxalign.data.rendering import Renderer
from tests.data.patchers import published
from tests.data.patchers.test_parity import PATCHERS, options_of, reference
from tests.data.test_picture_text import TRL, VICUNA, user


pytestmark = pytest.mark.parity

FAMILIES = {
    "smolvlm-256m": (TRL / "smolvlm.jinja").read_text(),
    "idefics3-8b": (TRL / "idefics3.jinja").read_text(),
    "llava-1.5": VICUNA,
    "qwen2.5-vl": (TRL / "qwen2_5_vl.jinja").read_text(),
}

SIZES = ((97, 61), (640, 480), (30, 30))


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_and_units_are_those_of_the_processor(
    tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # SmolVLM's processor asks for num2words, which only names the numbers of videos.
    monkeypatch.setattr(processing_smolvlm, "num2words", str)
    checkpoint = published.write(tmp_path, family)
    made: type[Any] = PATCHERS[checkpoint.config["model_type"]]
    patcher: Patcher = made.from_files(*checkpoint.arguments)
    tokenizer = checkpoint.tokenizer
    tokenizer.chat_template = FAMILIES[family]
    renderer = Renderer(tokenizer, patcher=patcher)
    pictures = [published.drawn(*size, seed=i) for i, size in enumerate(SIZES)]
    row = {
        "prompt": [user(None, "the river, or", None, "?"), user(None, "And blue?")],
        "images": [png(picture) for picture in pictures],
        "chosen": "seven",
        "rejected": "not  blue",
    }
    record = records.parse(row)
    prompt = records.parse_prompt({k: row[k] for k in ("prompt", "images")})
    text = renderer.prompt_text(prompt)
    theirs = reference(checkpoint, **options_of(patcher, checkpoint.config))(
        text=[text], images=[pictures], add_special_tokens=False
    )
    assert renderer.prompt_encoding(prompt).tokens == theirs["input_ids"][0]
    (pair,) = chat.tokenize([record], renderer)
    assert pair.prompt.tolist() == theirs["input_ids"][0]
    # And a row holds as many units as there are features, and class tokens.
    data = pairs.prepare([record], renderer, max_length=None)
    images = loader.single_batch(data).inputs.images
    assert images is not None
    filled = images.features_to[0][images.features_to[0] >= 0]
    assert sorted(filled.tolist()) == pair.feature_places.tolist()
    assert len(filled) == theirs["input_ids"][0].count(patcher.token_id)
