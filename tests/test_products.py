"""Products of bfloat16: summed in float32, rounded once, forward and backward."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import products, slices, trees
from jaxalign.adapters import adapter, lora, low_rank
from jaxalign.models import decoder, decoding
from jaxalign.models.config import DecoderConfig
from jaxalign.models.rotary import Rotary
from jaxalign.types import ModelInputs


BF16 = jnp.bfloat16

CONFIG = DecoderConfig(
    vocab_size=96,
    width=64,
    mlp_width=128,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    norm_eps=1e-5,
    tie_embeddings=True,
    rotaries=(Rotary(theta=1e4, dims=16),),
)


def normal(seed: int, *shape: int, dtype: Any = BF16) -> jax.Array:
    values = np.random.default_rng(seed).normal(size=shape)
    return jnp.asarray(values, jnp.float32).astype(dtype)


def wide(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == BF16 else x, tree)


def check_one_rounding(got: jax.Array, want: jax.Array) -> None:
    """Hold ``got`` to ``want`` rounded once, or unrounded where it is float32.

    Sums in another order may fall on the other side of a tie: one unit in a few.
    """
    scale = float(jnp.abs(want).max())
    np.testing.assert_allclose(wide(got), want, rtol=2**-8, atol=1e-6 * scale)


def one_product(spec: str) -> Any:
    return lambda x, y: products.einsum(spec, x, y)


SIZES = jnp.asarray([3, 0, 9], jnp.int32)

FUNCTIONS = {
    "matmul": (products.matmul, (2, 6, 300), (300, 8)),
    "head": (one_product("...d,vd->...v"), (2, 6, 300), (40, 300)),
    "scores": (one_product("btgmh,gph->btgmp"), (2, 6, 2, 3, 64), (2, 5, 64)),
    "ragged": (lambda x, w: products.ragged_dot(x, w, SIZES), (12, 300), (3, 300, 8)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("kind", [BF16, jnp.float32], ids=["bf16", "f32"])
def test_products_round_once_forward_and_backward(name: str, kind: Any) -> None:
    """Weights of either kind; the derivative of a float32 weight is not rounded."""
    fn, left, right = FUNCTIONS[name]
    x, y = normal(0, *left), normal(1, *right, dtype=kind)
    rounded = wide(y.astype(BF16))
    want, pull = jax.vjp(fn, wide(x), rounded)
    probe = normal(2, *want.shape)
    got, own_pull = jax.vjp(fn, x, y)
    assert got.dtype == jnp.float32
    scale = np.abs(np.asarray(want)).max()
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6 * scale)
    d_x, d_y = own_pull(wide(probe))
    want_x, want_y = pull(wide(probe))
    assert (d_x.dtype, d_y.dtype) == (BF16, kind)
    check_one_rounding(d_x, want_x)
    check_one_rounding(d_y, want_y)
    if kind == jnp.float32:
        scale = np.abs(np.asarray(want_y)).max()
        np.testing.assert_allclose(d_y, want_y, rtol=1e-5, atol=1e-6 * scale)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_float32_products_are_jax_own(name: str) -> None:
    """The same program as without us, so the same bits."""
    fn, left, right = FUNCTIONS[name]
    x, y = (normal(0, *shape, dtype=jnp.float32) for shape in (left, right))
    plain = {
        "matmul": jnp.matmul,
        "head": lambda x, y: jnp.einsum("...d,vd->...v", x, y),
        "scores": lambda x, y: jnp.einsum("btgmh,gph->btgmp", x, y),
        "ragged": lambda x, w: jax.lax.ragged_dot(x, w, SIZES),
    }[name]

    def program(fn: Any) -> str:
        total = lambda x, y: jnp.square(fn(x, y)).sum()  # noqa: E731
        text = str(jax.jit(jax.grad(total, (0, 1))).lower(x, y).as_text())
        return re.sub(r"module @\S+", "", text)

    assert program(fn) == program(plain)


def test_lora_rounds_once() -> None:
    x, a, b = normal(0, 2, 6, 300), normal(1, 300, 4), normal(2, 4, 8)
    a, b, scale = wide(a), wide(b), jnp.asarray(0.3)
    got, pull = jax.vjp(low_rank.delta, x, a, b, scale)
    assert got.dtype == jnp.float32
    probe = normal(3, *got.shape, dtype=jnp.float32)
    grads = pull(probe)
    assert [g.dtype for g in grads] == [BF16, *[jnp.float32] * 3]
    want, wide_pull = jax.vjp(low_rank.delta, wide(x), a, b, scale)
    # x A is rounded, as the factor of the second product.
    for mine, theirs in zip((got, *grads), (want, *wide_pull(probe)), strict=True):
        error = np.abs(np.asarray(wide(mine)) - np.asarray(theirs)).max()
        assert error < 0.01 * np.abs(np.asarray(theirs)).max()


def make(dtype: Any, **options: Any) -> tuple[Any, Any, ModelInputs]:
    """Return a loss and its gradient's function, variables and inputs of rows."""
    config = dataclasses.replace(CONFIG, **options)
    model = decoder.make_model(config, dtype=dtype, remat="dots")
    shapes = decoder.param_shapes(config)
    params = {
        path: 0.1 * normal(n, *leaf.shape, dtype=jnp.float32)
        for n, (path, leaf) in enumerate(
            zip(trees.paths(shapes), jax.tree.leaves(shapes), strict=True)
        )
    }
    params = trees.map_with_paths(lambda path, _: params[path].astype(dtype), shapes)
    adapters = lora.init(jax.random.key(0), params, lora.LoRAConfig(rank=4))
    adapters = jax.tree.map(lambda x: x + 0.01 if x.ndim > 1 else x, adapters)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 96, (2, 112)), jnp.int32)
    places = jnp.broadcast_to(jnp.arange(112), (2, 112))
    ids = jnp.where(places < 105, 1, 0)
    inputs = ModelInputs(tokens, places, ids, jnp.zeros_like(ids))
    variables = {"params": params, "lora": adapters}
    trainable, frozen = trees.partition(variables, adapter.trained(variables))

    def loss(trainable: Any, frozen: Any) -> jax.Array:
        variables = trees.combine(trainable, frozen)
        hidden = model.hidden_fn(variables, inputs)
        logits = model.logits_fn(variables, hidden[:, :100])
        assert logits.dtype == jnp.float32
        return jax.nn.logsumexp(logits, -1).mean()

    return jax.value_and_grad(loss), (trainable, frozen), inputs


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_in_bfloat16_has_float32_gradients_of_adapters(tied: bool) -> None:
    fn, split, _ = make(BF16, tie_embeddings=tied)
    plain, _, _ = make(jnp.float32, tie_embeddings=tied)
    loss, grads = jax.jit(fn)(*split)
    want, want_grads = jax.jit(plain)(*wide(split))
    np.testing.assert_allclose(loss, want, rtol=2e-3)
    for got, wanted in zip(
        jax.tree.leaves(grads), jax.tree.leaves(want_grads), strict=True
    ):
        assert got.dtype == jnp.float32
        error = np.linalg.norm(got - wanted) / np.linalg.norm(wanted)
        assert error < 0.05


def products_of(text: str) -> list[tuple[str, str, str]]:
    """Return the dtypes of the two factors and the result of every product."""
    return re.findall(
        r"stablehlo\.(?:dot_general|dot) .*: \(tensor<(?:\d+x)*(\w+)>, "
        r"tensor<(?:\d+x)*(\w+)>\) -> tensor<(?:\d+x)*(\w+)>",
        text,
    )


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
@pytest.mark.parametrize("step", ["train", "decode"])
def test_no_product_of_a_bfloat16_model_is_rounded(platform: str, step: str) -> None:
    """Nor is one of float32 factors, to which a weight would have to be turned."""
    fn, (trainable, frozen), _ = make(BF16)
    if step == "decode":
        groups = tuple((i, i + 1) for i in range(CONFIG.num_layers))
        model = decoder.make_model(CONFIG, groups=groups, dtype=BF16)
        assert model.cache_fn is not None
        params = decoding.by_layer({"params": frozen["params"]})
        cache = model.cache_fn(params, 4, 32)
        one = jnp.ones((4, 1), jnp.int32)

        def run(variables: Any, cache: Any) -> Any:
            assert model.decode_fn is not None
            hidden, cache = model.decode_fn(variables, cache, one, one, one == 1)
            return model.logits_fn(variables, hidden), cache

        traced = jax.jit(run).trace(params, cache)
    else:
        traced = jax.jit(fn).trace(trainable, frozen)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    found = products_of(text)
    assert len(found) > 18
    assert set(found) == {("bf16", "bf16", "f32")}
    # No weight of the base is turned to float32; those of adapters are narrower.
    shapes = {"x".join(map(str, leaf.shape[-2:])) for leaf in jax.tree.leaves(frozen)}
    shapes = {shape for shape in shapes if "x" in shape and "4" not in shape.split("x")}
    for shape in re.findall(r"convert .*<(?:\d+x)?(\d+x\d+)xbf16>\) -> .*xf32>", text):
        assert shape not in shapes, shape


def test_on_cpus_no_stack_is_turned_to_read_or_write_a_slice() -> None:
    """Neither of weights nor of what the derivative needs."""
    fn, split, _ = make(BF16)
    text = jax.jit(fn).lower(*split).compile().as_text() or ""
    slices_of = re.findall(r"= (\w+)\[3,[\d,]+\]\S* dynamic-(?:update-)?slice\(", text)
    assert "u16" in slices_of
    stacks = re.findall(
        r"= f32\[3,(?:1,)?(?:64|128|2),(?:64|128)[\d,]*\]\S* convert", text
    )
    assert not stacks


def test_slices_as_bits_change_nothing() -> None:
    slices.register()  # a second time does nothing
    x, update = normal(0, 5, 4), normal(1, 2, 4)
    special = jnp.asarray([jnp.nan, jnp.inf, -0.0, 1e-40], BF16)
    x = x.at[3].set(special)

    @jax.jit
    def both(x: Any, at: Any) -> Any:
        part = jax.lax.dynamic_slice_in_dim(x, at, 2)
        return part, jax.lax.dynamic_update_slice_in_dim(x, update, at, 0)

    part, whole = both(x, 2)
    np.testing.assert_array_equal(slices.as_bits(part), slices.as_bits(x[2:4]))
    want = np.array(slices.as_bits(x))
    want[2:4] = np.asarray(slices.as_bits(update))
    np.testing.assert_array_equal(slices.as_bits(whole), want)
    grad = jax.grad(lambda x: jax.lax.dynamic_slice_in_dim(x, 1, 2).sum())(x)
    np.testing.assert_array_equal(np.asarray(grad, np.float32).sum(1), [0, 4, 4, 0, 0])
