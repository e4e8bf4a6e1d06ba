"""Adapters of some layers: the base is loaded cut for them, or the error says how."""

import jax
import numpy as np
import pytest

import jaxalign
from jaxalign.adapters import adapter, lora, prefix
from jaxalign.adapters.adapter import PeftConfig
from jaxalign.adapters.hybrid import HLPTConfig
from jaxalign.adapters.lora import LoRAConfig
from jaxalign.adapters.prefix import PrefixConfig
from jaxalign.errors import UserError


KEY = jax.random.key(0)
SIZES = {"width": 40, "kv_heads": 2, "head_dim": 10}


def test_the_error_names_function_and_argument(tiny_llama) -> None:
    params = jaxalign.load_hf(tiny_llama).variables["params"]
    match = (
        r"'0' .* cut through the group layers_0_3: .*load_hf\(path, adapter=config\)"
    )
    with pytest.raises(UserError, match=match):
        lora.init(KEY, params, LoRAConfig(layers="0"))
    match = r"'top:1' cut through the group layers_0_3: .*load_hf\(path, adapter=confi"
    with pytest.raises(UserError, match=match):
        config = PrefixConfig(prefix_layers="top:1", prefix_init="normal")
        prefix.init(KEY, params, config, **SIZES)


@pytest.mark.parametrize(
    ("config", "groups"),
    [
        (LoRAConfig(layers="0"), ((0, 1), (1, 3))),
        (LoRAConfig(), ((0, 3),)),
        (PrefixConfig(prefix_layers="top:1", prefix_init="normal"), ((0, 2), (2, 3))),
        (HLPTConfig(prefix_init="normal"), None),
    ],
)
def test_a_base_is_loaded_cut_for_its_adapter(tiny_llama, config, groups) -> None:
    loaded = jaxalign.load_hf(str(tiny_llama), adapter=config)
    if groups is not None:
        assert loaded.groups == groups
    else:
        assert len(loaded.groups) > 1
    made = adapter.init(
        KEY, loaded.variables["params"], config, num_layers=3, sizes=SIZES
    )
    assert made and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(made))


def test_what_load_hf_cannot_cut(tiny_llama) -> None:
    with pytest.raises(UserError, match="give adapter or groups"):
        jaxalign.load_hf(tiny_llama, adapter=LoRAConfig(), groups=((0, 3),))
    with pytest.raises(UserError, match=r"there already: .*policy.open_policy\(mode"):
        jaxalign.load_hf(tiny_llama, adapter=PeftConfig(path="there"))
