"""What save_hf refuses: variables that do not fit the checkpoint they came from."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxalign
from jaxalign import trees
from jaxalign.errors import UserError
from tests import scenes


@pytest.fixture(scope="module")
def loaded(make_llama):
    # Queries are a square of 40 by 40, so that their transpose has the same shape.
    return jaxalign.load_hf(make_llama(head_dim=10, num_attention_heads=4))


def changed(loaded: Any, path: str, fn: Callable[[Any], Any]) -> dict[str, Any]:
    """Return variables in which a function made another leaf of the one at a path."""
    names = path.split("/")
    variables = trees.map_with_paths(lambda _, leaf: leaf, loaded.variables)
    node = trees.node_at(variables["params"], names[:-1])
    node[names[-1]] = fn(node.get(names[-1]))
    return variables


STACK = "layers_0_3"
CASES = {
    "transposed down_proj": (
        f"{STACK}/mlp/down_proj/kernel",
        lambda x: x.swapaxes(-1, -2),
        r"params/layers_0_3/mlp/down_proj/kernel: got floats \[3, 40, 56\], "
        r"expected floats \[3, 56, 40\]",
    ),
    "two layers for three": (
        f"{STACK}/mlp/up_proj/kernel",
        lambda x: x[:2],
        r"mlp/up_proj/kernel: got floats \[2, 40, 56\], expected floats \[3, 40, 56\]",
    ),
    "one vocabulary row more": (
        "embed_tokens/embedding",
        lambda x: jnp.concatenate([x, x[:1]]),
        r"embed_tokens/embedding: got floats \[297, 40\], expected floats \[296, 40\]",
    ),
    "a norm of another shape": (
        "norm/scale",
        lambda x: x[None],
        r"params/norm/scale: got floats \[1, 40\], expected floats \[40\]",
    ),
    "an unknown leaf": (
        "norm/bias",
        lambda _: jnp.zeros(40),
        r"params/norm/bias is unknown: floats \[40\]",
    ),
    "a missing leaf": (
        "norm/scale",
        lambda _: None,
        r"params/norm/scale is missing: expected floats \[40\]",
    ),
    "whole numbers": (
        "norm/scale",
        lambda x: x.astype(int),
        r"params/norm/scale: got int32 \[40\], expected floats \[40\]",
    ),
    "NaN": (
        "norm/scale",
        lambda x: x.at[7].set(jnp.nan),
        r"model.norm.weight has 1 number\(s\) that are not finite: got nan at \[7\]",
    ),
    "an infinity": (
        f"{STACK}/mlp/up_proj/kernel",
        lambda x: x.at[1, 2, 3].set(-jnp.inf),
        r"layers.1.mlp.up_proj.weight has 1 number.* got -inf at \[3, 2\]",
    ),
    "a square transposed": (
        f"{STACK}/self_attn/q_proj/kernel",
        lambda x: x.at[1].set(x[1].T),
        r"layers.1.self_attn.q_proj.weight is transposed.* square of \[40, 40\]",
    ),
    "a square trained on and transposed": (
        f"{STACK}/self_attn/q_proj/kernel",
        lambda x: (x * 1.1).swapaxes(-1, -2),
        "layers.0.self_attn.q_proj.weight is transposed",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_does_not_fit_is_refused(loaded, tmp_path, case) -> None:
    path, fn, match = CASES[case]
    with pytest.raises(UserError, match=match):
        jaxalign.save_hf(changed(loaded, path, fn), tmp_path / "out", like=loaded)
    assert not list(tmp_path.iterdir())


def cut(variables: Any) -> dict[str, Any]:
    """Leave the last layer out of the stack."""
    params = dict(variables["params"])
    stack = jax.tree.map(lambda x: x[:2], params.pop(STACK))
    return {"params": {**params, "layers_0_2": stack}}


def with_lora(variables: Any, **leaves: Any) -> dict[str, Any]:
    return {**variables, "lora": {STACK: {"mlp": {"up_proj": leaves}}}}


A, B, SCALE = jnp.zeros((3, 40, 2)), jnp.zeros((3, 2, 56)), jnp.ones(3)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (cut, "got the stacks layers_0_2, expected such as hold each of the 3 layers"),
        (lambda v: {**v, "batch_stats": {}}, "the collection 'batch_stats' has no"),
        (lambda v: {**v, "loar": {}}, "'loar' has no place.*Did you mean lora"),
        (lambda v: v["params"], r"got a mapping of embed_tokens, .* \{\"params\": par"),
        (lambda v: with_lora(v, a=A, b=B[:2], scale=SCALE), r"b: got floats \[2, 2, 5"),
        (lambda v: with_lora(v, a=A, b=B), "lora/.*/up_proj/scale is missing"),
        (
            lambda v: {**v, "lora": {"mlp": {"a": A, "b": B, "scale": SCALE}}},
            "lora/mlp is unknown: no layer reads it",
        ),
        (
            lambda v: {**v, "saved": {"norm": {"scale": jnp.ones(3)}}},
            r"saved/norm/scale: got floats \[3\], expected floats \[40\]",
        ),
        (
            lambda v: {**v, "saved": {"norm": {"bias": jnp.ones(3)}}},
            "saved/norm/bias is unknown",
        ),
    ],
)
def test_collections_that_do_not_fit(loaded, tmp_path, make, match) -> None:
    with pytest.raises(UserError, match=match):
        jaxalign.save_hf(make(loaded.variables), tmp_path / "out", like=loaded)
    assert not list(tmp_path.iterdir())


def test_numbers_that_are_meant(loaded, tmp_path) -> None:
    """All new squares, NaN where asked for, and what fits: zeros, an edit, groups."""
    key = jax.random.key(0)
    new = changed(
        loaded,
        f"{STACK}/self_attn/q_proj/kernel",
        lambda x: 0.02 * jax.random.normal(key, x.shape),
    )
    jaxalign.save_hf(new, tmp_path / "new", like=loaded)
    zero = changed(loaded, f"{STACK}/self_attn/q_proj/kernel", jnp.zeros_like)
    jaxalign.save_hf(zero, tmp_path / "zero", like=loaded)
    nan = changed(loaded, "norm/scale", lambda x: x.at[7].set(jnp.nan))
    out = jaxalign.save_hf(nan, tmp_path / "nan", like=loaded, allow_nonfinite=True)
    again = jaxalign.load_hf(out).variables["params"]["norm"]["scale"]
    assert np.isnan(again).sum() == 1
    # What the source has itself is no news; what is new beside it is.
    source = jaxalign.load_hf(out)
    jaxalign.save_hf(source.variables, tmp_path / "same", like=source)
    worse = changed(source, "norm/scale", lambda x: x.at[8].set(jnp.inf))
    with pytest.raises(UserError, match=r"1 number\(s\) .* got inf at \[8\]"):
        jaxalign.save_hf(worse, tmp_path / "worse", like=source)


def test_what_overflows_the_checkpoints_kind(make_llama, tmp_path) -> None:
    source: Path = make_llama()
    file = source / "model.safetensors"
    halved = {k: v.astype(np.float16) for k, v in load_file(file).items()}
    save_file(halved, file, metadata={"format": "pt"})
    loaded = jaxalign.load_hf(source)
    large = changed(loaded, "norm/scale", lambda x: x.at[3].set(1e6))
    with pytest.raises(UserError, match=r"got 1000000.0, which overflows float16"):
        jaxalign.save_hf(large, tmp_path / "out", like=loaded)


def test_two_stacks_fit_as_one_does(make_llama, tmp_path) -> None:
    source = make_llama()
    loaded = jaxalign.load_hf(source, groups=((0, 1), (1, 3)))
    lora = scenes.random_lora(loaded.variables["params"])
    variables = {**loaded.variables, "lora": lora}
    assert jaxalign.save_hf(variables, tmp_path / "out", like=source).is_dir()
