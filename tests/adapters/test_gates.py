"""Gates against their definition, and what they may look at."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.adapters import gates
from jaxalign.adapters.hybrid import HLPTConfig
from jaxalign.adapters.lora import LoRAConfig
from jaxalign.adapters.prefix import PrefixConfig
from tests.adapters import scenes


def rows(lengths: list[list[tuple[int, int]]], length: int) -> tuple[np.ndarray, ...]:
    """Make ids of rows from (prompt, branch, ...) lengths of their sequences."""
    sequence = np.zeros((len(lengths), length), np.int32)
    branch = np.zeros_like(sequence)
    for r, row in enumerate(lengths):
        at = 0
        for s, parts in enumerate(row):
            for b, size in enumerate(parts):
                sequence[r, at : at + size], branch[r, at : at + size] = s + 1, b
                at += size
    return sequence, branch


IDS = rows([[(3, 2, 4), (1, 5, 1)], [(6, 3, 0), (2, 1, 2)], [(0, 7, 0)]], 20)


def visible(sequence: np.ndarray, branch: np.ndarray) -> np.ndarray:
    """The definition of ``ModelInputs``: [b, q, k]."""
    index = np.arange(sequence.shape[1])
    same = (sequence[:, :, None] == sequence[:, None]) & (sequence[:, None] > 0)
    mine = (branch[:, None] == 0) | (branch[:, None] == branch[:, :, None])
    return same & mine & (index[None, None] <= index[None, :, None])


def test_a_sequence_gate_is_the_mean_of_what_a_token_sees() -> None:
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(3, 20, 5)), rng.normal(size=5)
    got = gates.value(
        {"sequence_gate": jnp.asarray(w, jnp.float32)},
        jnp.asarray(x, jnp.float32),
        gates.row_means(*map(jnp.asarray, IDS)),
    )
    token = 1 / (1 + np.exp(-x @ w))
    seen = visible(*IDS)
    for r, t in zip(*np.nonzero(IDS[0]), strict=True):
        want = token[r][seen[r, t]].mean()
        np.testing.assert_allclose(got[r, t, 0], want, atol=1e-6)


def test_a_mean_gate_is_the_mean_of_the_whole_sequence_without_padding() -> None:
    sequence, branch = rows([[(3, 4)], [(1, 5), (2, 2)]], 12)
    rng = np.random.default_rng(1)
    x, w = rng.normal(size=(2, 12, 5)), rng.normal(size=5)
    got = gates.value(
        {"mean_gate": jnp.asarray(w, jnp.float32)},
        jnp.asarray(x, jnp.float32),
        gates.row_means(jnp.asarray(sequence), jnp.asarray(branch)),
    )
    token = 1 / (1 + np.exp(-x @ w))
    for r, t in zip(*np.nonzero(sequence), strict=True):
        want = token[r][sequence[r] == sequence[r, t]].mean()
        np.testing.assert_allclose(got[r, t, 0], want, atol=1e-6)


def test_static_and_token_gates() -> None:
    x = jnp.array([[1.0, 2.0], [0.0, 0.0]])
    w = jnp.array([0.5, -0.25])
    got = gates.value({"token_gate": w}, x, None)
    np.testing.assert_allclose(got, [[0.5], [0.5]])
    assert gates.value({"gate": jnp.float32(0.3)}, x, None) == jnp.float32(0.3)
    assert gates.value({"log_gate": jnp.float32(-np.inf)}, x, None) == 0
    assert gates.value({"a": w}, x, None) is None
    with pytest.raises(ValueError, match="sequence_gate needs the rows"):
        gates.value({"sequence_gate": w}, x)


def test_how_gates_start() -> None:
    key = jax.random.key(0)
    assert gates.init("none", (2,), 3, key) == {}
    np.testing.assert_array_equal(gates.init("static", (2,), 3, key)["gate"], [1, 1])
    for kind in ("token", "sequence"):
        leaf = gates.init(kind, (2,), 3, key)[f"{kind}_gate"]
        assert leaf.shape == (2, 3) and not leaf.any()
    drawn = np.asarray(gates.init("mean", (50,), 16, key)["mean_gate"])
    assert 0.2 < np.abs(drawn).max() <= 0.25  # 1 / sqrt(16)


CONFIGS = [
    *(LoRAConfig(rank=2, gate=kind) for kind in ("static", "token", "sequence")),
    *(
        PrefixConfig(prefix_length=3, gate=kind, mode=mode)
        for kind in ("none", "static", "token", "sequence")
        for mode in ("concat", "separate")
    ),
    HLPTConfig(rank=2, prefix_length=3, gate="sequence"),
    HLPTConfig(rank=2, prefix_length=3, faithful=True),
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_a_token_changes_no_earlier_logit(tiny_llama, config) -> None:
    made = scenes.adapted(tiny_llama, config)
    tokens = np.random.default_rng(2).integers(5, 200, (1, 11))
    before = scenes.logits(made, scenes.one_sequence(tokens))
    tokens[0, 6] += 1
    after = scenes.logits(made, scenes.one_sequence(tokens))
    change = np.abs(after - before).max(-1)[0]
    assert change[6:].min() > 1e-4
    if getattr(config, "faithful", False):
        assert change[:6].min() > 1e-5  # why it is not the default
    else:
        np.testing.assert_allclose(change[:6], 0, atol=1e-5)
