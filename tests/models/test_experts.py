"""Mixtures of experts: the routers' balance, LoRA on experts, meshes, training."""

import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxalign import trees
from jaxalign.adapters import adapter, low_rank
from jaxalign.adapters.lora import LoRAConfig
from jaxalign.checkpoints import adapter_files, adapter_start, export
from jaxalign.checkpoints import load as load_lib
from jaxalign.checkpoints.policy import open_policy
from jaxalign.cli.main import main
from jaxalign.data import loader
from jaxalign.errors import UserError
from jaxalign.objectives import balance, dpo2d, objective
from jaxalign.parallel import sharding
from jaxalign.parallel.mesh import MeshConfig, make_mesh
from tests import scenes, synthetic
from tests.adapters import scenes as adapter_scenes


OPTIONS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 24,
        "norm_topk_prob": True,
    },
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
}


@pytest.fixture(scope="module")
def make(tmp_path_factory) -> Any:
    @functools.cache
    def checkpoint(model_type: str) -> Any:
        directory = tmp_path_factory.mktemp(model_type)
        options = OPTIONS[model_type]
        return synthetic.make_checkpoint(directory, model_type, **options)

    return checkpoint


@pytest.mark.parametrize("model_type", OPTIONS)
def test_the_balance_is_that_of_transformers(make, model_type) -> None:
    import torch

    checkpoint = load_lib.load(make(model_type), groups=((0, 1), (1, 3)))
    tokens = np.random.default_rng(0).integers(5, 200, (2, 23))
    inputs = adapter_scenes.one_sequence(tokens)
    assert checkpoint.model.routed_fn is not None
    hidden, sums = jax.jit(checkpoint.model.routed_fn)(checkpoint.variables, inputs)
    alone = jax.jit(checkpoint.model.hidden_fn)(checkpoint.variables, inputs)
    np.testing.assert_allclose(hidden, alone, atol=2e-5)
    with torch.no_grad():
        model = scenes.torch_model(make(model_type))
        want = model(torch.from_numpy(tokens), output_router_logits=True).aux_loss
    assert float(balance.balance_loss(sums)) == pytest.approx(float(want), rel=1e-5)
    # Padding goes through the experts, but does not count.
    padded = jax.tree.map(lambda leaf: jnp.pad(leaf, [(0, 1), (0, 9)]), inputs)
    _, again = checkpoint.model.routed_fn(checkpoint.variables, padded)
    assert float(balance.balance_loss(again)) == pytest.approx(float(want), rel=1e-5)
    np.testing.assert_allclose(again.tokens, [69, 69, 0])  # three layers


EVERYTHING = (*("q_proj", "o_proj", "router", "gate_proj", "up_proj", "down_proj"),)
ADAPTERS = {
    "plain": LoRAConfig(rank=2, alpha=5.0, targets=EVERYTHING),
    "some layers": LoRAConfig(rank=3, targets=("mlp/experts/.*",), layers="1-2"),
    "static": LoRAConfig(rank=2, targets=EVERYTHING[3:], gate="static"),
    "pissa": LoRAConfig(rank=2, targets=EVERYTHING, init="pissa", rslora=True),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapted_experts_merge_and_come_back(make, tmp_path, name) -> None:
    directory = make("qwen3_moe")
    made = adapter_scenes.adapted(directory, ADAPTERS[name], size=0.1)
    inputs = adapter_scenes.one_sequence(np.arange(5, 45)[None])
    want = adapter_scenes.logits(made, inputs)
    plain = adapter_scenes.Adapted(made.checkpoint, {})
    assert np.abs(adapter_scenes.logits(plain, inputs) - want).max() > 0.1
    params = low_rank.merge(
        made.checkpoint.variables["params"], made.collections["lora"]
    )
    merged = made.checkpoint._replace(variables={"params": params})
    got = adapter_scenes.logits(adapter_scenes.Adapted(merged, {}), inputs)
    np.testing.assert_allclose(got, want, atol=2e-4)
    # The exported weights are those, one tensor an expert again.
    out = export.save_hf(made.variables, tmp_path / "merged", like=made.checkpoint)
    again = load_lib.load(out, groups=made.checkpoint.groups)
    for path, a, b in zip(
        trees.paths(params),
        jax.tree.leaves(params),
        jax.tree.leaves(again.variables["params"]),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, atol=1e-6, err_msg=path)
    adapter_files.save_adapter(made.checkpoint, made.collections, tmp_path / "a")
    restored = open_policy(str(directory), str(tmp_path / "a"))
    adapter_files.save_adapter(
        restored.checkpoint, {"lora": restored.variables["lora"]}, tmp_path / "b"
    )
    before, after = (
        load_file(tmp_path / d / "adapter_model.safetensors") for d in "ab"
    )
    assert before.keys() == after.keys()
    for tensor, value in before.items():
        np.testing.assert_array_equal(value, after[tensor])


# peft doubles the rank of gate_up_proj, and says so of a name that it then looks for in
# vain; the log-probabilities are right.
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*rank_pattern keys did not match:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:.*alpha_pattern keys did not match:RuntimeWarning")
@pytest.mark.parametrize("model_type", OPTIONS)
def test_peft_scores_adapted_experts_alike(make, tmp_path, model_type) -> None:
    from peft import PeftModel

    directory = make(model_type)
    config = LoRAConfig(
        rank=2, alpha=5.0, targets=("q_proj", "gate_proj", "up_proj", "down_proj")
    )
    made = adapter_scenes.adapted(directory, config, size=0.1)
    out = adapter_files.save_adapter(made.checkpoint, made.collections, tmp_path / "a")
    data = scenes.dataset(directory, 3)
    peft = PeftModel.from_pretrained(scenes.torch_model(directory), out).eval()
    want = scenes.torch_logps(peft, data)
    batch = scenes.batch(data)
    got = scenes.token_logps(made.variables, batch, model=made.checkpoint.model)
    scenes.assert_same(scenes.responses(batch, got), want, atol=1e-4)


@pytest.mark.parametrize(
    "options", [{"gate": "token"}, {"dora": True}, {"dropout": 0.1}], ids=str
)
def test_what_experts_cannot_have(make, options) -> None:
    with pytest.raises(UserError, match="the experts' down_proj takes LoRA with"):
        config = LoRAConfig(rank=2, **options)
        adapter_scenes.adapted(make("qwen3_moe"), config)


@pytest.mark.parametrize(
    "mesh", [{"data": 2, "fsdp": 4}, {"tensor": 4, "data": 2}], ids=str
)
def test_a_mesh_gives_the_same(make, mesh) -> None:
    directory = make("qwen3_moe")

    def run(sizes: dict[str, int]) -> Any:
        where = make_mesh(MeshConfig(**sizes))
        made = adapter_scenes.adapted(
            directory, ADAPTERS["plain"], size=0.1, mesh=where, remat="dots"
        )
        family = made.checkpoint.family
        variables = {
            **made.checkpoint.variables,
            **adapter_start.place(made.collections, where, family),
        }
        data = scenes.dataset(directory, 9)
        shape = loader.batch_shape([data], row_length=int(data.lengths.max()) + 10)
        source = loader.StepSource(data, shape, loader.BatchPlan(8, 1, 0), num_epochs=1)
        batch = jax.tree.map(lambda leaf: leaf[0], source[0])
        loss_fn = functools.partial(
            objective.loss_fn,
            model=made.checkpoint.model,
            config=dpo2d.DPO2DConfig(),
            aspects=data.aspects,
            router_weight=0.3,
        )
        step = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))
        split = trees.partition(variables, adapter.trained(variables))
        (loss, metrics), grads = step(*split, sharding.put_batch(batch, where), None)
        return float(loss), float(metrics["router_loss"].value), jax.device_get(grads)

    (loss, router, grads), want = run(mesh), run({})
    assert (loss, router) == pytest.approx(want[:2], rel=1e-5)
    for got, wanted in zip(
        jax.tree.leaves(grads), jax.tree.leaves(want[2]), strict=True
    ):
        np.testing.assert_allclose(got, wanted, atol=1e-5 * np.abs(wanted).max() + 1e-7)


def run(*arguments: Any, code: int = 0) -> None:
    with pytest.raises(SystemExit, match=str(code)):
        main([str(argument) for argument in arguments])


def test_training_reports_the_balance(make, tiny_llama, tmp_path, capsys) -> None:
    data = synthetic.write_jsonl(tmp_path / "d.jsonl", synthetic.feedback_records(6))
    common: tuple[Any, ...] = (
        *("train", "--data", data, "--max_steps", 3, "--row_length", 400),
        *("--batch_rows", 1, "--logging_steps", 1, "--router_weight", 5.0),
        *("--report_to", "none", "--adapter.rank", 2),
        *("--adapter.targets", "[q_proj,router]"),
    )
    dense = ("--model", tiny_llama, "--adapter.targets", "[q_proj]")
    run(*common, *dense, "--out", tmp_path / "dense", code=2)
    assert "is no mixture of experts" in capsys.readouterr().err
    for weight, out in ((0, "free"), (5, "balanced")):
        run(
            *(*common, "--model", make("mixtral"), "--out", tmp_path / out),
            *("--router_weight", weight, "--optimizer.learning_rate", 1e-2),
        )
    found = {
        out: [
            json.loads(line)["router_loss"]
            for line in (tmp_path / out / "metrics.jsonl").read_text().splitlines()
            if "router_loss" in line and "eval" not in line
        ]
        for out in ("free", "balanced")
    }
    assert found["free"][0] == found["balanced"][0] >= 2.0  # k of an even router
    assert found["balanced"][-1] < found["free"][-1]
