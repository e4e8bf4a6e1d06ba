"""Judges in process see pictures: against transformers with its own processors."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers.models.smolvlm import processing_smolvlm

from jaxalign.data.images import NamedPictures, with_images
from jaxalign.data.picture import Picture
from jaxalign.errors import UserError
from jaxalign.generation import text_model
from jaxalign.generation.engine import Sampling
from jaxalign.generation.steering import Steering
from jaxalign.generation.structure import json_schema
from jaxalign.judging import prompts
from jaxalign.judging.config import JudgeConfig
from jaxalign.judging.graders import YES_OR_NO
from jaxalign.judging.judge import JudgeRequest, Subject, Verdict
from jaxalign.judging.make import make_judge
from tests import vision_models, vision_records
from tests.data.patchers import published
from tests.judging.test_local_judge import ask


RESPONSE = "the answer is not seven. and the river"
ASK = {"type": "text", "text": "which is blue?"}


class Case:
    """A checkpoint, some pictures, and both as transformers has them."""

    def __init__(self, kind: str, place: Path):
        self.kind, self.model = kind, vision_models.write(kind, place / "model")
        self.theirs = vision_records.reference(self.model)
        self.images = [published.drawn(61, 97), published.drawn(48, 48, seed=2)]
        self.pictures = NamedPictures()
        data = [vision_records.png(image) for image in self.images]
        self.names = self.pictures.references([Picture(one, "row") for one in data])

    def judge(self, **options: Any) -> Any:
        config = JudgeConfig(name="local", model=str(self.model), **options)
        return make_judge(config, load_image=self.pictures.load)

    def verdict(self, judge: Any, request: JudgeRequest) -> Any:
        (verdict,) = ask(judge, [request])
        assert verdict.failure is None
        return verdict.value

    def logits(self, text: str, images: Any) -> tuple[list[int], Any]:
        import torch

        inputs = self.theirs._inputs(text, images)
        if self.kind == "qwen2_5_vl":
            tokens = inputs["input_ids"]
            inputs["mm_token_type_ids"] = (
                tokens == self.theirs.config["image_token_id"]
            ).long()
        with torch.no_grad():
            logits = self.theirs.model(**inputs).logits[0]
        ids = inputs["input_ids"][0].tolist()
        return ids, torch.log_softmax(logits.double(), -1).numpy()


@pytest.fixture(scope="module", params=["llava", "qwen2_5_vl", "smolvlm"])
def case(request, tmp_path_factory) -> Case:
    # It is not installed, and spells the number of a video's frames.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processing_smolvlm, "num2words", str)
        return Case(request.param, tmp_path_factory.mktemp(request.param))


def subject(case: Case, count: int, **options: Any) -> Subject:
    parts = [{"type": "image"}] * count + [ASK]
    given: Any = ({"role": "user", "content": parts},)
    span = ((0, len(RESPONSE)),)
    values = {"spans": span, "aspects": ("clarity",), **options}
    return Subject(given, RESPONSE, images=case.names[:count], **values)


def test_likelihood_is_that_of_the_whole_prompt(case: Case) -> None:
    judge = case.judge()
    some = [subject(case, count, aspects=("likelihood",)) for count in (0, 1, 2)]
    requests = [prompts.scores_request(one, needs_rubrics=False) for one in some]
    verdicts = ask(judge, requests)
    found = [v.value["segments"][0]["likelihood"] for v in verdicts]
    for count, got in enumerate(found):
        turns = [{"role": "user", "content": [{"type": "image"}] * count + [ASK]}]
        head = case.theirs._rendered(turns, add_generation_prompt=True)
        images = case.images[:count]
        begin = len(case.logits(head, images)[0])
        ids, logps = case.logits(head + RESPONSE, images)
        each = [logps[at - 1, ids[at]] for at in range(begin, len(ids))]
        np.testing.assert_allclose(got, 4 * np.exp(np.mean(each)), atol=2e-4)
    assert len(set(found)) == 3
    # What else is judged changes nothing.
    assert [v.value for v in ask(judge, requests[::-1])] == [
        v.value for v in verdicts[::-1]
    ]


def test_a_plain_prompt_shows_its_picture_where_it_stands(case: Case) -> None:
    place = vision_records.place_of(case.kind)
    text = f"{place} is the answer:"
    span = ((0, len(RESPONSE)),)
    options: Any = {"spans": span, "images": case.names[:1]}
    one = Subject(text, RESPONSE, aspects=("likelihood",), **options)
    request = prompts.scores_request(one, needs_rubrics=False)
    got = case.verdict(case.judge(), request)["segments"][0]["likelihood"]
    begin = len(case.logits(text, case.images[:1])[0])
    ids, logps = case.logits(text + RESPONSE, case.images[:1])
    each = [logps[at - 1, ids[at]] for at in range(begin, len(ids))]
    np.testing.assert_allclose(got, 4 * np.exp(np.mean(each)), atol=2e-4)
    # A judge that is asked reads the place as a word, and sees the picture below.
    clear = Subject(text, RESPONSE, aspects=("clarity",), **options)
    judge = case.judge(aspects=("clarity",))
    case.verdict(judge, prompts.scores_request(clear))


@pytest.mark.parametrize("count", [1, 2])
def test_a_choice_is_made_with_the_pictures(case: Case, count: int) -> None:
    """Of two answers the more probable one, by transformers' logits."""
    system = {"role": "system", "content": "say"}
    user = with_images({"role": "user", "content": "so?"}, case.names[:count])
    about = subject(case, count, statement="so?")
    request = JudgeRequest("verify", (system, user), YES_OR_NO, about)
    got = case.verdict(case.judge(), request)
    parts = [{"type": "text", "text": "so?"}] + [{"type": "image"}] * count
    turns = [system, {"role": "user", "content": parts}]
    head = case.theirs._rendered(turns, add_generation_prompt=True)
    begin = len(case.logits(head, case.images[:count])[0])
    means = {}
    for answer in ("yes", "no"):
        ids, logps = case.logits(head + answer, case.images[:count])
        each = [logps[at - 1, ids[at]] for at in range(begin, len(ids))]
        means[answer] = np.mean(each)
    assert got == {"answer": max(means, key=lambda name: means[name])}


def test_scores_by_choice_depend_on_the_picture(case: Case) -> None:
    judge = case.judge(aspects=("clarity",))
    seen = [
        case.verdict(judge, prompts.scores_request(dataclasses.replace(one, images=n)))
        for one in [subject(case, 1)]
        for n in (case.names[:1], case.names[1:], ())
    ]
    assert len({json.dumps(value) for value in seen}) == 3


def test_what_is_written_is_the_engines_text_with_the_pictures(case: Case) -> None:
    judge = case.judge(method="json", max_reply_tokens=60)
    requests = [prompts.scores_request(subject(case, count)) for count in (2, 0)]
    verdicts = ask(judge, requests)
    made = text_model.load(case.model)
    for request, count, verdict in zip(requests, (2, 0), verdicts, strict=True):
        system, user = request.messages
        content = user["content"]
        if count:
            parts = [{"type": "text", "text": content[0]["text"]}]
            content = parts + [{"type": "image"}] * count
        asked = made.request(
            [system, {"role": "user", "content": content}],
            Sampling(max_new_tokens=60, temperature=0.0),
            images=case.images[:count],
            steering=Steering(structure=json_schema(request.schema, one_line=True)),
        )
        ((want,),) = made.complete([asked])
        assert verdict.failure is None and verdict.raw == want.text


def changed(case: Case) -> NamedPictures:
    class Changed(NamedPictures):
        def load(self, name: str) -> bytes:
            return vision_records.png(published.drawn(9, 9))

    return Changed()


@pytest.mark.parametrize("method", ["likelihood", "choice", "json"])
def test_a_picture_that_has_changed_stops_the_run(case: Case, method: Any) -> None:
    aspects = ("likelihood",) if method == "likelihood" else ("clarity",)
    options = JudgeConfig(
        name="local", model=str(case.model), method=method, aspects=aspects
    )
    judge = make_judge(options, load_image=changed(case).load)
    request = prompts.scores_request(
        subject(case, 1, aspects=aspects), needs_rubrics=False
    )
    with pytest.raises(UserError, match="an image is not what it was when"):
        ask(judge, [request])


@pytest.mark.parametrize("method", ["likelihood", "choice", "json"])
def test_a_model_of_texts_refuses_pictures(tiny_llama: Path, method: Any) -> None:
    aspects = ("likelihood",) if method == "likelihood" else ("clarity",)
    options = JudgeConfig(
        name="local", model=str(tiny_llama), method=method, aspects=aspects
    )
    judge = make_judge(options)
    turns: Any = ({"role": "user", "content": [{"type": "image"}, ASK]},)
    span = ((0, len(RESPONSE)),)
    about = Subject(turns, RESPONSE, spans=span, aspects=aspects, images=("sha256:0",))
    blind = dataclasses.replace(about, images=(), prompt="which is blue?")
    refused, judged = ask(
        judge,
        [prompts.scores_request(one, needs_rubrics=False) for one in (about, blind)],
    )
    assert isinstance(refused, Verdict)
    assert refused.value is None and "it sees no images" in str(refused.failure)
    assert judged.failure is None
