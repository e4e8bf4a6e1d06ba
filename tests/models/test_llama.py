"""The decoder against transformers, and against itself computed in other ways."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.checkpoints import load as load_lib
from jaxalign.models import attention
from jaxalign.objectives import policy
from jaxalign.types import ModelInputs
from tests import scenes


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"tie_word_embeddings": True},
        {"attention_bias": True, "mlp_bias": True},
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 1, "num_hidden_layers": 1},
        {
            "rope_parameters": {
                "rope_type": "linear",
                "rope_theta": 500.0,
                "factor": 2.0,
            }
        },
        {"rope_parameters": LLAMA3},
    ],
    ids=["plain", "tied", "biases", "no-gqa", "one-kv-head", "linear", "llama3"],
)
@pytest.mark.parametrize("chat", [True, False], ids=["chat", "plain-text"])
def test_log_probs_are_those_of_transformers(make_llama, overrides, chat) -> None:
    directory = make_llama(**overrides)
    data = scenes.dataset(directory, 6, chat=chat)
    want = scenes.torch_logps(scenes.torch_model(directory), data)
    loaded = load_lib.load(directory)
    # Several pairs a row, and one pair a row.
    for row_length in (3 * int(data.lengths.max()), int(data.lengths.max())):
        batch = scenes.batch(data, row_length=row_length)
        got = scenes.token_logps(loaded.variables, batch, model=loaded.model)
        scenes.assert_same(scenes.responses(batch, got), want, atol=1e-4)


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
@pytest.mark.parametrize("groups", [None, ((0, 1), (1, 3))], ids=["one", "two"])
def test_remat_and_groups_change_nothing(tiny_llama, remat, groups) -> None:
    data = scenes.dataset(tiny_llama, 4)
    batch = scenes.batch(data, row_length=2 * int(data.lengths.max()))
    plain = load_lib.load(tiny_llama)
    other = load_lib.load(tiny_llama, groups=groups, remat=remat)

    def total(loaded):
        adapters = scenes.random_lora(loaded.variables["params"])

        def sum_of_logps(adapters):
            variables = {**loaded.variables, "lora": adapters}
            return policy.policy_token_logps(variables, batch, model=loaded.model).sum()

        value, grads = jax.jit(jax.value_and_grad(sum_of_logps))(adapters)
        norm = jnp.sqrt(sum(jnp.square(g).sum() for g in jax.tree.leaves(grads)))
        return value, norm

    if groups is None:
        np.testing.assert_allclose(total(other), total(plain), rtol=1e-5)
    else:
        # Other groups, other random adapters: compare the base model alone.
        got, want = (
            scenes.token_logps(x.variables, batch, model=x.model)
            for x in (other, plain)
        )
        np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("block", [1, 3, 8, 64, 256])
def test_blocked_attention_equals_the_plain_formula(block) -> None:
    rng = np.random.default_rng(0)
    rows, length, heads, groups, width = 2, 23, 4, 2, 8
    sequence = np.array(
        [[1] * 9 + [2] * 8 + [3] * 6, [1] * 3 + [2] * 12 + [0] * 8], np.int32
    )
    branch = np.zeros((rows, length), np.int32)
    branch[0, 3:6], branch[0, 6:9], branch[0, 12:14], branch[0, 14:17] = 1, 2, 1, 2
    branch[1, 8:10], branch[1, 10:15] = 1, 2
    zeros = jnp.zeros((rows, length), jnp.int32)
    layout = attention.row_layout(
        ModelInputs(zeros, zeros, jnp.asarray(sequence), jnp.asarray(branch))
    )
    q, k, v = (
        jnp.asarray(rng.normal(size=(rows, length, n, width)), jnp.float32)
        for n in (heads, groups, groups)
    )
    weight = jnp.asarray(rng.normal(size=q.shape), jnp.float32)

    def run(implementation):
        def value(q, k, v):
            out, _ = attention.attention(
                q, k, v, layout, scale=0.3, implementation=implementation, block=block
            )
            return (out * weight).sum(), out

        (_, out), grads = jax.value_and_grad(value, (0, 1, 2), has_aux=True)(q, k, v)
        return out, *grads

    for got, want in zip(run("xla"), run("dense"), strict=True):
        np.testing.assert_allclose(got, want, atol=2e-5)
    # Padding sees nothing and gets nothing.
    assert not np.asarray(run("xla")[0])[1, 15:].any()


def test_the_mask_is_that_of_the_design() -> None:
    """Attention weights by brute force: v is one-hot in the key's index."""
    sequence = np.array([[1, 1, 1, 1, 2, 2, 2, 0]])
    branch = np.array([[0, 0, 1, 2, 0, 1, 2, 0]])
    zeros = jnp.zeros((1, 8), jnp.int32)
    layout = attention.row_layout(
        ModelInputs(zeros, zeros, jnp.asarray(sequence), jnp.asarray(branch))
    )
    q = k = jnp.zeros((1, 8, 1, 8))
    v = jnp.eye(8)[None, :, None, :]
    for implementation in ("xla", "dense"):
        out, _ = attention.attention(
            q, k, v, layout, scale=1.0, implementation=implementation, block=4
        )
        for i in range(8):
            for j in range(8):
                sees = (
                    j <= i
                    and sequence[0, i] == sequence[0, j] != 0
                    and branch[0, j] in (0, branch[0, i])
                )
                assert bool(out[0, i, 0, j] > 0) == sees, (i, j)


def test_padding_of_a_row_changes_nothing(tiny_llama) -> None:
    data = scenes.dataset(tiny_llama, 1)
    loaded = load_lib.load(tiny_llama)
    length = int(data.lengths.max())
    values = []
    for row_length in (length, length + 7):
        batch = scenes.batch(data, row_length=row_length)
        got = scenes.token_logps(loaded.variables, batch, model=loaded.model)
        values.append(scenes.responses(batch, got))
    scenes.assert_same(*values, atol=1e-6)


def test_changing_one_pair_changes_no_other(tiny_llama) -> None:
    """Packed and shared-prompt isolation, to the last bit of float32."""
    data = scenes.dataset(tiny_llama, 5)
    loaded = load_lib.load(tiny_llama)
    row_length = int(data.lengths.sum())
    score = jax.jit(
        lambda batch: policy.policy_token_logps(
            loaded.variables, batch, model=loaded.model
        )
    )
    batch = scenes.batch(data, row_length=row_length, rows=1)
    before = score(batch)
    tokens = np.array(batch.inputs.tokens)
    mine = np.asarray(batch.inputs.sequence_ids) == 2
    tokens[mine] = (tokens[mine] + 11) % 100
    changed = batch._replace(inputs=batch.inputs._replace(tokens=jnp.asarray(tokens)))
    moved = np.asarray(before != score(changed))
    # Of the pair's own tokens the log-probs change; of all others none does.
    assert moved[np.asarray(batch.completions.response) // 2 == 1].mean() > 0.9
    assert not moved[np.asarray(batch.completions.response) // 2 != 1].any()
    # Changing the rejected response leaves the chosen one alone, and the other way.
    for side in (1, 2):
        tokens = np.array(batch.inputs.tokens)
        mine = (np.asarray(batch.inputs.sequence_ids) == 3) & (
            np.asarray(batch.inputs.branch_ids) == side
        )
        tokens[mine] = (tokens[mine] + 11) % 100
        inputs = batch.inputs._replace(tokens=jnp.asarray(tokens))
        moved = np.asarray(before != score(batch._replace(inputs=inputs)))
        response = np.asarray(batch.completions.response)
        assert moved[response == 2 * 2 + side - 1].any()
        assert not moved[response != 2 * 2 + side - 1].any()
