"""Sharded equals single: losses, gradients and weights on eight CPU devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxalign import trees
from jaxalign.adapters import adapter
from jaxalign.adapters.hybrid import HLPTConfig
from jaxalign.adapters.lora import LoRAConfig
from jaxalign.checkpoints import adapter_start
from jaxalign.checkpoints import load as load_lib
from jaxalign.data import loader
from jaxalign.errors import UserError
from jaxalign.models.families import llama
from jaxalign.objectives import dpo2d, objective
from jaxalign.parallel import sharding
from jaxalign.parallel.mesh import MeshConfig, make_mesh
from tests import scenes
from tests.adapters import scenes as adapter_scenes


def value_and_grad(directory, mesh_config, config):
    mesh = make_mesh(MeshConfig(**mesh_config))
    data = scenes.dataset(directory, 9)
    made = adapter_scenes.adapted(directory, config, size=0.1, mesh=mesh, remat="dots")
    loaded = made.checkpoint
    variables = {
        **loaded.variables,
        **adapter_start.place(made.collections, mesh, llama.FAMILY),
    }
    split = trees.partition(variables, adapter.trained(variables))
    shape = loader.batch_shape([data], row_length=int(data.lengths.max()) + 10)
    source = loader.StepSource(data, shape, loader.BatchPlan(8, 1, 0), num_epochs=1)
    batch = jax.tree.map(lambda leaf: leaf[0], source[0])
    loss_fn = functools.partial(
        objective.loss_fn,
        model=loaded.model,
        config=dpo2d.DPO2DConfig(),
        aspects=data.aspects,
    )
    (loss, _), grads = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(
        *split, sharding.put_batch(batch, mesh), None
    )
    return float(loss), jax.device_get(grads)


MESHES = [
    {"data": 2, "fsdp": 4},
    {"fsdp": 8},
    {"tensor": 2, "fsdp": 2, "data": 2},
    # More than the two key-value heads.
    {"tensor": 4, "data": 2},
    {"tensor": 8},
]


CONFIGS = {
    "lora": LoRAConfig(rank=3, alpha=7.0),
    "dora": LoRAConfig(rank=2, dora=True, targets=("q_proj", "down_proj", "lm_head")),
    "hlpt": HLPTConfig(rank=2, prefix_length=3, gate="sequence"),
}


@pytest.fixture(scope="module")
def single(tiny_llama):
    return functools.cache(lambda name: value_and_grad(tiny_llama, {}, CONFIGS[name]))


@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        *(("lora", mesh) for mesh in MESHES),
        ("hlpt", MESHES[2]),
        ("hlpt", MESHES[3]),
        ("dora", MESHES[2]),
    ],
    ids=str,
)
def test_a_mesh_gives_the_single_device_s_loss_and_gradients(
    tiny_llama, single, name, mesh
) -> None:
    loss, grads = value_and_grad(tiny_llama, mesh, CONFIGS[name])
    want_loss, wanted = single(name)
    assert loss == pytest.approx(want_loss, rel=1e-5)
    for got, want in zip(jax.tree.leaves(grads), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-3, atol=1e-5)


def test_weights_lie_where_the_rules_say(tiny_llama) -> None:
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    params = load_lib.load(tiny_llama, mesh=mesh).variables["params"]
    layer = params["layers_0_3"]
    spec = layer["self_attn"]["q_proj"]["kernel"].sharding.spec
    assert spec == P(None, "fsdp", "tensor")
    # 40 × 64 over 4 × 2 devices.
    shard = layer["self_attn"]["q_proj"]["kernel"].addressable_shards[0]
    assert shard.data.shape == (3, 10, 32)
    assert layer["mlp"]["down_proj"]["kernel"].sharding.spec == P(
        None, "tensor", "fsdp"
    )
    assert params["norm"]["scale"].sharding.is_fully_replicated


def test_an_axis_that_does_not_divide_is_left_out() -> None:
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    tree = {"lm_head": {"kernel": jax.ShapeDtypeStruct((6, 8), jnp.float32)}}
    where = sharding.param_shardings(tree, mesh, llama.FAMILY.sharding)
    assert where["lm_head"]["kernel"].spec == P(None, "tensor")


def test_a_leaf_without_a_rule_is_refused() -> None:
    mesh = make_mesh(MeshConfig())
    with pytest.raises(ValueError, match="no sharding rule matches strange/thing"):
        sharding.param_shardings({"strange": {"thing": jnp.ones(2)}}, mesh, [])


def test_too_few_devices_is_the_user_s_error() -> None:
    with pytest.raises(UserError, match="needs 16 devices: got 8"):
        make_mesh(MeshConfig(data=16))
    with pytest.raises(UserError, match="mesh.fsdp must be at least 1"):
        MeshConfig(fsdp=0)
