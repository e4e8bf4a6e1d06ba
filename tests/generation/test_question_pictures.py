"""Questions about pictures: transformers' log-probabilities of every answer."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers.models.smolvlm import processing_smolvlm

from jaxalign.data.picture import Picture
from jaxalign.data.records import parse_prompt
from jaxalign.errors import UserError
from jaxalign.generation import answer_logps, text_model
from tests import vision_records
from tests.judging.test_local_pictures import Case


ANSWERS = ("yes", "no, it is blue", "the river is")
SHOWN = ((0,), (), (1, 0), (1,))
"""Which pictures each question shows."""


@pytest.mark.parametrize("kind", ["llava", "idefics3", "qwen2_5_vl"])
def test_log_probs_are_those_of_transformers(
    kind: str, tmp_path: Path, monkeypatch
) -> None:
    """Alone in a row and packed, with text between: the same, to 1e-4."""
    monkeypatch.setattr(processing_smolvlm, "num2words", str)
    case = Case(kind, tmp_path)
    made = text_model.load(case.model)
    questions, wanted = [], []
    for n, shown in enumerate(SHOWN):
        parts: list[Any] = [{"type": "image"} for _ in shown]
        parts.insert(n % 2, {"type": "text", "text": f"is the river {n}?"})
        turns = [{"role": "user", "content": parts}]
        images = [case.images[i] for i in shown]
        row = {"prompt": turns, "images": [vision_records.png(one) for one in images]}
        prompt = parse_prompt(row)
        questions.append(answer_logps.question(prompt, ANSWERS, made.renderer))
        head = case.theirs._rendered(turns, add_generation_prompt=True)
        begin = len(case.logits(head, images)[0])
        assert begin == len(questions[-1].prompt)
        wanted.append([])
        for answer in ANSWERS:
            ids, logps = case.logits(head + answer, images)
            each = [logps[at - 1, ids[at]] for at in range(begin, len(ids))]
            wanted[-1].append(each)
    for options in ({"row_length": None, "batch_rows": 2}, {"row_length": 400}):
        found = answer_logps.answer_logps(
            made.model, made.variables, questions, **options
        )
        for mine, theirs in zip(found, wanted, strict=True):
            for one, other in zip(mine, theirs, strict=True):
                np.testing.assert_allclose(one, other, atol=1e-4)


def test_a_picture_that_has_become_another_is_refused(tmp_path: Path) -> None:
    case = Case("qwen2_5_vl", tmp_path)
    made = text_model.load(case.model)
    path = tmp_path / "a.png"
    case.images[0].save(path)
    row = {"prompt": [{"role": "user", "content": "?"}], "images": [str(path)]}
    asked = answer_logps.question(parse_prompt(row), ANSWERS, made.renderer)
    case.images[0].resize((300, 30)).save(path)
    with pytest.raises(UserError, match="has become another one"):
        answer_logps.answer_logps(made.model, made.variables, [asked])
    assert Picture(path, "row").size() == (300, 30)
