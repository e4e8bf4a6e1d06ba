"""What models that see have in common with others: codes, prefixes, dropout, meshes."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import trees
from jaxalign.adapters import adapter as adapter_lib
from jaxalign.adapters.hybrid import H2LPTConfig, HLPTConfig
from jaxalign.adapters.lora import LoRAConfig
from jaxalign.adapters.prefix import PrefixConfig
from jaxalign.checkpoints import adapter_files, adapter_start
from jaxalign.checkpoints import load as load_lib
from jaxalign.checkpoints.adapter_files import AdapterFiles
from jaxalign.checkpoints.renderer import open_renderer
from jaxalign.data import pairs, records
from jaxalign.models.quantised import Quantised
from jaxalign.objectives import objective
from jaxalign.parallel import sharding
from jaxalign.parallel.mesh import MeshConfig, make_mesh
from jaxalign.training.describe import DescribeConfig, describe, table
from tests import scenes
from tests.adapters import scenes as adapter_scenes


def batch_of(scene: Any, count: int = 4, **options: Any) -> Any:
    """Pack the first records; with and without pictures."""
    found = list(records.read(scene.data))[:count]
    data = pairs.prepare(found, open_renderer(scene.model), max_length=None)
    return scenes.batch(data, **options)


def is_codes(leaf: Any) -> bool:
    return isinstance(leaf, Quantised)


@pytest.mark.parametrize(
    "kind, quantize, layer",
    [
        ("llava", "nf4", "mlp/fc1"),
        ("idefics3", "int8", "self_attn/out_proj"),
        ("qwen2_5_vl", "int8", "attn/qkv"),
    ],
)
def test_a_tower_of_codes(scene, kind, quantize, layer) -> None:
    found = scene(kind)
    loaded = load_lib.load(found.model, quantize=quantize)
    params = loaded.variables["params"]
    leaves, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_codes)
    held = {trees.path_string(path) for path, leaf in leaves if is_codes(leaf)}
    kernels = {
        path
        for path in trees.paths(load_lib.load(found.model).variables["params"])
        if path.endswith("kernel") and "layers_" in path
    }
    assert held == kernels
    assert any(path.startswith("vision/") and layer in path for path in held)
    unpacked = jax.tree.map(
        lambda leaf: leaf.astype(jnp.float32) if is_codes(leaf) else leaf,
        loaded.variables,
        is_leaf=is_codes,
    )
    batch = batch_of(found)
    got, want = (
        scenes.token_logps(variables, batch, model=loaded.model)
        for variables in (loaded.variables, unpacked)
    )
    np.testing.assert_allclose(got, want, atol=1e-5)
    # Codes of the tower matter: with the plain tower the numbers are others.
    plain = load_lib.load(found.model)
    mixed = {**params, "vision": plain.variables["params"]["vision"]}
    other = scenes.token_logps({"params": mixed}, batch, model=loaded.model)
    assert np.abs(np.asarray(got - other)).max() > 1e-3


@pytest.mark.parametrize(
    "config",
    [
        PrefixConfig(prefix_length=3, mode="separate"),
        PrefixConfig(prefix_length=3),
        HLPTConfig(rank=2, prefix_length=3, layers="0"),
        H2LPTConfig(rank=2, prefix_length=3, layers="0", prefix_layers="1"),
        HLPTConfig(
            rank=2, prefix_length=3, layers="0", targets=("vision:fc1", "q_proj")
        ),
    ],
    ids=["separate", "concat", "hlpt", "h2lpt", "hlpt with tower"],
)
def test_prefixes_of_the_decoder(scene, config, tmp_path) -> None:
    found = scene("llava")
    loaded = load_lib.load(found.model, adapter=config)
    made = adapter_start.make(jax.random.key(0), config, loaded)
    shaken = adapter_scenes.shaken(made, size=0.2)
    assert "prefix" in shaken and "vision" not in shaken["prefix"]
    out = adapter_files.save_adapter(loaded, shaken, tmp_path / "adapter")
    again = AdapterFiles(out, found.model).collections()
    for path, value in trees.by_path(again).items():
        np.testing.assert_array_equal(value, trees.by_path(shaken)[path], err_msg=path)
    batch = batch_of(found)
    variables = {**loaded.variables, **shaken}
    got = scenes.token_logps(variables, batch, model=loaded.model)
    base = scenes.token_logps(loaded.variables, batch, model=loaded.model)
    assert np.abs(np.asarray(got - base)).max() > 1e-2
    assert trees.paths(again) == trees.paths(shaken)


def test_dropout_in_a_tower(scene) -> None:
    found = scene("qwen2_5_vl")
    config = LoRAConfig(rank=2, targets=("vision:qkv", "connector:.*"), dropout=0.5)
    loaded = load_lib.load(found.model, adapter=config, lora_dropout=0.5)
    made = adapter_start.make(jax.random.key(0), config, loaded)
    variables = {**loaded.variables, **adapter_scenes.shaken(made, size=0.5)}
    images = batch_of(found).inputs.images
    assert loaded.model.image_fn is not None
    run = jax.jit(loaded.model.image_fn)
    plain, first, again, second = (
        np.asarray(run(variables, images, **options))
        for options in (
            {},
            *({"key": jax.random.key(seed)} for seed in (0, 0, 1)),
        )
    )
    np.testing.assert_array_equal(first, again)
    real = np.abs(plain).max(-1) > 0
    assert real.any()
    assert (np.abs(first - second).max(-1) > 1e-4)[real].mean() > 0.9
    assert (np.abs(first - plain).max(-1) > 1e-4)[real].mean() > 0.9


MESHED = {
    "llava": ("q_proj", "vision:fc1", "vision:q_proj"),
    "idefics3": ("q_proj", "vision:fc2", "vision:out_proj"),
    "qwen2_5_vl": ("down_proj", "vision:qkv", "vision:down_proj"),
}


@pytest.mark.parametrize("kind", MESHED)
@pytest.mark.parametrize("mesh", [{"fsdp": 4}, {"tensor": 4}], ids=str)
def test_a_mesh_gives_the_single_device_s_loss_and_gradients(scene, kind, mesh) -> None:
    """With an adapter on the tower, and the connector trained whole beside it."""
    found = scene(kind)
    options = MeshConfig(data=2, **mesh)
    count = 8  # a row a pair at most
    loss, grads = value_and_grad(found, kind, options, count)
    want_loss, wanted = value_and_grad(found, kind, MeshConfig(), count)
    assert loss == pytest.approx(want_loss, rel=1e-5)
    scopes = {path.split("/")[1] for path in trees.paths(grads)}
    assert {"vision", "connector", "layers_0_2"} <= scopes
    for path, want in trees.by_path(wanted).items():
        got = trees.by_path(grads)[path]
        # Sums over devices round by the size of their terms, not of what is left.
        rounding = 1e-4 * max(0.1, float(np.abs(want).max()))
        np.testing.assert_allclose(got, want, rtol=2e-3, atol=rounding, err_msg=path)
        if not path.startswith("params/connector/norm"):
            assert np.abs(want).max() > 0, path


def value_and_grad(found: Any, kind: str, options: MeshConfig, count: int) -> Any:
    mesh = make_mesh(options)
    config = LoRAConfig(rank=2, targets=MESHED[kind])
    loaded = load_lib.load(found.model, adapter=config, mesh=mesh, remat="dots")
    made = adapter_start.make(jax.random.key(0), config, loaded)
    placed = adapter_start.place(
        adapter_scenes.shaken(made, size=0.2), mesh, loaded.family
    )
    variables = {**loaded.variables, **placed}
    mask = adapter_lib.trained_mask(
        variables, loaded.variables["params"], ["connector/.*"]
    )
    trainable, frozen = trees.partition(variables, mask)
    frozen = {**frozen, "reference": {"params": trainable["params"]}}
    batch = jax.device_get(batch_of(found, 8, rows=count))
    loss_fn = functools.partial(
        objective.loss_fn,
        model=loaded.model,
        config=objective.CONFIGS["dpo"](),
        aspects=("correctness",),
    )
    run = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))
    (loss, _), grads = run(trainable, frozen, sharding.put_batch(batch, mesh), None)
    return float(loss), jax.device_get(grads)


def test_describe_counts_tower_connector_and_decoder(scene) -> None:
    found = scene("llava")
    values: dict[str, Any] = {"model": str(found.model)}
    adapter = LoRAConfig(rank=2, targets=("q_proj", "vision:fc1"))
    told = describe(DescribeConfig(**values, adapter=adapter))
    groups = {group["name"]: group for group in told["groups"]}
    params = load_lib.load(found.model).variables["params"]
    for name in ("vision", "connector", "embed_tokens"):
        lora = 4 * (2 * (32 * 2 + 2 * 44) + 2) if name == "vision" else 0
        assert groups[name]["weights_bytes"] == trees.num_bytes(params[name]) + lora
    assert told["total"] == trees.num_params(params)
    assert groups["vision"]["trainable"] == groups["vision"]["lora"] == 304
    # By hand: 2 of the tower's 2 layers, d 32, MLP 44, 4 heads, rank 2; remat dots.
    told = describe(DescribeConfig(**values, adapter=adapter, row_patches=50))
    groups = {group["name"]: group for group in told["groups"]}
    each = 32 + (3 * 32 + 32 + 44 + 32) + (32 + 4) + 2
    assert groups["vision"]["activations_bytes"] == 4 * 4 * 50 * 2 * each
    each = 32 + 48 + 48  # and of the connector, a patch a feature
    assert groups["connector"]["activations_bytes"] == 4 * 4 * 50 * each
    # Below the lowest trained layer nothing is kept; the decoder's are kept anyway.
    top = LoRAConfig(rank=2, targets=("q_proj", "vision:fc1"), layers="all;vision:1")
    told = describe(DescribeConfig(**values, adapter=top, row_patches=50))
    half = told["groups"][0]["activations_bytes"]
    assert 2 * half == groups["vision"]["activations_bytes"]
    # A frozen tower keeps nothing.
    told = describe(DescribeConfig(**values, row_patches=50))
    assert [told["groups"][i]["activations_bytes"] for i in (0, 1)] == [0, 0]
    assert "--row_patches" not in table(told)
    told = describe(DescribeConfig(**values, trainable=("connector/.*",)))
    assert "connector is trained, and what it keeps of pictures is not" in table(told)
    assert "\nvision " in table(told) and "\nlayers 0-1" in table(told)
