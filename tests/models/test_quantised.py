"""Weights as codes: against numpy in float64, and models that hold them unpacked."""

import functools
import itertools
import statistics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import trees
from jaxalign.adapters import adapter, low_rank
from jaxalign.adapters.hybrid import HLPTConfig
from jaxalign.adapters.lora import LoRAConfig
from jaxalign.adapters.prefix import PrefixConfig
from jaxalign.checkpoints import adapter_start, export
from jaxalign.checkpoints import load as load_lib
from jaxalign.errors import UserError
from jaxalign.models import decoder, quantised
from jaxalign.models.config import DecoderConfig
from jaxalign.models.quantised import Quantised
from jaxalign.models.rotary import Rotary
from jaxalign.objectives import objective, policy
from jaxalign.objectives.dpo2d import DPO2DConfig
from jaxalign.parallel.mesh import MeshConfig, make_mesh
from jaxalign.types import ModelInputs
from tests import scenes, synthetic
from tests.adapters import scenes as adapter_scenes


KINDS = ("int8", "nf4")

# Several blocks, the last one not full, and weights that two axes of a mesh divide.
WIDE = {"hidden_size": 144, "intermediate_size": 200, "head_dim": 32}


@pytest.fixture(scope="module")
def wide_llama(make_llama):
    return make_llama(**WIDE)


# --- codes ------------------------------------------------------------------------


def weights(*shape: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    spread = rng.uniform(0.01, 3, (*shape[:-2], 1, shape[-1]))
    return (rng.normal(size=shape) * spread).astype(np.float32)


def int8_by_hand(weight: np.ndarray) -> np.ndarray:
    """Code and decode [fan_in, fan_out] in float64."""
    wide = weight.astype(np.float64)
    scale = np.abs(wide).max(0) / 127
    return np.rint(wide / np.where(scale == 0, 1, scale)) * scale


def nf4_by_hand(weight: np.ndarray) -> np.ndarray:
    """Code and decode [fan_in, fan_out] in float64, one block after the other."""
    found = np.zeros(weight.shape)
    for column, start in itertools.product(
        range(weight.shape[1]), range(0, weight.shape[0], 64)
    ):
        block = weight[start : start + 64, column].astype(np.float64)
        scale = np.abs(block).max() or 1.0
        gaps = np.abs(block[:, None] / scale - np.array(quantised.LEVELS))
        found[start : start + 64, column] = (
            np.array(quantised.LEVELS)[gaps.argmin(1)] * scale
        )
    return found


BY_HAND = {"int8": int8_by_hand, "nf4": nf4_by_hand}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fan_in", [1, 40, 64, 65, 200])
def test_codes_are_those_of_a_slow_float64_implementation(kind, fan_in) -> None:
    stack = weights(3, fan_in, 5)
    stack[1, :, 2] = 0
    codes = quantised.quantise(jnp.asarray(stack), kind)
    assert codes.shape == stack.shape and codes.ndim == 3
    got = np.asarray(codes.astype(jnp.float32))
    want = np.stack([BY_HAND[kind](layer) for layer in stack])
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-7)
    assert not got[1, :, 2].any()
    # A layer's codes are those of the layer alone.
    alone = quantised.quantise(jnp.asarray(stack[1]), kind)
    for one, of_all in zip(jax.tree.leaves(alone), jax.tree.leaves(codes), strict=True):
        np.testing.assert_array_equal(one, of_all[1])


@pytest.mark.parametrize("kind", KINDS)
def test_errors_are_bounded(kind) -> None:
    weight = weights(256, 40, seed=1)
    codes = quantised.quantise(jnp.asarray(weight), kind)
    error = np.abs(np.asarray(codes.astype(jnp.float32)) - weight)
    if kind == "int8":
        bound = np.broadcast_to(np.abs(weight).max(0) / 127 / 2, weight.shape)
    else:
        largest = np.abs(weight).reshape(4, 64, 40).max(1, keepdims=True)
        gap = np.diff(quantised.LEVELS).max() / 2
        bound = np.broadcast_to(gap * largest, (4, 64, 40)).reshape(weight.shape)
        assert gap == pytest.approx(0.152, abs=5e-4)
    assert (error <= 1.0001 * bound).all() and error.max() > 0.8 * bound.min()


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_time_changes_nothing(kind) -> None:
    once = quantised.quantise(jnp.asarray(weights(100, 7)), kind)
    twice = quantised.quantise(once.astype(jnp.float32), kind)
    np.testing.assert_array_equal(once.codes, twice.codes)
    np.testing.assert_allclose(once.scales, twice.scales, rtol=1e-6)


def test_the_levels_are_quantiles_of_a_normal_distribution() -> None:
    """Appendix E: evenly spaced probabilities on either side, over the largest."""
    last = 1 - (1 / 30 + 1 / 32) / 2
    inverse = statistics.NormalDist().inv_cdf
    above = [inverse(p) for p in np.linspace(0.5, last, 9)]
    below = [-inverse(p) for p in np.linspace(last, 0.5, 8)]
    want = np.array([*below, *above[1:]]) / above[-1]
    # The published table was rounded on the way.
    np.testing.assert_allclose(quantised.LEVELS, want, atol=5e-6)
    assert quantised.LEVELS[7] == 0 and len(quantised.LEVELS) == 16


def test_two_codes_take_a_byte() -> None:
    codes = quantised.quantise(jnp.ones((2, 130, 8)), "nf4")
    assert codes.codes.dtype == jnp.uint8 and codes.codes.shape == (2, 3 * 32, 8)
    assert codes.scales.shape == (2, 3, 8)
    codes = quantised.quantise(jnp.ones((2, 130, 8)), "int8")
    assert codes.codes.dtype == jnp.int8 and codes.codes.shape == (2, 130, 8)
    assert codes.scales.shape == (2, 1, 8)


# --- models -----------------------------------------------------------------------


def unpacked(variables: Any) -> Any:
    """Replace codes by the weights that they stand for."""
    return jax.tree.map(
        lambda leaf: leaf.astype(jnp.float32) if isinstance(leaf, Quantised) else leaf,
        variables,
        is_leaf=lambda leaf: isinstance(leaf, Quantised),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_loading_holds_the_layers_linear_weights_as_codes(wide_llama, kind) -> None:
    plain = load_lib.load(wide_llama).variables["params"]
    params = load_lib.load(wide_llama, quantize=kind).variables["params"]
    made = quantised.quantise_params(plain, kind)
    assert jax.tree.structure(params) == jax.tree.structure(made)
    for got, want in zip(jax.tree.leaves(params), jax.tree.leaves(made), strict=True):
        np.testing.assert_array_equal(got, want)
    layer = params["layers_0_3"]
    for block, names in (
        ("self_attn", ("q_proj", "k_proj", "v_proj", "o_proj")),
        ("mlp", ("gate_proj", "up_proj", "down_proj")),
    ):
        for name in names:
            assert isinstance(layer[block][name]["kernel"], Quantised)
    for kept in (params["embed_tokens"]["embedding"], params["lm_head"]["kernel"]):
        assert isinstance(kept, jax.Array) and kept.dtype == jnp.float32


ADAPTERS = {
    "none": None,
    "lora": LoRAConfig(rank=3, alpha=7.0),
    "gated": LoRAConfig(rank=3, gate="sequence", layers="0-1"),
    "dora": LoRAConfig(rank=2, dora=True),
    "pissa": LoRAConfig(rank=2, init="pissa"),
    "experts": LoRAConfig(rank=2, init="pissa", targets=("up_proj", "down_proj")),
    "prefix": PrefixConfig(prefix_length=4, prefix_layers="top:2"),
    "hlpt": HLPTConfig(rank=2, prefix_length=3),
}


def scene(directory, kind, name, **options) -> tuple[Any, Any, Any]:
    """Return a batch of packed pairs, the model and variables with an adapter."""
    data = scenes.dataset(directory, 5)
    batch = scenes.batch(data, row_length=2 * int(data.lengths.max()))
    if ADAPTERS[name] is None:
        loaded = load_lib.load(directory, quantize=kind, **options)
        return batch, loaded.model, loaded.variables
    made = adapter_scenes.adapted(
        directory, ADAPTERS[name], size=0.1, quantize=kind, **options
    )
    return batch, made.checkpoint.model, made.variables


@pytest.mark.parametrize(
    ("kind", "name"),
    [("int8", "lora"), *(("nf4", name) for name in ADAPTERS if name != "experts")],
)
def test_log_probs_are_those_of_the_unpacked_weights(wide_llama, kind, name) -> None:
    batch, model, variables = scene(wide_llama, kind, name)
    score = functools.partial(scenes.token_logps, model=model)
    got = score(variables, batch)
    np.testing.assert_allclose(got, score(unpacked(variables), batch), atol=1e-5)
    other = load_lib.load(wide_llama)
    plain = scenes.token_logps(other.variables, batch, model=other.model)
    assert np.abs(np.asarray(got - plain)).max() > 1e-2


@pytest.mark.parametrize(
    ("kind", "name", "remat"),
    [
        ("int8", "lora", "none"),
        ("nf4", "hlpt", "dots"),
        ("nf4", "dora", "full"),
    ],
)
def test_gradients_are_those_of_the_unpacked_weights(
    wide_llama, kind, name, remat
) -> None:
    batch, model, variables = scene(wide_llama, kind, name, remat=remat)
    loss_fn = functools.partial(
        objective.loss_fn,
        model=model,
        config=DPO2DConfig(),
        aspects=("correctness", "helpfulness"),
    )
    found = []
    for own in (variables, unpacked(variables)):
        split = trees.partition(own, adapter.trained(own))
        value = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))
        (loss, _), grads = value(*split, batch, None)
        found.append([loss, *jax.tree.leaves(grads)])
    assert len(found[0]) > 2
    for got, want in zip(*found, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)


def test_experts_are_codes_and_routers_are_not(tmp_path) -> None:
    directory = synthetic.make_checkpoint(
        tmp_path,
        "qwen3_moe",
        hidden_size=72,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        norm_topk_prob=True,
    )
    batch, model, variables = scene(directory, "nf4", "experts")
    mlp = variables["params"]["layers_0_3"]["mlp"]
    assert not isinstance(mlp["router"]["kernel"], Quantised)
    assert mlp["experts"]["up_proj"]["kernel"].shape == (3, 4, 72, 24)

    def total(adapters: Any, variables: Any) -> Any:
        adapted = {**variables, "lora": adapters}
        return policy.policy_token_logps(adapted, batch, model=model).sum()

    run = jax.jit(jax.value_and_grad(total))
    for got, want in zip(
        jax.tree.leaves(run(variables["lora"], variables)),
        jax.tree.leaves(run(variables["lora"], unpacked(variables))),
        strict=True,
    ):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_bfloat16_is_computed_from_the_same_codes(wide_llama) -> None:
    batch, model, variables = scene(wide_llama, "nf4", "none", dtype=jnp.bfloat16)
    exact = load_lib.load(wide_llama, quantize="nf4").variables["params"]
    mine = variables["params"]["layers_0_3"]["mlp"]["up_proj"]["kernel"]
    wanted = exact["layers_0_3"]["mlp"]["up_proj"]["kernel"]
    for got, want in zip(jax.tree.leaves(mine), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(got, want)
    got = policy.policy_token_logps(variables, batch, model=model)
    want = policy.policy_token_logps(unpacked(variables), batch, model=model)
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_pissa_starts_as_the_quantised_model(wide_llama) -> None:
    checkpoint = load_lib.load(wide_llama, quantize="nf4")
    made = adapter_start.make(jax.random.key(0), ADAPTERS["pissa"], checkpoint)
    data = scenes.dataset(wide_llama, 3)
    batch = scenes.batch(data)
    score = functools.partial(scenes.token_logps, model=checkpoint.model)
    start = score({**checkpoint.variables, **made}, batch)
    np.testing.assert_allclose(start, score(checkpoint.variables, batch), atol=1e-4)


def test_adapters_merge_into_the_unpacked_weight(wide_llama) -> None:
    made = adapter_scenes.adapted(wide_llama, ADAPTERS["dora"], quantize="int8")
    variables = made.variables
    merged = low_rank.merge(variables["params"], variables["lora"])
    want = low_rank.merge(unpacked(variables["params"]), variables["lora"])
    for got, value in zip(
        jax.tree.leaves(unpacked(merged)), jax.tree.leaves(want), strict=True
    ):
        np.testing.assert_allclose(got, value, rtol=1e-5, atol=1e-6)


def test_codes_are_not_written_as_a_checkpoint(wide_llama, tmp_path) -> None:
    checkpoint = load_lib.load(wide_llama, quantize="nf4")
    with pytest.raises(UserError, match="held as codes.*load it with quantize none"):
        export.save_hf(checkpoint.variables, tmp_path / "out", like=checkpoint)
    assert not (tmp_path / "out").exists()


# --- meshes -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "mesh"),
    [
        ("int8", {"fsdp": 4, "data": 2}),
        ("nf4", {"fsdp": 4, "data": 2}),
        ("nf4", {"tensor": 2, "fsdp": 2, "data": 2}),
    ],
    ids=str,
)
def test_a_mesh_gives_the_single_device_s_log_probs(make_llama, kind, mesh) -> None:
    directory = make_llama(hidden_size=256, intermediate_size=384, num_hidden_layers=2)
    data = scenes.dataset(directory, 8)
    batch = scenes.batch(data, row_length=int(data.lengths.max()), rows=8)
    found = []
    for options in ({}, mesh):
        loaded = load_lib.load(
            directory, quantize=kind, mesh=make_mesh(MeshConfig(**options))
        )
        score = scenes.token_logps(loaded.variables, batch, model=loaded.model)
        found.append((loaded.variables, score))
    for got, want in zip(*(jax.tree.leaves(v) for v, _ in found), strict=True):
        np.testing.assert_array_equal(got, want)
    np.testing.assert_allclose(found[1][1], found[0][1], rtol=1e-5, atol=1e-4)


def test_blocks_lie_whole_on_a_mesh(make_llama) -> None:
    directory = make_llama(hidden_size=256, intermediate_size=384, num_hidden_layers=2)
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))

    def shards(kind: Any, *path: str) -> tuple[Any, ...]:
        params = load_lib.load(directory, mesh=mesh, quantize=kind).variables["params"]
        node = params["layers_0_2"]
        for name in path:
            node = node[name]
        kernel = node["kernel"]
        return tuple(
            leaf.addressable_shards[0].data.shape
            for leaf in (kernel.codes, kernel.scales)
        )

    # 256 inputs over fsdp are four blocks of 64; 384 outputs over tensor.
    assert shards("nf4", "mlp", "up_proj") == ((2, 32, 192), (2, 1, 192))
    assert shards("int8", "mlp", "up_proj") == ((2, 64, 192), (2, 1, 192))
    # 384 inputs over tensor, 256 outputs over fsdp.
    assert shards("nf4", "mlp", "down_proj") == ((2, 96, 64), (2, 3, 64))
    # 64 inputs are one block, which tensor does not divide.
    assert shards("nf4", "self_attn", "o_proj") == ((2, 32, 64), (2, 1, 64))
    assert shards("int8", "self_attn", "o_proj") == ((2, 32, 64), (2, 1, 64))


# --- memory -----------------------------------------------------------------------


@pytest.mark.parametrize("remat", ["none", "dots"])
def test_a_step_needs_no_memory_for_unpacked_layers(remat) -> None:
    """Temporaries are those of the plain model, whose weights are arguments."""
    config = DecoderConfig(
        vocab_size=128,
        width=128,
        mlp_width=384,
        num_layers=12,
        num_heads=2,
        num_kv_heads=2,
        head_dim=64,
        norm_eps=1e-5,
        rotaries=(Rotary(theta=1e4, dims=64),),
        tie_embeddings=True,
    )
    params, made = adapter_start.shapes(LoRAConfig(rank=2), config)
    mask = adapter.trained({"params": params, **made})
    model = decoder.make_model(config, remat=remat)
    ints = jax.ShapeDtypeStruct((1, 128), jnp.int32)
    inputs = ModelInputs(ints, ints, ints, ints)

    def loss(trainable: Any, frozen: Any, inputs: Any) -> Any:
        variables = trees.combine(trainable, frozen)
        return model.hidden_fn(variables, inputs).sum()

    found = {}
    for kind in ("none", *KINDS):
        shapes = functools.partial(quantised.quantise_params, kind=kind)
        held = jax.eval_shape(shapes, params)
        split = trees.partition({"params": held, **made}, mask)
        compiled = jax.jit(jax.grad(loss)).lower(*split, inputs).compile()
        analysis: Any = compiled.memory_analysis()
        found[kind] = analysis.temp_size_in_bytes
    layers = {k: v for k, v in params.items() if k.startswith("layers")}
    one_layer = trees.num_bytes(layers) / 12
    for kind in KINDS:
        assert found[kind] < found["none"] + 1.5 * one_layer, found
