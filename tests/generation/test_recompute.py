"""Models of one's own, without a cache: sampled from, masked and trained."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxalign
from jaxalign.generation import engine
from jaxalign.generation.engine import Request, Sampling
from jaxalign.models.attention import attention_mask
from jaxalign.types import Model, ModelInputs
from tests import scenes


VOCAB = 40


class Tiny(nn.Module):
    """One block of attention with learnt positions."""

    def setup(self) -> None:
        self.tokens = nn.Embed(VOCAB, 16)
        self.places = nn.Embed(64, 16)
        self.attend = nn.MultiHeadDotProductAttention(num_heads=2)
        self.head = nn.Dense(VOCAB)

    def hidden(self, inputs: ModelInputs) -> Any:
        x = self.tokens(inputs.tokens) + self.places(inputs.positions)
        return x + self.attend(x, mask=attention_mask(inputs))

    def logits(self, hidden: Any) -> Any:
        return self.head(hidden)

    def __call__(self, inputs: ModelInputs) -> Any:
        return self.logits(self.hidden(inputs))


def row(tokens: list[int]) -> ModelInputs:
    ids = jnp.asarray([tokens])
    ones = jnp.ones_like(ids)
    return ModelInputs(ids, jnp.arange(len(tokens))[None], ones, 0 * ones)


@pytest.fixture(scope="module")
def tiny():
    module = Tiny()
    variables = module.init(jax.random.key(0), row([1, 2]))
    model = jaxalign.Model(
        hidden_fn=lambda v, inputs: module.apply(v, inputs, method=Tiny.hidden),
        logits_fn=lambda v, hidden: module.apply(v, hidden, method=Tiny.logits),
    )
    return module, model, variables


def greedy(module: Any, variables: Any, tokens: list[int], count: int) -> list[int]:
    """Continue a text by the module alone, without any of the engine."""
    made = list(tokens)
    for _ in range(count):
        made.append(int(module.apply(variables, row(made))[0, -1].argmax()))
    return made[len(tokens) :]


def test_a_model_without_a_cache_is_sampled_from(tiny, capsys) -> None:
    module, model, variables = tiny
    prompts = [[3, 7, 2], [5], [9, 1, 30, 2, 8], [4, 4]]
    sampling = Sampling(max_new_tokens=6, temperature=0.0)
    requests = [Request(prompt, sampling) for prompt in prompts]
    # Fewer slots than texts: a slot is used again after another text.
    found = engine.generate(model, variables, requests, slots=2)
    for prompt, (done,) in zip(prompts, found, strict=True):
        assert done.tokens == greedy(module, variables, prompt, 6)
        whole = jax.nn.log_softmax(module.apply(variables, row(prompt + done.tokens)))
        want = [
            float(whole[0, len(prompt) + i - 1, token])
            for i, token in enumerate(done.tokens)
        ]
        np.testing.assert_allclose(done.logps, want, atol=1e-4)
    engine.generate(model, variables, requests[:1])
    said = capsys.readouterr()
    assert (said.err + said.out).count("the model has no cache functions") == 1


def test_recomputing_is_what_the_cache_gives(tiny_llama) -> None:
    loaded = jaxalign.load_hf(tiny_llama)
    bare = Model(loaded.model.hidden_fn, loaded.model.logits_fn)
    requests = [
        Request([5, 9, 12], Sampling(max_new_tokens=5, seed=3, num_samples=2)),
        Request([7], Sampling(max_new_tokens=4, temperature=0.0)),
    ]
    want = engine.generate(loaded.model, loaded.variables, requests)
    got = engine.generate(bare, loaded.variables, requests)
    assert [[c.tokens for c in r] for r in got] == [[c.tokens for c in r] for r in want]


@pytest.mark.parametrize("window", [None, 3])
def test_the_mask_of_packed_rows(tiny_llama, window) -> None:
    """By the rule itself, query by query; and no row of it is empty."""
    inputs = scenes.batch(scenes.dataset(tiny_llama, 5), row_length=300).inputs
    got = np.asarray(attention_mask(inputs, window=window))
    ids, branches, positions = (np.asarray(x) for x in inputs[2:4] + inputs[1:2])
    rows, length = ids.shape
    assert got.shape == (rows, 1, length, length) and got.any(-1).all()
    for r in range(rows):
        for q in range(0, length, 3):
            want = np.array(
                [
                    j == q
                    or (
                        j <= q
                        and ids[r, j] == ids[r, q] > 0
                        and branches[r, j] in (0, branches[r, q])
                        and (
                            window is None or positions[r, q] - positions[r, j] < window
                        )
                    )
                    for j in range(length)
                ]
            )
            np.testing.assert_array_equal(got[r, 0, q], want)


def test_a_masked_model_scores_packed_rows_as_single_texts(tiny) -> None:
    module, _, variables = tiny
    prompt, answers = [3, 7, 2], ([5, 9], [8, 1, 6])
    ids = jnp.asarray([[*prompt, *answers[0], *answers[1], 0]])
    inputs = ModelInputs(
        ids,
        jnp.asarray([[0, 1, 2, 3, 4, 3, 4, 5, 0]]),
        jnp.asarray([[1] * 8 + [0]]),
        jnp.asarray([[0, 0, 0, 1, 1, 2, 2, 2, 0]]),
    )
    got = module.apply(variables, inputs)[0]
    first = module.apply(variables, row(prompt + answers[0]))[0]
    second = module.apply(variables, row(prompt + answers[1]))[0]
    np.testing.assert_allclose(got[:5], first, atol=1e-5)
    np.testing.assert_allclose(got[5:8], second[3:], atol=1e-5)
