"""The sampler against exact probabilities, and against transformers' truncations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.generation import sampling
from jaxalign.generation.sampling import Controls


def controls(rows: int, **options: float) -> Controls:
    values = {
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        **options,
    }
    return Controls(
        **{
            name: jnp.full(rows, value, jnp.int32 if name == "top_k" else jnp.float32)
            for name, value in values.items()
        }
    )


def draws(logits: np.ndarray, count: int, **options: float) -> np.ndarray:
    """Draw ``count`` tokens from one row of logits, each as a token of its own."""
    tiled = jnp.broadcast_to(jnp.asarray(logits), (count, len(logits)))
    keys = jnp.broadcast_to(sampling.key_of(3, 1), (count, 2))
    return np.asarray(
        _sample(tiled, controls(count, **options), keys, jnp.arange(count))
    )


_sample = jax.jit(sampling.sample)


def by_transformers(logits: np.ndarray, **options: float) -> np.ndarray:
    """Return the probabilities that transformers samples from."""
    import torch
    from transformers.generation import logits_process as warpers

    scores, ids = torch.tensor(logits)[None].double(), torch.zeros(1, 1).long()
    chain = [
        ("temperature", warpers.TemperatureLogitsWarper),
        ("top_k", warpers.TopKLogitsWarper),
        ("top_p", warpers.TopPLogitsWarper),
        ("min_p", warpers.MinPLogitsWarper),
    ]
    for name, warper in chain:
        if name in options:
            scores = warper(options[name])(ids, scores)
    return torch.softmax(scores, -1)[0].numpy()


CASES = [
    {},
    {"temperature": 0.5},
    {"temperature": 2.0},
    {"top_k": 1},
    {"top_k": 7},
    {"top_p": 0.01},
    {"top_p": 0.6},
    {"top_p": 0.95, "temperature": 1.7},
    {"min_p": 0.1},
    {"top_k": 9, "top_p": 0.7},
    {"top_k": 40, "top_p": 0.9, "min_p": 0.05, "temperature": 0.7},
]


@pytest.mark.parametrize("options", CASES, ids=str)
@pytest.mark.parametrize("vocab", [23, 150])
def test_frequencies_are_the_exact_probabilities(vocab, options) -> None:
    """A chi-squared test at one in a million, and nothing outside the support."""
    rng = np.random.default_rng(vocab)
    logits = (2.5 * rng.standard_normal(vocab)).astype(np.float32)
    want = by_transformers(logits, **options)
    count = 6_000
    found = np.bincount(draws(logits, count, **options), minlength=vocab)
    assert not found[want == 0].any()
    expected = count * want
    often = expected >= 5
    rare = ~often & (want > 0)
    terms = [(found[often] - expected[often]) ** 2 / expected[often]]
    if expected[rare].sum() > 0:
        total = expected[rare].sum()
        terms.append(np.array([(found[rare].sum() - total) ** 2 / total]))
    statistic, freedom = sum(t.sum() for t in terms), sum(map(len, terms)) - 1
    # Wilson and Hilferty: the cube root of chi-squared / freedom is close to normal.
    if freedom:
        spread = 2 / (9 * freedom)
        assert ((statistic / freedom) ** (1 / 3) - (1 - spread)) / spread**0.5 < 4.9
    else:
        assert statistic == 0


def test_ties_count_in_the_order_of_tokens() -> None:
    """Ten equal tokens: p = 0.5 keeps the first five, k = 3 the first three."""
    flat = np.zeros(10, np.float32)
    assert set(draws(flat, 500, top_p=0.5)) == {0, 1, 2, 3, 4}
    assert set(draws(flat, 500, top_k=3)) == {0, 1, 2}
    assert set(draws(flat, 500, top_k=4, top_p=0.5)) == {0, 1}


def test_top_p_reaches_p_exactly() -> None:
    """Of 0.5, 0.3, 0.2: 0.8 needs two tokens, 0.81 all three, 0 the first."""
    logits = np.log(np.array([0.2, 0.5, 0.3], np.float32))
    assert set(draws(logits, 300, top_p=0.8)) == {1, 2}
    assert set(draws(logits, 300, top_p=0.81)) == {0, 1, 2}
    assert set(draws(logits, 300, top_p=0.0)) == {1}


def test_temperature_comes_before_top_p() -> None:
    """At temperature 1/2 probabilities 0.6, 0.3, 0.1 become 0.78, 0.20, 0.02."""
    logits = np.log(np.array([0.6, 0.3, 0.1], np.float32))
    assert set(draws(logits, 300, top_p=0.7)) == {0, 1}
    assert set(draws(logits, 300, top_p=0.7, temperature=0.5)) == {0}


def test_greedy_takes_the_first_of_the_best() -> None:
    logits = np.array([0.0, 3.0, 3.0, -np.inf], np.float32)
    assert set(draws(logits, 5, temperature=0.0, top_k=2)) == {1}


def test_a_row_draws_the_same_whatever_the_others_are() -> None:
    """Rows that are cut and rows that are not take different numbers of rounds."""
    rng = np.random.default_rng(0)
    logits = jnp.asarray(3 * rng.standard_normal((32, 700)), jnp.float32)
    options = controls(32)._replace(
        temperature=jnp.asarray(rng.choice([0.0, 0.7, 1.5], 32), jnp.float32),
        top_p=jnp.asarray(rng.choice([0.3, 0.9, 1.0], 32), jnp.float32),
        top_k=jnp.asarray(rng.choice([0, 2, 30], 32), jnp.int32),
    )
    keys = jnp.stack([sampling.key_of(7, n) for n in range(32)])
    counts = jnp.arange(32)
    together = _sample(logits, options, keys, counts)
    for row in range(32):
        one = jax.tree.map(lambda x, r=row: x[r : r + 1], (options, keys, counts))
        assert _sample(logits[row : row + 1], *one)[0] == together[row]


def test_a_large_vocabulary_has_no_dead_ends() -> None:
    """Tokens of probability 0 are never drawn, first and last ones are."""
    logits = np.full(50_001, -np.inf, np.float32)
    logits[[0, 127, 128, 50_000]] = 0.0
    assert set(draws(logits, 200)) == {0, 127, 128, 50_000}


def test_the_penalty_is_that_of_transformers() -> None:
    import torch
    from transformers import RepetitionPenaltyLogitsProcessor

    logits = np.random.default_rng(1).standard_normal((2, 50)).astype(np.float32)
    seen = np.zeros((2, 50), bool)
    seen[0, [3, 7, 9]] = seen[1, [1, 3, 8]] = True
    got = sampling.penalised(
        jnp.asarray(logits), jnp.array([1.7, 1.7]), jnp.asarray(seen)
    )
    ids = torch.tensor([[3, 7, 9], [1, 3, 8]])
    want = RepetitionPenaltyLogitsProcessor(1.7)(ids, torch.tensor(logits))
    np.testing.assert_allclose(got, want.numpy(), rtol=1e-6)
    same = sampling.penalised(jnp.asarray(logits), jnp.ones(2), jnp.asarray(seen))
    np.testing.assert_array_equal(same, logits)


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("options", [{}, {"top_p": 0.5}, {"min_p": 0.1}, {"top_k": 2}])
@pytest.mark.parametrize("every", [True, False])
def test_logits_that_are_no_numbers_end_too(wrong, options, every) -> None:
    """The engine tells the user; the device must not draw for ever."""
    logits = np.full(130, wrong, np.float32)
    if not every:
        logits[1:] = np.linspace(-1, 1, 129)
    drawn = draws(logits, 64, **options)
    assert ((drawn >= 0) & (drawn < 130)).all()
    if not every and wrong == -np.inf:
        assert (drawn > 0).all()
