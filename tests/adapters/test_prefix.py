"""Prefixes against the formula and against PEFT."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.adapters import prefix
from jaxalign.adapters.prefix import PrefixConfig
from jaxalign.checkpoints import adapter_start
from jaxalign.errors import UserError
from jaxalign.models import attention, rotary
from jaxalign.objectives import policy
from jaxalign.types import ModelInputs
from tests import scenes as model_scenes
from tests.adapters import scenes


# b 1, t 6, n 4 heads on g 2, h 4, P 3
RNG = np.random.default_rng(0)
Q, K, V = (RNG.normal(size=(1, 6, n, 4)) for n in (4, 2, 2))
KEY, VALUE = RNG.normal(size=(2, 3, 4)), RNG.normal(size=(2, 3, 4))
GATE = 1 / (1 + np.exp(-RNG.normal(size=(1, 6, 1))))


def reference(kind: str, *, mix: float | None = None) -> np.ndarray:
    """Attention over prefix and text, written out head by head in float64."""
    gate = {"none": np.ones((6, 1)), "static": np.full((6, 1), 0.4)}.get(kind, GATE[0])
    out = np.zeros((6, 4, 4))
    for head in range(4):
        g = head // 2
        text = 0.5 * Q[0, :, head] @ K[0, :, g].T
        text[np.triu_indices(6, 1)] = -np.inf
        before = 0.5 * Q[0, :, head] @ KEY[g].T
        value = VALUE[g]
        if mix is not None:
            own = np.exp(text) / np.exp(text).sum(1, keepdims=True) @ V[0, :, g]
            far = np.exp(before) / np.exp(before).sum(1, keepdims=True) @ value
            out[:, head] = own + np.tanh(mix) * gate * far
            continue
        if kind == "mean_gate":  # the paper's: keys and values times g
            weights = np.exp(np.concatenate([before * gate, text], 1))
            values = np.concatenate([value, V[0, :, g]])
            share = np.concatenate([np.broadcast_to(gate, (6, 3)), np.ones((6, 6))], 1)
            weights = weights / weights.sum(1, keepdims=True) * share
        else:
            weights = np.exp(np.concatenate([before, text], 1))
            weights[:, :3] *= gate
            weights /= weights.sum(1, keepdims=True)
            values = np.concatenate([value, V[0, :, g]])
        out[:, head] = weights @ values
    return out


def attended(leaves: dict, gate: np.ndarray | None) -> np.ndarray:
    ids = jnp.ones((1, 6), jnp.int32)
    q, k, v = (jnp.asarray(x, jnp.float32) for x in (Q, K, V))
    layout = attention.row_layout(ModelInputs(ids, ids, ids, 0 * ids))
    own = attention.attention(q, k, v, layout, scale=0.5, block=4)
    leaves = {"value": VALUE, **leaves}
    out = prefix.attend(
        q,
        own,
        {name: jnp.asarray(leaf, jnp.float32) for name, leaf in leaves.items()},
        key=jnp.asarray(KEY, jnp.float32),
        gate=None if gate is None else jnp.asarray(gate, jnp.float32),
        scale=0.5,
    )
    return np.asarray(out)[0]


@pytest.mark.parametrize("mix", [None, 0.7])
@pytest.mark.parametrize("kind", ["none", "static", "token_gate", "mean_gate"])
def test_the_formula(kind, mix) -> None:
    gate = {"none": None, "static": np.array(0.4)}.get(kind, GATE)
    leaves = {} if mix is None else {"mix": mix}
    if kind.endswith("_gate"):
        leaves[kind] = np.zeros(1)
    got = attended(leaves, gate)
    np.testing.assert_allclose(got, reference(kind, mix=mix), atol=1e-5)


def test_a_gate_of_zero_takes_the_prefix_away() -> None:
    ids = jnp.ones((1, 6), jnp.int32)
    q, k, v = (jnp.asarray(x, jnp.float32) for x in (Q, K, V))
    layout = attention.row_layout(ModelInputs(ids, ids, ids, 0 * ids))
    base = attention.attention(q, k, v, layout, scale=0.5, block=4)[0][0]
    np.testing.assert_array_equal(attended({}, np.array(0.0)), base)
    np.testing.assert_array_equal(attended({"mix": 0.0}, None), base)

    def loss(log_gate: jax.Array) -> jax.Array:
        own = attention.attention(q, k, v, layout, scale=0.5)
        leaves = {"value": jnp.asarray(VALUE, jnp.float32)}
        key = jnp.asarray(KEY, jnp.float32)
        out = prefix.attend(q, own, leaves, key=key, gate=jnp.exp(log_gate), scale=0.5)
        return out.sum()

    assert jax.grad(loss)(jnp.float32(-jnp.inf)) == 0
    assert jnp.isfinite(jax.grad(loss)(jnp.float32(0.0)))


@pytest.mark.parametrize("implementation", ["xla", "dense"])
def test_gradients_pass_through_the_log_sum_exp(implementation) -> None:
    """Against autodiff of plain attention over concatenated keys."""
    ids = jnp.ones((1, 6), jnp.int32)
    layout = attention.row_layout(ModelInputs(ids, ids, ids, 0 * ids))
    arrays = tuple(jnp.asarray(x, jnp.float32) for x in (Q, K, V, KEY, VALUE))
    probe = jnp.asarray(RNG.normal(size=(1, 6, 4, 4)), jnp.float32)

    def ours(q, k, v, key, value):
        own = attention.attention(
            q, k, v, layout, scale=0.5, block=4, implementation=implementation
        )
        out = prefix.attend(
            q, own, {"value": value}, key=key, gate=jnp.float32(0.4), scale=0.5
        )
        return (out * probe).sum()

    def plain(q, k, v, key, value):
        k = jnp.concatenate([key.transpose(1, 0, 2)[None], k], 1).repeat(2, 2)
        v = jnp.concatenate([value.transpose(1, 0, 2)[None], v], 1).repeat(2, 2)
        scores = 0.5 * jnp.einsum("bqnh,bknh->bnqk", q, k)
        scores = scores.at[..., :3].add(jnp.log(0.4))
        hidden = jnp.triu(jnp.ones((6, 6), bool), 1)
        hidden = jnp.concatenate([jnp.zeros((6, 3), bool), hidden], 1)
        weights = jax.nn.softmax(jnp.where(hidden[None, None], -1e30, scores))
        return (jnp.einsum("bnqk,bknh->bqnh", weights, v) * probe).sum()

    got = jax.grad(ours, range(5))(*arrays)
    want = jax.grad(plain, range(5))(*arrays)
    for g, w in zip(got, want, strict=True):
        np.testing.assert_allclose(g, w, atol=2e-5)


def test_a_text_makes_the_keys_and_values_that_the_model_has_for_it(tiny_llama) -> None:
    """A prefix of the text's own first tokens is the text, but for their places."""
    config = PrefixConfig(prefix_length=9, prefix_text="the answer is seven blue. ")
    checkpoint = scenes.load(tiny_llama, config)
    made = adapter_start.make(jax.random.key(0), config, checkpoint)["prefix"]
    leaves = made["layers_0_3"]["self_attn"]
    from jaxalign.data import chat

    tokens = chat.load_tokenizer(str(tiny_llama))(config.prefix_text)["input_ids"]
    model = model_scenes.torch_model(tiny_llama)
    import torch

    with torch.no_grad():
        out = model(torch.from_numpy(np.resize(tokens, (1, 9))))
    cache = out[model_scenes.cache_name()]
    for layer in range(3):
        # What is in the cache is rotated; a key at place 0 is not.
        want = cache.layers[layer].values[0].numpy()
        np.testing.assert_allclose(leaves["value"][layer], want, atol=1e-4)
        key = cache.layers[layer].keys[0].numpy()
        np.testing.assert_allclose(leaves["key"][layer][:, 0], key[:, 0], atol=1e-4)
        plain = rotary.Rotary(theta=10000.0, dims=16)
        places = jnp.arange(9)[None]
        tables = rotary.make_tables([plain], places, places).of(0)
        own = leaves["key"][layer].transpose(1, 0, 2)[None]
        got = rotary.apply_rotary(own, tables.cos, tables.sin)[0].transpose(1, 0, 2)
        np.testing.assert_allclose(got, key, atol=1e-4)


def test_separate_prefixes_start_as_the_base_model(tiny_llama) -> None:
    config = PrefixConfig(prefix_length=4, mode="separate", gate="token")
    checkpoint = scenes.load(tiny_llama, config)
    made = adapter_start.make(jax.random.key(0), config, checkpoint)
    inputs = scenes.one_sequence(np.arange(12)[None])
    got = scenes.logits(scenes.Adapted(checkpoint, made), inputs)
    base = scenes.logits(scenes.Adapted(checkpoint, {}), inputs)
    # Two programs, whose roundings may differ.
    np.testing.assert_allclose(got, base, atol=2e-5)


@pytest.mark.parametrize("gate", ["none", "static", "token", "sequence"])
@pytest.mark.parametrize("mode", ["concat", "separate"])
def test_packing_changes_nothing(tiny_llama, gate, mode) -> None:
    config = PrefixConfig(prefix_length=3, prefix_layers="1-2", gate=gate, mode=mode)
    made = scenes.adapted(tiny_llama, config)
    data = model_scenes.dataset(tiny_llama, 4)
    found = []
    for row_length in (3 * int(data.lengths.max()), int(data.lengths.max())):
        batch = model_scenes.batch(data, row_length=row_length)
        model = made.checkpoint.model
        logps = model_scenes.token_logps(made.variables, batch, model=model)
        found.append(model_scenes.responses(batch, logps))
    model_scenes.assert_same(found[0], found[1], atol=2e-5)


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_remat_changes_no_gradient(tiny_llama, remat) -> None:
    config = PrefixConfig(prefix_length=3, prefix_layers="1-2", gate="sequence")
    data = model_scenes.dataset(tiny_llama, 3)
    batch = model_scenes.batch(data)

    def gradient(remat: str):
        made = scenes.adapted(tiny_llama, config, remat=remat)

        def loss(own):
            variables = {**made.checkpoint.variables, "prefix": own}
            model = made.checkpoint.model
            return policy.policy_token_logps(variables, batch, model=model).sum()

        return jax.jit(jax.grad(loss))(made.collections["prefix"])

    jax.tree.map(
        lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-3, atol=1e-3),
        gradient(remat),
        gradient("none"),
    )


# PEFT 0.21 hands its prefix on under a name that transformers 5.24 deprecates; the
# warning is laid at the door of torch, whose module made the call.
@pytest.mark.filterwarnings(
    "ignore:.past_key_values. is deprecated:FutureWarning:torch.nn.modules.module"
)
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_peft_has_the_same_logits(tiny_llama, tmp_path) -> None:
    from peft import PeftModel

    from jaxalign.checkpoints import adapter_files

    made = scenes.adapted(tiny_llama, PrefixConfig(prefix_length=5))
    out = adapter_files.save_adapter(
        made.checkpoint, made.collections, tmp_path / "out"
    )
    assert {p.name for p in out.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    data = model_scenes.dataset(tiny_llama, 2)
    batch = model_scenes.batch(data, row_length=int(data.lengths.max()))
    model = made.checkpoint.model
    logps = model_scenes.token_logps(made.variables, batch, model=model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        peft = PeftModel.from_pretrained(model_scenes.torch_model(tiny_llama), out)
    want = model_scenes.torch_logps(peft.eval(), data)
    model_scenes.assert_same(model_scenes.responses(batch, logps), want, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"prefix_length": 0}, "adapter.prefix_length must be at least 1: got 0"),
        ({"prefix_text": ""}, "adapter.prefix_text is empty"),
        ({"prefix_init": "zero", "mode": "separate"}, "zero never learns in mode sep"),
        ({"prefix_init": "zero", "prefix_text": "x"}, "prefix_text has no effect"),
    ],
)
def test_options_that_are_refused(options, match) -> None:
    with pytest.raises(UserError, match=match):
        PrefixConfig(**options)
