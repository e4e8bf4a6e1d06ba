"""Constrained choice against log-probabilities of one plain pass an answer."""

import jax
import numpy as np
import pytest

from jaxalign.adapters.hybrid import H2LPTConfig, HLPTConfig
from jaxalign.data import chat, records
from jaxalign.data.rendering import Renderer
from jaxalign.errors import UserError
from jaxalign.generation import answer_logps
from jaxalign.generation.answer_logps import PromptWithAnswers
from tests.adapters import scenes


@pytest.fixture(scope="module")
def made(tiny_llama) -> scenes.Adapted:
    return scenes.adapted(tiny_llama, H2LPTConfig(rank=2, prefix_length=3))


def questions() -> list[PromptWithAnswers]:
    rng = np.random.default_rng(0)

    def tokens(count: int) -> list[int]:
        return rng.integers(5, 200, count).tolist()

    return [
        PromptWithAnswers(tokens(20), [tokens(1), tokens(1)]),
        PromptWithAnswers(tokens(1), [tokens(1), tokens(4), tokens(2)]),
        PromptWithAnswers(tokens(45), [tokens(n) for n in (3, 1, 1, 6, 2)]),
        PromptWithAnswers(tokens(7), [tokens(5)]),
    ]


@pytest.fixture(scope="module")
def wanted(made) -> list[np.ndarray]:
    """Return every answer's log-probability, each from a pass of its own."""

    def logp(prompt: list[int], answer: list[int]) -> float:
        whole = np.array([*prompt, *answer])
        logits = scenes.logits(made, scenes.one_sequence(whole[None]))[0]
        logps = np.asarray(jax.nn.log_softmax(logits, -1))
        at = np.arange(len(prompt), len(whole))
        return logps[at - 1, whole[at]].sum()

    return [np.array([logp(p, a) for a in answers]) for p, answers, _ in questions()]


@pytest.mark.parametrize("sizes", [(16, 1), (64, 1), (128, 3)])
def test_the_sums_are_those_of_a_pass_for_each_answer(made, wanted, sizes) -> None:
    asked = questions()
    found = answer_logps.choose(
        made.checkpoint.model,
        made.variables,
        asked,
        row_length=sizes[0],
        batch_rows=sizes[1],
    )
    for (_, answers, _), got, want in zip(asked, found, wanted, strict=True):
        np.testing.assert_allclose(got.logps, want, atol=1e-4)
        shares = np.exp(want) / np.exp(want).sum()
        np.testing.assert_allclose(got.probs, shares, atol=1e-5)
        lengths = [len(answer) for answer in answers]
        np.testing.assert_allclose(got.mean_logps, want / lengths, atol=1e-4)


def test_answers_are_what_the_model_would_write(tiny_llama) -> None:
    tokenizer = chat.load_tokenizer(str(tiny_llama))
    turns = [{"role": "user", "content": "Is it?"}]
    prompt = records.parse_prompt({"prompt": turns})
    asked = answer_logps.question(prompt, ["yes", "no", "not at all"], tokenizer)
    assert asked.prompt == Renderer(tokenizer).prompt_tokens(prompt)
    assert [tokenizer.decode(tokens) for tokens in asked.answers] == [
        "yes",
        "no",
        "not at all",
    ]
    with pytest.raises(UserError, match="the answer '' has no token of its own"):
        answer_logps.question(prompt, ["yes", ""], tokenizer)


def test_what_cannot_be_chosen_is_refused(made, tiny_llama) -> None:
    model = made.checkpoint.model
    assert answer_logps.choose(model, made.variables, []) == []
    for bad in (
        PromptWithAnswers([], [[5]]),
        PromptWithAnswers([5], []),
        PromptWithAnswers([5], [[6], []]),
    ):
        with pytest.raises(UserError, match="question 0 needs a prompt and answers"):
            answer_logps.choose(model, made.variables, [bad])
    ahead = scenes.adapted(tiny_llama, HLPTConfig(rank=2, faithful=True))
    with pytest.raises(UserError, match="mean_gate"):
        answer_logps.choose(ahead.checkpoint.model, ahead.variables, questions())
