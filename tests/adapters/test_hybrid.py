"""HLPT and H2LPT: identities, counts, gradients, memory."""

import functools
import json

import jax
import numpy as np
import pytest

from jaxalign import trees
from jaxalign.adapters import adapter
from jaxalign.adapters.hybrid import H2LPTConfig, HLPTConfig
from jaxalign.adapters.lora import LoRAConfig
from jaxalign.adapters.prefix import PrefixConfig
from jaxalign.cli.main import main
from jaxalign.errors import UserError
from jaxalign.objectives import objective
from jaxalign.objectives.pairwise import PairwiseConfig
from jaxalign.training import step as step_lib
from jaxalign.training.optimizer import OptimizerConfig, make_optimizer
from tests import scenes as model_scenes
from tests.adapters import scenes


INPUTS = scenes.one_sequence(np.arange(3, 40).reshape(1, -1))


def test_without_its_prefix_and_gates_hlpt_is_lora(tiny_llama) -> None:
    hlpt = HLPTConfig(rank=2, prefix_length=4)
    made = scenes.adapted(tiny_llama, hlpt)
    assert set(made.collections) == {"lora", "prefix"}
    down = {"lora": jax.tree.map(lambda x: x, made.collections["lora"])}
    for path in trees.paths(down):
        assert path.split("/")[:4] == ["lora", "layers_0_2", "mlp", "down_proj"]
    down["lora"]["layers_0_2"]["mlp"]["down_proj"].pop("token_gate")
    plain = LoRAConfig(rank=2, alpha=16.0, targets=("down_proj",), layers="0-1")
    checkpoint = scenes.load(tiny_llama, plain)
    assert checkpoint.groups == made.checkpoint.groups
    got = scenes.logits(made._replace(collections=down), INPUTS)
    want = scenes.logits(scenes.Adapted(checkpoint, down), INPUTS)
    np.testing.assert_array_equal(got, want)
    assert np.abs(got - scenes.logits(made, INPUTS)).max() > 0.01


def test_switched_off_it_is_the_base_model_exactly(tiny_llama) -> None:
    made = scenes.adapted(tiny_llama, H2LPTConfig(rank=2, prefix_length=4))
    off = scenes.logits(made._replace(collections={}), INPUTS)
    base = scenes.logits(
        scenes.Adapted(scenes.load(tiny_llama, LoRAConfig()), {}), INPUTS
    )
    np.testing.assert_allclose(off, base, atol=1e-6)


def test_group_boundaries_change_nothing(make_llama) -> None:
    """One group or five: cut further than the adapter asks, and restacked."""
    directory = make_llama(num_hidden_layers=5)
    config = LoRAConfig(rank=2, gate="sequence")
    whole = scenes.adapted(directory, config)
    assert whole.checkpoint.groups == ((0, 5),)
    cut = scenes.load(directory, config, groups=[(i, i + 1) for i in range(5)])
    pieces = {
        f"layers_{i}_{i + 1}": jax.tree.map(
            lambda leaf, i=i: leaf[i : i + 1], whole.collections["lora"]["layers_0_5"]
        )
        for i in range(5)
    }
    got = scenes.logits(scenes.Adapted(cut, {"lora": pieces}), INPUTS)
    np.testing.assert_allclose(got, scenes.logits(whole, INPUTS), atol=1e-5)


# --- training ---------------------------------------------------------------------


def trained_step(directory, config, *, remat="full", **options):
    """Return a train step's inputs: state, frozen, batch; and the step."""
    made = scenes.adapted(directory, config, remat=remat)
    variables = made.variables
    mask = adapter.trained(variables)
    trainable, frozen = trees.partition(variables, mask)
    data = model_scenes.dataset(directory, 4)
    batch = jax.tree.map(lambda x: x[None], model_scenes.batch(data))
    loss_fn = functools.partial(
        objective.loss_fn,
        model=made.checkpoint.model,
        config=PairwiseConfig(name="dpo"),
        aspects=data.aspects,
    )
    tx = make_optimizer(OptimizerConfig(learning_rate=1e-2, **options), 10)
    state = step_lib.init(trainable, tx, key=jax.random.key(0))
    return state, frozen, batch, step_lib.make_train_step(loss_fn, tx)


@pytest.mark.parametrize(
    "config",
    [
        HLPTConfig(rank=2, prefix_length=3),
        PrefixConfig(prefix_length=3, prefix_layers="2", mode="separate"),
        LoRAConfig(rank=2, dora=True, layers="1"),
        LoRAConfig(rank=2, init="pissa", targets=("q_proj", "embed_tokens")),
    ][:3],
    ids=["hlpt", "prefix", "dora"],
)
def test_only_adapter_leaves_are_trained(tiny_llama, config) -> None:
    state, frozen, batch, step = trained_step(tiny_llama, config)
    before = jax.tree.map(np.asarray, frozen)
    new, _ = jax.jit(step)(state, frozen, batch)
    new, metrics = jax.jit(step)(new, frozen, batch)
    assert not jax.tree.leaves(state.trainable.get("params"))
    for path, old, leaf in zip(
        trees.paths(state.trainable),
        jax.tree.leaves(state.trainable),
        jax.tree.leaves(new.trainable),
        strict=True,
    ):
        assert path.split("/")[0] in ("lora", "prefix")
        assert path.split("/")[-1] not in ("scale", "position", "a0", "b0")
        assert np.isfinite(leaf).all() and np.abs(leaf - old).max() > 1e-4, path
    jax.tree.map(np.testing.assert_array_equal, before, frozen)
    assert metrics["nonfinite"].total == 0


def test_parts_learn_at_rates_of_their_own(tiny_llama) -> None:
    config = HLPTConfig(rank=2, prefix_length=3)
    state, frozen, batch, step = trained_step(
        tiny_llama,
        config,
        schedule="constant",
        max_grad_norm=0.0,
        loraplus_lr_ratio=4.0,
        prefix_learning_rate=0.5,
        gate_learning_rate=0.0,
    )
    new, _ = jax.jit(step)(state, frozen, batch)
    moved = {
        path.split("/")[0] + "/" + path.split("/")[-1]: np.abs(new_leaf - old).max()
        for path, old, new_leaf in zip(
            trees.paths(state.trainable),
            jax.tree.leaves(state.trainable),
            jax.tree.leaves(new.trainable),
            strict=True,
        )
    }
    # The first step of Adam is the rate itself, wherever the gradient is not tiny.
    want = {"lora/a": 0.01, "lora/b": 0.04, "prefix/key": 0.5, "prefix/value": 0.5}
    for name, rate in want.items():
        assert moved[name] == pytest.approx(rate, rel=1e-2), name
    assert moved["lora/token_gate"] == moved["prefix/token_gate"] == 0


def temporaries(directory, config) -> int:
    state, frozen, batch, step = trained_step(directory, config, remat="none")
    compiled = jax.jit(step, donate_argnums=0).lower(state, frozen, batch).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_a_prefix_on_top_keeps_no_activations_below(make_llama) -> None:
    directory = make_llama(num_hidden_layers=8)
    top = temporaries(directory, PrefixConfig(prefix_length=3, prefix_layers="6-7"))
    every = temporaries(directory, PrefixConfig(prefix_length=3))
    assert top < 0.5 * every


# --- describe ---------------------------------------------------------------------


@pytest.fixture
def llama_7b(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps(
            {
                "model_type": "llama",
                "hidden_size": 4096,
                "intermediate_size": 11008,
                "num_hidden_layers": 32,
                "num_attention_heads": 32,
                "vocab_size": 32000,
                "rms_norm_eps": 1e-6,
            }
        )
    )
    return str(tmp_path)


def described(capsys, *flags: str) -> dict:
    with pytest.raises(SystemExit, match="0"):
        main(["describe", *flags, "--json"])
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("flags", "count"),
    [
        (["--adapter.name", "hlpt"], 4_507_648),
        (["--adapter.name", "h2lpt"], 2_253_824),
        (
            ["--adapter.rank", "8", "--adapter.targets", "[q_proj,v_proj]"],
            4_194_304,
        ),
        (["--adapter.rank", "8", "--adapter.targets", "[down_proj]"], 3_866_624),
        (["--adapter.name", "prefix"], 5_242_880),
        (["--adapter.name", "prefix", "--adapter.prefix_length", "30"], 7_864_320),
        (["--adapter.name", "prefix", "--adapter.gate", "static"], 5_242_912),
        (["--adapter.name", "none", "--trainable", "[norm/scale]"], 4096),
    ],
)
def test_counts_of_llama_7b(llama_7b, capsys, flags, count) -> None:
    found = described(capsys, "--model", llama_7b, *flags)
    assert found["trainable"] == count
    assert sum(group["trainable"] for group in found["groups"]) == count
    assert found["total"] == 6_738_415_616
    assert found["optimizer_bytes"] == 8 * count


def test_groups_of_h2lpt(llama_7b, capsys) -> None:
    flags = ["--adapter.name", "h2lpt", "--dtype", "bfloat16", "--remat", "full"]
    sizes = ["--batch_rows", "1", "--row_length", "100"]
    found = described(capsys, "--model", llama_7b, *flags, *sizes)
    groups = {group["name"]: group for group in found["groups"]}
    assert groups["layers 0-11"]["lora"] == 12 * 8 * (11008 + 4096)
    assert groups["layers 0-11"]["gates"] == 12 * 11008
    assert groups["layers 12-27"]["trainable"] == 0
    assert groups["layers 28-31"]["prefix"] == 4 * 2 * 20 * 4096
    # Only the bottom saves activations; the middle must be gone back through.
    assert groups["layers 12-27"]["activations_bytes"] == 16 * 100 * 4096 * 2
    assert groups["layers 12-27"]["weights_bytes"] == 16 * 202_383_360 * 2
    assert groups["embed_tokens"]["activations_bytes"] == 0


def test_a_table_is_printed(llama_7b, capsys) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["describe", "--model", llama_7b, "--adapter.name", "hlpt"])
    out = capsys.readouterr().out
    assert "4,507,648 beside 6,738,415,616 base weights are trained" in out
    assert "layers 0-23" in out and "layers 24-31" in out and "all " in out


# --- refused ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"faithful": True, "gate": "token"}, "gate is the mean .*: got gate token"),
        ({"faithful": True, "mode": "separate"}, "has mode concat: got separate"),
        (
            {"faithful": True, "prefix_init": "zero"},
            "from N.0, 1.: got prefix_init zero",
        ),
        ({"faithful": True, "positions": "unshifted"}, "got positions unshifted"),
        ({"dora": True}, "adapter.dora measures the columns"),
        ({"rank": 0}, "adapter.rank must be at least 1"),
        ({"prefix_length": 0}, "adapter.prefix_length must be at least 1"),
    ],
)
def test_options_that_are_refused(options, match) -> None:
    with pytest.raises(UserError, match=match):
        HLPTConfig(**options)
