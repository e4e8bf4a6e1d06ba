"""Decoding token by token against a cache equals one pass over the whole."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.adapters.adapter import NoAdapter
from jaxalign.adapters.hybrid import H2LPTConfig, HLPTConfig
from jaxalign.adapters.lora import LoRAConfig
from jaxalign.adapters.prefix import PrefixConfig
from jaxalign.errors import UserError
from jaxalign.generation import text_model
from jaxalign.models import attention
from jaxalign.models.attention import cached
from tests.adapters import scenes


CONFIGS = [
    NoAdapter(),
    *(
        LoRAConfig(rank=2, alpha=4.0, gate=kind)
        for kind in ("static", "token", "sequence")
    ),
    LoRAConfig(
        rank=2, alpha=4.0, dora=True, targets=("q_proj", "lm_head", "down_proj")
    ),
    LoRAConfig(rank=2, alpha=4.0, init="pissa"),
    *(
        PrefixConfig(prefix_length=3, gate=kind, mode=mode)
        for kind in ("none", "static", "token", "sequence")
        for mode in ("concat", "separate")
    ),
    HLPTConfig(rank=2, prefix_length=3, gate="sequence"),
    H2LPTConfig(rank=2, prefix_length=3),
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_decoding_equals_the_full_forward_pass(tiny_llama, config) -> None:
    """Two rows of 9 and 6 tokens: first 5 and 3 of them at once, then one by one.

    Before that, other texts lay in the same slots.
    """
    made = scenes.adapted(tiny_llama, config)
    model, variables = made.checkpoint.model, made.variables
    assert model.decode_fn is not None and model.cache_fn is not None
    rng = np.random.default_rng(0)
    tokens = rng.integers(5, 200, (2, 9)).astype(np.int32)
    lengths, first = np.array([9, 6]), np.array([5, 3])
    decode = jax.jit(model.decode_fn)
    cache = model.cache_fn(variables, 2, 64)
    garbage = rng.integers(5, 200, (2, 5)).astype(np.int32)
    places = np.arange(5, dtype=np.int32)[None] + np.zeros((2, 1), np.int32)
    _, cache = decode(variables, cache, garbage, places, np.ones((2, 5), bool))
    hidden, cache = decode(
        variables, cache, tokens[:, :5], places, places < first[:, None]
    )
    found = [[*np.asarray(hidden)[r, : first[r]]] for r in range(2)]
    at = first.copy()
    for _ in range(4):
        valid = (at < lengths)[:, None]
        new = np.take_along_axis(tokens, np.minimum(at, 8)[:, None], 1)
        hidden, cache = decode(
            variables, cache, new, at[:, None].astype(np.int32), valid
        )
        for row in range(2):
            if valid[row, 0]:
                found[row].append(np.asarray(hidden)[row, 0])
        at += valid[:, 0]
    assert [len(row) for row in found] == lengths.tolist()
    for row, length in enumerate(lengths):
        want = scenes.logits(made, scenes.one_sequence(tokens[row : row + 1, :length]))
        got = model.logits_fn(variables, jnp.asarray(np.stack(found[row])))
        np.testing.assert_allclose(got, want[0], atol=1e-4)


def test_layers_that_are_stacks_of_their_own_are_traced_once(
    tiny_llama, monkeypatch
) -> None:
    """Python takes longer than the compiler otherwise."""
    made = scenes.adapted(tiny_llama, LoRAConfig(rank=2, layers="0-1"))
    model, variables = text_model.cut(made.checkpoint, made.variables, donate=False)
    traced, attend = [], cached.attend

    def count(*args: Any, **options: Any) -> Any:
        traced.append(args)
        return attend(*args, **options)

    monkeypatch.setattr(cached, "attend", count)
    assert model.decode_fn is not None and model.cache_fn is not None
    cache = model.cache_fn(variables, 7, 64)
    one = np.zeros((7, 1), np.int32)
    jax.eval_shape(model.decode_fn, variables, cache, one, one, one == 0)
    assert len(cache) == 3
    # With LoRA and without; flax's scan runs what it repeats twice.
    assert len(traced) == 2 * 2


def test_a_gate_that_reads_ahead_cannot_decode(tiny_llama) -> None:
    made = scenes.adapted(tiny_llama, HLPTConfig(rank=2, faithful=True))
    cache_fn = made.checkpoint.model.cache_fn
    assert cache_fn is not None
    with pytest.raises(UserError, match="cannot decode token by token"):
        cache_fn(made.variables, 1, 8)


@pytest.mark.parametrize("length", [1, 5], ids=["step", "piece"])
@pytest.mark.parametrize("name", ["key", "value"])
def test_a_cut_cache_is_written_like_a_whole_one(name, length) -> None:
    """Rows stand at places of their own, across blocks; some tokens are not valid."""
    rng = np.random.default_rng(0)
    axis, shape = cached.PLACES_AXIS[name], [3, 2, 4, 4]
    shape[axis] = 12
    whole = rng.normal(size=shape).astype(np.float32)
    new = rng.normal(size=(3, length, 2, 4)).astype(np.float32)
    positions = np.array([[0], [6], [2]], np.int32) + np.arange(length, dtype=np.int32)
    valid = np.ones((3, length), bool)
    valid[1, -1] = False
    layout = attention.CacheLayout(jnp.asarray(positions), jnp.asarray(valid))
    put = jax.jit(cached.put, static_argnames="axis")
    blocks = put(np.split(whole, 3, axis), new, layout, axis=axis)
    assert len(blocks) == 3
    (want,) = put([whole], new, layout, axis=axis)
    np.testing.assert_array_equal(np.concatenate(blocks, axis), want)
    for row, column in np.argwhere(valid):
        place = positions[row, column]
        found = np.take(np.asarray(want)[row], place, axis)
        np.testing.assert_array_equal(found, new[row, column])
