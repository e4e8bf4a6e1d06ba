"""The judge in process against transformers' own logits."""

import asyncio
import dataclasses
from typing import Any

import numpy as np
import pytest

from jaxalign.data.rendering import Renderer
from jaxalign.errors import UserError
from jaxalign.judging import prompts
from jaxalign.judging.config import JudgeConfig
from jaxalign.judging.graders import YES_OR_NO
from jaxalign.judging.judge import JudgeRequest, Subject, Verdict
from jaxalign.judging.local import LocalJudge
from jaxalign.judging.make import make_judge


TURNS = ({"role": "user", "content": "the river is blue"},)
TEXT = "the answer is not seven. and the river is blue, 好 Über! seven"
SPANS = ((0, 24), (25, 54), (55, 60))


def ask(judge: Any, requests: list[JudgeRequest]) -> list[Verdict]:
    async def gather() -> list[Verdict]:
        found = {number: verdict async for number, verdict in judge.grade(requests)}
        return [found[number] for number in range(len(requests))]

    return asyncio.run(gather())


def scores(prompt: Any = TURNS, text: str = TEXT, spans: Any = SPANS) -> JudgeRequest:
    subject = Subject(prompt, text, spans=spans, aspects=("clarity", "safety"))
    return prompts.scores_request(subject)


@pytest.fixture(scope="module")
def reference(tiny_llama) -> Any:
    """Return a function from token ids to log-probabilities of the next token."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)

    def logps(ids: list[int]) -> np.ndarray:
        with torch.no_grad():
            logits = model.eval()(torch.tensor([ids])).logits[0]
        return torch.log_softmax(logits.double(), -1).numpy()

    return logps


@pytest.fixture(scope="module")
def tokenizer(tiny_llama) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_llama)


@pytest.mark.parametrize("plain", [True, False])
def test_likelihood_is_the_mean_over_a_segments_tokens(
    tiny_llama, reference, tokenizer, plain
) -> None:
    prompt = "the river is blue: " if plain else TURNS
    judge = LocalJudge(str(tiny_llama))
    (verdict,) = ask(judge, [scores(prompt)])
    head = prompt
    if not plain:
        head = tokenizer.apply_chat_template(
            list(TURNS), tokenize=False, add_generation_prompt=True
        )
    encoded = tokenizer(
        head + TEXT, add_special_tokens=plain, return_offsets_mapping=True
    )
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    logps, whole, end = reference(ids), head + TEXT, 0
    owners = []
    for a, b in offsets:
        # This tokenizer leaves the space before a word out of its token's offsets.
        places, end = range(min(a, end), b), b
        own = [c for c in places if not whole[c].isspace()] or list(places)
        owners.append(own[0] - len(head))
    for (start, end), got in zip(SPANS, verdict.value["segments"], strict=True):
        mine = [
            logps[at - 1, ids[at]]
            for at, first in enumerate(owners)
            if start <= first < end
        ]
        assert len(mine) >= 1
        want = 4 * np.exp(np.mean(mine))
        np.testing.assert_allclose(got["likelihood"], want, atol=2e-4)
        assert set(got) == {"likelihood"}


def test_choice_is_the_mean_score(tiny_llama, reference, tokenizer) -> None:
    judge = LocalJudge(str(tiny_llama), method="choice")
    request = scores(spans=((0, 24),))
    (verdict,) = ask(judge, [request])
    asked = judge._choices(request.subject, Renderer(tokenizer), {}).questions
    for question, aspect in zip(asked, ("clarity", "safety"), strict=True):
        text = tokenizer.decode(question.prompt)
        assert f"How good is the segment in {aspect}?" in text
        logps = reference(list(question.prompt))[-1]
        sums = np.array([logps[answer[0]] for answer in question.answers])
        assert [tokenizer.decode(a) for a in question.answers] == list("01234")
        shares = np.exp(sums) / np.exp(sums).sum()
        want = float(shares @ np.arange(5))
        got = verdict.value["segments"][0][aspect]
        np.testing.assert_allclose(got, want, atol=2e-4)


def test_a_verdict_does_not_depend_on_the_others(tiny_llama) -> None:
    judge = LocalJudge(str(tiny_llama))
    some = [
        scores(text=f"{TEXT} {'the river ' * n}", spans=SPANS) for n in (0, 1, 2, 30, 3)
    ]
    together = [verdict.value for verdict in ask(judge, some)]
    alone = [ask(judge, [request])[0].value for request in some]
    assert together == alone
    backwards = [verdict.value for verdict in ask(judge, some[::-1])]
    assert together == backwards[::-1]


def test_questions_with_few_answers(tiny_llama, reference, tokenizer) -> None:
    request = JudgeRequest(
        "verify",
        ({"role": "system", "content": "say"}, {"role": "user", "content": "so?"}),
        YES_OR_NO,
        Subject(TURNS, "a", statement="so?"),
    )
    judge = LocalJudge(str(tiny_llama))
    (verdict,) = ask(judge, [request])
    text = tokenizer.apply_chat_template(
        list(request.messages), tokenize=False, add_generation_prompt=True
    )
    means = {}
    for answer in ("yes", "no"):
        head = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids = tokenizer(text + answer, add_special_tokens=False)["input_ids"]
        logps = reference(ids)
        at = np.arange(len(head), len(ids))
        means[answer] = logps[at - 1, np.array(ids)[at]].mean()
    assert verdict.value == {"answer": max(means, key=lambda name: means[name])}


def test_what_it_cannot_do_is_a_failure_by_name(tiny_llama) -> None:
    judge = LocalJudge(str(tiny_llama))
    good = scores()
    text = dataclasses.replace(good, task="claims")
    image = dataclasses.replace(
        good,
        task="verify",
        schema=YES_OR_NO,
        messages=({"role": "user", "content": [{"type": "x"}]},),
    )
    wrote, saw, judged = ask(judge, [text, image, good])
    assert wrote.value is None and "writes no text" in str(wrote.failure)
    assert saw.value is None and "images" in str(saw.failure)
    assert judged.failure is None and judged.value is not None


def test_the_method_follows_from_the_aspects(tiny_llama) -> None:
    model = str(tiny_llama)
    judge = make_judge(JudgeConfig(name="local", model=model))
    assert judge.settings["method"] == "likelihood"
    asked = JudgeConfig(name="local", model=model, aspects=("clarity",))
    assert make_judge(asked).settings["method"] == "choice"
    assert asked.scored_aspects == ("clarity",)
    with pytest.raises(UserError, match="likelihood scores one aspect"):
        JudgeConfig(
            name="local", model=model, aspects=("clarity",), method="likelihood"
        )
    with pytest.raises(UserError, match=r"judge\.method does nothing"):
        JudgeConfig(name="rules", method="choice")
