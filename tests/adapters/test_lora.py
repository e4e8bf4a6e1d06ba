"""LoRA and its relatives against their formulas, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import trees
from jaxalign.adapters import lora, low_rank
from jaxalign.adapters.lora import LoRAConfig
from jaxalign.errors import UserError
from tests.adapters import scenes


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).normal(size=shape)


def tree(**leaves: np.ndarray) -> dict[str, jax.Array]:
    return {name: jnp.asarray(value, jnp.float32) for name, value in leaves.items()}


W, X = numbers(7, 5), numbers(2, 3, 7)
A, B = numbers(7, 2), numbers(2, 5)


def applied(leaves: dict[str, jax.Array]) -> np.ndarray:
    x, kernel = jnp.asarray(X, jnp.float32), jnp.asarray(W, jnp.float32)
    return np.asarray(low_rank.apply(x @ kernel, x, leaves, kernel=kernel))


def test_plain_gated_and_doubled() -> None:
    base = tree(a=A, b=B, scale=np.array(1.5))
    want = X @ (W + 1.5 * A @ B)
    np.testing.assert_allclose(applied(base), want, atol=1e-5)
    want = X @ (W + 0.4 * 1.5 * A @ B)
    np.testing.assert_allclose(
        applied(base | tree(gate=np.array(0.4))), want, atol=1e-5
    )
    gate = 1 / (1 + np.exp(-X @ numbers(7)))
    want = X @ W + gate[..., None] * (1.5 * X @ A @ B)
    got = applied(base | tree(token_gate=numbers(7)))
    np.testing.assert_allclose(got, want, atol=1e-5)
    first = tree(a0=numbers(7, 2, seed=1), b0=numbers(2, 5, seed=1))
    want = X @ (W + 1.5 * (A @ B - numbers(7, 2, seed=1) @ numbers(2, 5, seed=1)))
    np.testing.assert_allclose(applied(base | first), want, atol=1e-5)


def test_dora_brings_columns_to_their_lengths() -> None:
    magnitude = np.abs(numbers(5))
    whole = W + 1.5 * A @ B
    want = X @ (whole / np.linalg.norm(whole, axis=0) * magnitude)
    leaves = tree(a=A, b=B, scale=np.array(1.5), magnitude=magnitude)
    np.testing.assert_allclose(applied(leaves), want, atol=1e-5)


def test_a_column_of_zeros_stays_one() -> None:
    """As those of padded vocabularies."""
    x, kernel = jnp.asarray(X, jnp.float32), jnp.asarray(W, jnp.float32).at[:, 2].set(0)
    leaves = tree(a=A, b=0 * B, scale=np.array(1.5), magnitude=np.abs(numbers(5)))
    out = low_rank.apply(x @ kernel, x, leaves, kernel=kernel)
    assert np.isfinite(out).all() and not np.asarray(out)[..., 2].any()
    merged = low_rank.merge({"q": {"kernel": kernel}}, {"q": leaves})["q"]["kernel"]
    assert np.isfinite(merged).all() and not np.asarray(merged)[:, 2].any()


def test_doras_lengths_are_constants() -> None:
    """Section 4.3 of the paper: the norm gets no gradient."""
    leaves = tree(a=A, b=B, scale=np.array(1.5), magnitude=np.abs(numbers(5)))
    x, kernel = jnp.asarray(X, jnp.float32), jnp.asarray(W, jnp.float32)

    def loss(b: jax.Array) -> jax.Array:
        out = low_rank.apply(x @ kernel, x, {**leaves, "b": b}, kernel=kernel)
        return (out * jnp.asarray(numbers(2, 3, 5), jnp.float32)).sum()

    ratio = np.abs(numbers(5)) / np.linalg.norm(W + 1.5 * A @ B, axis=0)
    want = 1.5 * np.einsum("btr,bto->ro", X @ A, numbers(2, 3, 5) * ratio)
    np.testing.assert_allclose(jax.grad(loss)(leaves["b"]), want, rtol=1e-4, atol=1e-4)


def test_the_written_out_derivative() -> None:
    scale = jnp.asarray(np.abs(numbers(2, 3, 1)), jnp.float32)
    x, a, b = (jnp.asarray(v, jnp.float32) for v in (X, A, B))
    probe = jnp.asarray(numbers(2, 3, 5), jnp.float32)

    def ours(*v):
        return (probe * low_rank.delta(*v)).sum()

    def plain(x, a, b, s):
        return (probe * ((jnp.broadcast_to(s, (2, 3, 1)) * (x @ a)) @ b)).sum()

    for s in (scale, jnp.float32(0.7)):
        got, want = (jax.grad(f, (0, 1, 2, 3))(x, a, b, s) for f in (ours, plain))
        for g, w in zip(got, want, strict=True):
            np.testing.assert_allclose(g, w, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "config",
    [
        LoRAConfig(rank=2),
        LoRAConfig(rank=2, dora=True),
        LoRAConfig(rank=2, gate="token"),
        LoRAConfig(rank=3, init="pissa", rslora=True),
        LoRAConfig(rank=2, targets=("embed_tokens", "lm_head", "q_proj")),
    ],
    ids=["plain", "dora", "gated", "pissa", "all"],
)
def test_an_adapter_starts_as_the_base_model(tiny_llama, config) -> None:
    from jaxalign.checkpoints import adapter_start

    checkpoint = scenes.load(tiny_llama, config)
    made = scenes.Adapted(
        checkpoint, adapter_start.make(jax.random.key(0), config, checkpoint)
    )
    inputs = scenes.one_sequence(np.arange(20)[None])
    got = scenes.logits(made, inputs)
    base = scenes.logits(scenes.Adapted(checkpoint, {}), inputs)
    np.testing.assert_allclose(got, base, atol=2e-5)
    # And every trained leaf that is not behind a zero gets somewhere.
    changed = made._replace(collections=scenes.shaken(made.collections))
    assert np.abs(scenes.logits(changed, inputs) - base).max() > 0.01


def test_pissa_takes_the_largest_singular_values(tiny_llama) -> None:
    config = LoRAConfig(rank=3, alpha=6.0, init="pissa", targets=("down_proj",))
    checkpoint = scenes.load(tiny_llama, config)
    params = checkpoint.variables["params"]
    leaves = lora.init(jax.random.key(0), params, config)["layers_0_3"]["mlp"][
        "down_proj"
    ]
    kernel = np.asarray(params["layers_0_3"]["mlp"]["down_proj"]["kernel"], np.float64)
    for layer in range(3):
        u, s, v = np.linalg.svd(kernel[layer], full_matrices=False)
        best = (u[:, :3] * s[:3]) @ v[:3]
        got = 2.0 * np.asarray(leaves["a"][layer]) @ np.asarray(leaves["b"][layer])
        np.testing.assert_allclose(got, best, atol=1e-5)
    for name in ("a", "b"):
        np.testing.assert_array_equal(leaves[name], leaves[f"{name}0"])
    with pytest.raises(UserError, match="rank 41 is more than a weight of shape"):
        large = LoRAConfig(rank=41, init="pissa", targets=("q_proj",))
        lora.init(jax.random.key(0), params, large)


@pytest.mark.parametrize(
    "config",
    [
        LoRAConfig(rank=2, gate="static"),
        LoRAConfig(rank=3, init="pissa"),
        LoRAConfig(rank=2, dora=True, rslora=True),
        LoRAConfig(rank=2, targets=("embed_tokens", "lm_head", "k_proj"), layers="1"),
    ],
    ids=["static", "pissa", "dora", "all"],
)
def test_merged_weights_give_the_same_logits(tiny_llama, config) -> None:
    made = scenes.adapted(tiny_llama, config)
    inputs = scenes.one_sequence(np.arange(5, 30)[None])
    params, own = made.checkpoint.variables["params"], made.collections["lora"]
    merged = low_rank.merge(params, own)
    checkpoint = made.checkpoint._replace(variables={"params": merged})
    want = scenes.logits(made, inputs)
    got = scenes.logits(scenes.Adapted(checkpoint, {}), inputs)
    np.testing.assert_allclose(got, want, atol=2e-4)
    if config.dora:
        with pytest.raises(UserError, match="DoRA cannot be taken out"):
            low_rank.unmerge(merged, own)
        return
    back = low_rank.unmerge(merged, own)
    jax.tree.map(
        lambda b, p: np.testing.assert_allclose(b, p, rtol=1e-5, atol=1e-5),
        back,
        params,
    )


def test_gates_that_read_the_input_are_not_merged(tiny_llama) -> None:
    made = scenes.adapted(tiny_llama, LoRAConfig(rank=2, gate="token"))
    with pytest.raises(UserError, match="token_gate, which depends on the input"):
        low_rank.merge(made.checkpoint.variables["params"], made.collections["lora"])


def test_patterns_choose_ranks_and_alphas(tiny_llama) -> None:
    config = LoRAConfig(
        rank=2,
        alpha=4.0,
        targets=("mlp/.*", "q_proj"),
        rank_pattern={"layers/2/mlp/up_proj": 5, "q_proj": 3},
        alpha_pattern={"layers/[01]/.*": 1.0},
        rslora=True,
    )
    checkpoint = scenes.load(tiny_llama, config)
    assert checkpoint.groups == ((0, 2), (2, 3))
    made = lora.init(jax.random.key(0), checkpoint.variables["params"], config)
    shapes = {
        p: leaf.shape
        for p, leaf in zip(trees.paths(made), jax.tree.leaves(made), strict=True)
    }
    assert {path for path in shapes if path.endswith("/a")} == {
        f"{group}/{module}/a"
        for group in ("layers_0_2", "layers_2_3")
        for module in (
            "mlp/gate_proj",
            "mlp/up_proj",
            "mlp/down_proj",
            "self_attn/q_proj",
        )
    }
    assert shapes["layers_0_2/mlp/up_proj/a"] == (2, 40, 2)
    assert shapes["layers_2_3/mlp/up_proj/a"] == (1, 40, 5)
    assert shapes["layers_2_3/self_attn/q_proj/b"] == (1, 3, 64)
    scale = made["layers_0_2"]["self_attn"]["q_proj"]["scale"]
    np.testing.assert_allclose(scale, [1 / 3**0.5] * 2, rtol=1e-6)
    scale = made["layers_2_3"]["mlp"]["up_proj"]["scale"]
    np.testing.assert_allclose(scale, [4 / 5**0.5], rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"rank_pattern": {"q_prj": 3}}, "'q_prj' matches no adapted layer.*q_proj"),
        ({"rank_pattern": {"k_.*": 3, ".*/k_proj": 2}}, "both 'k_.*' and .* match"),
        ({"alpha_pattern": {"(": 3.0}}, r"'\(' is not a regular expression"),
        ({"rank_pattern": {"q_proj": 0}}, "adapter.rank must be at least 1: got 0"),
        ({"targets": ("q_proj", ".*/q_proj")}, "names 'q_proj' twice, by 'q_proj' and"),
        ({"targets": ("mlp",)}, "'mlp' is no linear layer"),
        ({"dora": True, "gate": "token"}, "adapter.dora measures the columns"),
        ({"targets": ("embed_tokens",), "dora": True}, "embeddings take plain LoRA"),
        ({"targets": ("embed_tokens",), "dropout": 0.1}, "embeddings take plain LoRA"),
        ({"targets": ("lm_head",), "dropout": 0.1}, "does not reach lm_head"),
        (
            {"targets": ("lm_head",), "gate": "sequence"},
            "a sequence, which lm_head does",
        ),
    ],
)
def test_choices_that_are_refused(tiny_llama, options, match) -> None:
    with pytest.raises(UserError, match=match):
        config = LoRAConfig(**options)
        params = scenes.load(tiny_llama, config).variables["params"]
        lora.init(jax.random.key(0), params, config)
