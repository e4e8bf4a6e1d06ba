"""The small model that sees, as ``experiments/tiny_vlm.py`` left it."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image


DIRECTORY = os.environ.get("JAXALIGN_TINY_VLM")

pytestmark = pytest.mark.skipif(
    DIRECTORY is None,
    reason="run `python experiments/tiny_vlm.py --out DIR --quick` and set "
    "JAXALIGN_TINY_VLM=DIR",
)


@pytest.fixture(scope="module")
def folder() -> Path:
    return Path(DIRECTORY or "")


def lines(path: Path) -> list[dict]:
    return [json.loads(x) for x in path.read_text(encoding="utf-8").splitlines()]


def test_both_stages_learned(folder: Path) -> None:
    for stage in ("stage1", "stage2"):
        losses = [x["loss"] for x in lines(folder / stage / "metrics.jsonl")]
        assert losses[-1] < 0.9 * losses[0], stage


def test_transformers_gives_the_same_greedy_answers(folder: Path) -> None:
    from transformers import AutoTokenizer, LlavaForConditionalGeneration
    from transformers.models.clip.image_processing_pil_clip import (
        CLIPImageProcessorPil,
    )

    path = folder / "model"
    model, told = LlavaForConditionalGeneration.from_pretrained(
        path, dtype=torch.float32, output_loading_info=True
    )
    assert not any(told[kind] for kind in ("missing_keys", "unexpected_keys"))
    tokenizer = AutoTokenizer.from_pretrained(path)
    processor = CLIPImageProcessorPil.from_pretrained(path)
    image_token = model.config.image_token_id
    asked = lines(folder / "measured" / "stage2.questions.jsonl")
    said = lines(folder / "measured" / "stage2.jsonl")
    for row, line in list(zip(asked, said, strict=True))[::15]:
        text = tokenizer.apply_chat_template(
            row["prompt"], tokenize=False, add_generation_prompt=True
        )
        ids = tokenizer(text.replace("<image>", "<image>" * 64))["input_ids"]
        assert ids.count(image_token) == 64
        picture = Image.open(folder / row["images"][0])
        pixels = processor([picture], return_tensors="np")["pixel_values"]
        given = torch.tensor([ids])
        with torch.no_grad():
            out = model.generate(
                input_ids=given,
                attention_mask=torch.ones_like(given),
                pixel_values=torch.tensor(np.asarray(pixels)),
                max_new_tokens=24,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
            )
        answer = tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True)
        assert answer == line["completions"][0]["text"]
