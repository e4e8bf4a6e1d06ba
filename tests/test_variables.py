"""One convention: variables or params, and each is refused where the other is meant."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxalign import trees
from jaxalign.adapters import adapter, hybrid, lora, low_rank, prefix
from jaxalign.adapters.lora import LoRAConfig
from jaxalign.errors import UserError
from jaxalign.objectives import policy
from jaxalign.parallel import mesh, sharding
from jaxalign.types import Model
from tests import scenes


PARAMS: dict[str, Any] = {
    "embed_tokens": {"embedding": jnp.ones((9, 4))},
    "layers_0_2": {"self_attn": {"q_proj": {"kernel": jnp.ones((2, 4, 4))}}},
    "norm": {"scale": jnp.ones(4)},
}
VARIABLES = {"params": PARAMS, "lora": {}}
KEY = jax.random.key(0)
CONFIG = LoRAConfig(targets=("q_proj",), rank=1)
SIZES = {"width": 4, "kv_heads": 1, "head_dim": 4}


def hlpt(params: Any) -> Any:
    config = hybrid.HLPTConfig(prefix_init="normal")
    return adapter.init(KEY, params, config, num_layers=2, sizes=SIZES)


WITH_PARAMS = {
    "lora": lambda tree: lora.init(KEY, tree, CONFIG),
    "lora ": lambda tree: lora.layer_choices(tree, CONFIG),
    "prefix.init": lambda tree: prefix.init(
        KEY, tree, prefix.PrefixConfig(prefix_init="normal"), **SIZES
    ),
    "adapter.init": hlpt,
    "adapter.groups": lambda tree: adapter.groups(CONFIG, tree, 2),
    "adapter.trained_mask": lambda tree: adapter.trained_mask(VARIABLES, tree),
    "low_rank.merge": lambda tree: low_rank.merge(tree, {}),
    "low_rank.unmerge": lambda tree: low_rank.unmerge(tree, {}),
    "param_shardings": lambda tree: sharding.param_shardings(
        tree, mesh.make_mesh(mesh.MeshConfig()), [(".*", PartitionSpec())]
    ),
}


@pytest.mark.parametrize("name", WITH_PARAMS)
def test_variables_for_params(name) -> None:
    match = rf'{name.strip()}.*: got variables, .*Give variables\["params"\]'
    with pytest.raises(UserError, match=match):
        WITH_PARAMS[name](VARIABLES)


def test_params_for_variables(tiny_llama) -> None:
    with pytest.raises(UserError, match=r'trained: got a mapping of .*\{"params": par'):
        adapter.trained(PARAMS)
    with pytest.raises(UserError, match="trained_mask: got a mapping of embed_tokens"):
        adapter.trained_mask(PARAMS, PARAMS)
    with pytest.raises(UserError, match=r'merge: got variables.*variables\["lora"\]'):
        low_rank.merge(PARAMS, VARIABLES)
    from jaxalign import load_hf

    loaded = load_hf(tiny_llama)
    batch = scenes.batch(scenes.dataset(tiny_llama, 2))
    with pytest.raises(UserError, match="hidden_fn: got a mapping of embed_tokens"):
        loaded.model.hidden_fn(loaded.variables["params"], batch.inputs)
    split = ({"params": None}, loaded.variables)
    wrong = {**loaded.variables, "reference": loaded.variables["params"]}
    with pytest.raises(UserError, match="the reference: got a mapping of embed_tok"):
        policy.reference_variables(split[0], wrong)
    with pytest.raises(UserError, match="frozen: got a mapping of lora"):
        policy.reference_variables({}, {"lora": {}})


def test_patterns_and_masks_of_the_other_tree() -> None:
    with pytest.raises(UserError, match="parameters alone: take params/ off"):
        trees.mask_from_patterns(PARAMS, ["params/norm/.*"])
    with pytest.raises(UserError, match="variables: put params/ in front"):
        trees.mask_from_patterns({"params": PARAMS}, ["norm/.*"])
    mask = trees.mask_from_patterns(PARAMS, ["norm/.*"])
    with pytest.raises(UserError, match="mask of parameters: give variables"):
        trees.partition({"params": PARAMS}, mask)
    with pytest.raises(UserError, match="mask of variables: give"):
        trees.partition(PARAMS, {"params": mask})
    with pytest.raises(UserError, match="lacks 'norm/scale'.*Make it of the tree"):
        trees.partition(PARAMS, {k: v for k, v in mask.items() if k != "norm"})


def test_a_state_that_is_no_dict_has_a_reference(tiny_llama) -> None:
    """As an NNX state has: here a tuple of arrays."""
    model = Model(
        hidden_fn=lambda state, inputs: state[0][inputs.tokens],
        logits_fn=lambda state, hidden: hidden @ state[1],
    )
    vocabulary = 300
    state = (
        jax.random.normal(KEY, (vocabulary, 8)),
        jax.random.normal(jax.random.key(1), (8, vocabulary)),
    )
    moved = jax.tree.map(lambda x: 1.1 * x, state)
    batch = scenes.batch(scenes.dataset(tiny_llama, 2))
    holes = (None, None)
    with pytest.raises(UserError, match="frozen is tuple, without collections.*WithRe"):
        policy.score_tokens(moved, holes, batch, None, model=model)
    frozen = policy.WithReference(holes, state)
    got = policy.score_tokens(moved, frozen, batch, None, model=model, kl=True)
    want = policy.policy_token_logps(state, batch, model=model)
    np.testing.assert_allclose(got.reference, want, atol=1e-5)
    mine = policy.policy_token_logps(moved, batch, model=model)
    np.testing.assert_allclose(got.policy, mine, atol=1e-5)
    assert float(jnp.abs(got.logratios).max()) > 0.1


def test_rows_that_do_not_divide_over_the_mesh() -> None:
    if len(jax.devices()) < 4:
        pytest.skip("needs four devices, as tests/conftest.py asks of a CPU")
    four = mesh.make_mesh(mesh.MeshConfig(data=2, fsdp=2))
    batch = {"tokens": np.zeros((6, 5))}
    match = r"got 6 row\(s\), expected a multiple of data × fsdp = 4.* 8 rows"
    with pytest.raises(UserError, match=match):
        sharding.put_batch(batch, four)
    with pytest.raises(UserError, match=r"got 6 row\(s\)"):
        sharding.put_batch({"tokens": np.zeros((3, 6, 5))}, four, leading=1)
    whole = {"tokens": np.zeros((8, 5))}
    assert sharding.put_batch(whole, four)["tokens"].shape == (8, 5)
