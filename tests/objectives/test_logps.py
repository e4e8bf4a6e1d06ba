"""The log-probability primitive: chunking, gradients, sums."""

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.objectives import logps
from jaxalign.types import Completions


ROWS, LENGTH, WANTED, WIDTH, VOCAB = 2, 9, 7, 5, 11


def scene(seed=0):
    rng = np.random.default_rng(seed)
    hidden = jnp.asarray(rng.normal(size=(ROWS, LENGTH, WIDTH)), jnp.float32)
    response = np.array([[0, 0, 1, 1, 2, 3, -1], [0, 1, 1, -1, -1, -1, -1]])
    completions = Completions(
        source=jnp.asarray(rng.integers(0, LENGTH, (ROWS, WANTED))),
        target=jnp.asarray(rng.integers(0, VOCAB, (ROWS, WANTED))),
        response=jnp.asarray(response),
        segment=jnp.asarray(
            np.array([[0, 1, 0, -1, 0, 0, -1], [1, 1, 0, -1, -1, -1, -1]])
        ),
    )
    head = jnp.asarray(rng.normal(size=(WIDTH, VOCAB)), jnp.float32)
    return hidden, completions, {"head": head, "other": jnp.ones(3)}


def logits_fn(variables, hidden):
    return hidden @ variables["head"]


def plain(variables, hidden, completions):
    picked = jnp.take_along_axis(hidden, completions.source[..., None], axis=1)
    full = jax.nn.log_softmax(logits_fn(variables, picked), axis=-1)
    values = jnp.take_along_axis(full, completions.target[..., None], axis=-1)[..., 0]
    return jnp.where(completions.response >= 0, values, 0.0)


@pytest.mark.parametrize("chunk", [1, 2, 4, 6, 14, 1000])
def test_values_and_gradients_do_not_depend_on_the_chunk(chunk) -> None:
    hidden, completions, variables = scene()
    weight = jnp.asarray(np.random.default_rng(1).normal(size=(ROWS, WANTED)))

    def total(function):
        return lambda v, h: (weight * function(v, h, completions)).sum()

    def chunked(v, h, c):
        return logps.token_logps(logits_fn, v, h, c, chunk_size=chunk)

    np.testing.assert_allclose(
        chunked(variables, hidden, completions),
        plain(variables, hidden, completions),
        atol=1e-6,
    )
    # The head trained (its logits are computed again) and frozen (they are not).
    got = jax.grad(total(chunked), argnums=(0, 1))(variables, hidden)
    want = jax.grad(total(plain), argnums=(0, 1))(variables, hidden)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    frozen = jax.grad(total(chunked), argnums=1)(variables, hidden)
    np.testing.assert_allclose(frozen, want[1], atol=1e-5)


def test_a_head_that_is_not_trained_is_computed_once(monkeypatch) -> None:
    hidden, completions, variables = scene()
    calls = []

    def counting(v, h):
        calls.append(h.shape)
        return logits_fn(v, h)

    def total(other, h):
        v = {"head": variables["head"], "other": other}
        return logps.token_logps(counting, v, h, completions).sum() * other.sum()

    # 'other' is differentiated but the head does not read it.
    jax.make_jaxpr(jax.grad(total, argnums=(0, 1)))(variables["other"], hidden)
    traced_frozen = len(calls)
    calls.clear()

    def with_head(head, h):
        return logps.token_logps(counting, {"head": head}, h, completions).sum()

    text = str(
        jax.make_jaxpr(jax.grad(with_head, argnums=(0, 1)))(variables["head"], hidden)
    )
    assert traced_frozen > 0 and calls
    assert "remat" in text or "checkpoint" in text
    text = str(jax.make_jaxpr(jax.grad(total, argnums=1))(variables["other"], hidden))
    assert "remat" not in text and "checkpoint" not in text


def test_no_array_of_all_logits_exists() -> None:
    hidden, completions, variables = scene()

    def largest(jaxpr):
        sizes = [0]
        for eqn in jaxpr.eqns:
            for var in eqn.outvars:
                if getattr(var.aval, "shape", ()) and var.aval.shape[-1] == VOCAB:
                    sizes.append(int(np.prod(var.aval.shape)))
            for inner in jax.extend.core.jaxprs_in_params(eqn.params):
                sizes.append(largest(inner))
        return max(sizes)

    def total(h):
        return logps.token_logps(
            logits_fn, variables, h, completions, chunk_size=4
        ).sum()

    assert largest(jax.make_jaxpr(jax.grad(total))(hidden).jaxpr) == 4 * VOCAB


def test_logits_of_half_precision_are_summed_in_float32() -> None:
    hidden, completions, variables = scene()
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (variables, hidden))
    got = logps.token_logps(logits_fn, *half, completions)
    assert got.dtype == jnp.float32
    widened = logits_fn(*half).astype(jnp.float32)
    np.testing.assert_allclose(
        got,
        plain({"head": jnp.eye(VOCAB)}, widened, completions),
        atol=1e-6,
    )


def test_sums_by_response_and_segment() -> None:
    _, completions, _ = scene()
    values = jnp.asarray([[1.0, 2, 4, 8, 16, 32, 99], [1, 2, 4, 99, 99, 99, 99]])
    sums = logps.response_sums(values, completions, 2)
    np.testing.assert_array_equal(sums, [[[3, 12], [16, 32]], [[1, 6], [0, 0]]])
    sums = logps.segment_sums(values, completions, (2, 2))
    # Row 0, response 1: token 3 is of no segment. Row 1, response 0 owns segment 1.
    np.testing.assert_array_equal(
        sums,
        [
            [[[1, 2], [4, 0]], [[16, 0], [32, 0]]],
            [[[0, 1], [4, 2]], [[0, 0], [0, 0]]],
        ],
    )
    counts = logps.segment_token_counts(completions, (2, 2))
    np.testing.assert_array_equal(counts[1, 0], [[0, 1], [1, 1]])
