"""Adapters as directories: there and back again, by Python and by the command line."""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxalign import trees
from jaxalign.adapters.hybrid import H2LPTConfig, HLPTConfig
from jaxalign.adapters.lora import LoRAConfig
from jaxalign.adapters.prefix import PrefixConfig
from jaxalign.checkpoints import adapter_files
from jaxalign.checkpoints.policy import open_policy, open_run
from jaxalign.cli.main import main
from jaxalign.errors import UserError
from tests import scenes as model_scenes
from tests import synthetic
from tests.adapters import scenes


def run(*arguments: Any) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([str(argument) for argument in arguments])


def contents(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


CONFIGS = {
    "lora": (LoRAConfig(rank=2, layers="1-2"), "stock"),
    "static": (LoRAConfig(rank=2, gate="static"), "stock"),
    "dora": (LoRAConfig(rank=2, dora=True, targets=("q_proj", "lm_head")), "stock"),
    "pissa": (LoRAConfig(rank=2, init="pissa", rslora=True), "stock"),
    "embeddings": (LoRAConfig(rank=2, targets=("embed_tokens", "v_proj")), "stock"),
    "gated": (LoRAConfig(rank=2, gate="token"), "hybrid"),
    "prefix": (PrefixConfig(prefix_length=4), "stock"),
    "some layers": (PrefixConfig(prefix_length=4, prefix_layers="2"), "hybrid"),
    "separate": (PrefixConfig(prefix_length=4, mode="separate"), "hybrid"),
    "log gate": (PrefixConfig(prefix_length=4, gate="static"), "hybrid"),
    "unshifted": (PrefixConfig(prefix_length=4, positions="unshifted"), "hybrid"),
    "hlpt": (HLPTConfig(rank=2, prefix_length=4), "hybrid"),
    "h2lpt": (H2LPTConfig(rank=2, prefix_length=4, gate="sequence"), "hybrid"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_an_adapter_comes_back(tiny_llama, tmp_path, name) -> None:
    config, kind = CONFIGS[name]
    made = scenes.adapted(tiny_llama, config)
    out = adapter_files.save_adapter(made.checkpoint, made.collections, tmp_path / "a")
    stock = (out / "adapter_config.json").is_file()
    assert stock == (kind == "stock") == (not (out / adapter_files.LOADER).exists())
    restored = open_policy(str(tiny_llama), str(out))
    assert restored.checkpoint.groups == made.checkpoint.groups
    again = adapter_files.save_adapter(
        restored.checkpoint, restored.variables, tmp_path / "b"
    )
    assert contents(again) == contents(out)
    if name in ("static", "pissa"):  # folded into the factors
        inputs = scenes.one_sequence(np.arange(5, 30)[None])
        got = scenes.logits(
            scenes.Adapted(restored.checkpoint, {"lora": restored.variables["lora"]}),
            inputs,
        )
        np.testing.assert_allclose(got, scenes.logits(made, inputs), atol=2e-4)
        return
    for collection, tree in made.collections.items():
        assert trees.paths(restored.variables[collection]) == trees.paths(tree)
        jax.tree.map(
            np.testing.assert_array_equal, restored.variables[collection], tree
        )


# PEFT 0.21 hands its prefix on under a name that transformers 5.24 deprecates; the
# warning is laid at the door of torch, whose module made the call.
@pytest.mark.filterwarnings(
    "ignore:.past_key_values. is deprecated:FutureWarning:torch.nn.modules.module"
)
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_a_prefix_of_peft_goes_through_both_ways(tiny_llama, tmp_path, capsys) -> None:
    import torch
    from peft import PeftModel, PrefixTuningConfig, get_peft_model

    with torch.random.fork_rng():
        torch.manual_seed(0)
        options = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
        model = get_peft_model(model_scenes.torch_model(tiny_llama), options)
    model.save_pretrained(tmp_path / "peft", save_embedding_layers=False)
    run(
        *("export", "--model", tiny_llama, "--adapter", tmp_path / "peft"),
        *("--format", "peft", "--out", tmp_path / "out"),
    )
    before = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    after = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert before.keys() == after.keys() == {"prompt_embeddings"}
    np.testing.assert_array_equal(*(t["prompt_embeddings"] for t in (before, after)))
    old, new = (
        json.loads((tmp_path / d / "adapter_config.json").read_text())
        for d in ("peft", "out")
    )
    for field in ("num_virtual_tokens", "num_layers", "token_dim", "peft_type"):
        assert old[field] == new[field], field
    # And scores are peft's.
    records = synthetic.feedback_records(2, seed=3)
    data = synthetic.write_jsonl(tmp_path / "data.jsonl", records)
    run(
        *("score", "--model", tiny_llama, "--adapter", tmp_path / "out"),
        *("--data", data, "--out", tmp_path / "scores.jsonl"),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        base = model_scenes.torch_model(tiny_llama)
        peft = PeftModel.from_pretrained(base, tmp_path / "peft").eval()
    want = model_scenes.torch_logps(peft, model_scenes.dataset(tiny_llama, 2, seed=3))
    scores = (tmp_path / "scores.jsonl").read_text().splitlines()
    lines = [json.loads(line) for line in scores]
    found = sorted(
        line[side]["logp"] for line in lines for side in ("chosen", "rejected")
    )
    np.testing.assert_allclose(
        found, sorted(values.sum() for values in want.values()), atol=1e-3
    )


def test_training_goes_on_from_an_adapter(tiny_llama, tmp_path, capsys) -> None:
    made = scenes.adapted(tiny_llama, HLPTConfig(rank=2, prefix_length=3))
    start = adapter_files.save_adapter(
        made.checkpoint, made.collections, tmp_path / "start"
    )
    data = synthetic.write_jsonl(
        tmp_path / "data.jsonl", synthetic.feedback_records(6, seed=1)
    )
    flags = [
        *("train", "--model", tiny_llama, "--data", data, "--out", tmp_path / "run"),
        *("--adapter.name", "peft", "--adapter.path", start, "--max_steps", "1"),
        *("--row_length", "512", "--batch_rows", "1", "--report_to", "none"),
        *("--optimizer.learning_rate", "0.01", "--optimizer.gate_learning_rate", "0"),
    ]
    run(*flags)
    run(
        "export", "--run", tmp_path / "run", "--format", "peft", "--out", tmp_path / "o"
    )
    before, after = (
        load_file(d / "prefix" / "prefix.safetensors") for d in (start, tmp_path / "o")
    )
    assert before.keys() == after.keys()
    for name, value in before.items():
        same = np.array_equal(value, after[name])
        assert same == name.endswith("token_gate"), name
    card = (tmp_path / "o" / "README.md").read_text()
    assert "jaxalign_torch_loader" in card and str(tmp_path) not in card
    # Another adapter is another run.
    made = made._replace(collections=scenes.shaken(made.collections, seed=5))
    shutil.rmtree(start)
    adapter_files.save_adapter(made.checkpoint, made.collections, start)
    with pytest.raises(SystemExit, match="2"):
        main([str(flag) for flag in flags])
    assert "the adapter has changed since" in capsys.readouterr().err


def test_a_run_keeps_the_constants_of_its_adapter(tiny_llama, tmp_path) -> None:
    """PiSSA's part of the weights is not made anew, in another dtype, from the base."""
    records = synthetic.feedback_records(4, seed=2)
    data = synthetic.write_jsonl(tmp_path / "data.jsonl", records)
    run(
        *("train", "--model", tiny_llama, "--data", data, "--out", tmp_path / "run"),
        *("--max_steps", "1", "--row_length", "512", "--batch_rows", "1"),
        *("--report_to", "none", "--optimizer.learning_rate", "0"),
        *("--adapter.init", "pissa", "--adapter.rank", "2", "--dtype", "bfloat16"),
    )
    restored = open_run(tmp_path / "run", dtype=np.float32)
    start = adapter_files.read_start(tmp_path / "run" / "adapter_start.safetensors")
    jax.tree.map(
        np.testing.assert_array_equal, start["lora"], restored.variables["lora"]
    )
    run(
        *("score", "--model", tiny_llama, "--adapter", tmp_path / "run"),
        *("--data", data, "--out", tmp_path / "scores.jsonl"),
    )
    for line in (tmp_path / "scores.jsonl").read_text().splitlines():
        side = json.loads(line)["chosen"]
        assert side["logp"] == pytest.approx(side["ref_logp"], abs=1e-2)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_an_adapter_of_a_head_as_peft_saves_it(make_llama, tmp_path) -> None:
    """With the base's head beside it, which PEFT adds."""
    from peft import LoraConfig, get_peft_model

    directory = make_llama()
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["lm_head"])
    model = get_peft_model(model_scenes.torch_model(directory), config)
    model.save_pretrained(tmp_path / "a", save_embedding_layers=True)
    path = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(path)
    extra = [name for name in tensors if name.endswith("base_layer.weight")]
    assert len(extra) == 1
    restored = open_policy(str(directory), str(tmp_path / "a"))
    assert trees.paths(restored.variables["lora"]) == [
        f"lm_head/{leaf}" for leaf in ("a", "b", "scale")
    ]
    # PEFT puts one that is not the base's into its place.
    tensors[extra[0]] = tensors[extra[0]] + 1
    save_file(tensors, path)
    changed = open_policy(str(directory), str(tmp_path / "a")).variables
    np.testing.assert_array_equal(
        changed["saved"]["lm_head"]["kernel"], tensors[extra[0]].T
    )


def test_runs_and_nothing_are_no_adapters(tiny_llama, tmp_path) -> None:
    checkpoint = scenes.load(tiny_llama, LoRAConfig())
    with pytest.raises(UserError, match="there is no adapter to write"):
        adapter_files.save_adapter(checkpoint, checkpoint.variables, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    (tmp_path / "config.yaml").write_text("model: x")
    with pytest.raises(UserError, match="is a run, not an adapter: write its adapter"):
        adapter_files.AdapterFiles(tmp_path, tiny_llama)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize(
    "flags",
    [
        ["hlpt"],
        ["h2lpt", "--adapter.gate", "sequence", "--adapter.prefix_layers", "1-2"],
        ["hlpt", "--adapter.mode", "separate", "--adapter.gate", "static"],
    ],
    ids=["hlpt", "h2lpt", "separate"],
)
def test_torch_users_get_what_score_says(tiny_llama, tmp_path, flags) -> None:
    """Train, score and export on the command line, then load in transformers."""

    from jaxalign.adapters import torch_loader

    records = synthetic.feedback_records(4, seed=2)
    data = synthetic.write_jsonl(tmp_path / "data.jsonl", records)
    run(
        *("train", "--model", tiny_llama, "--data", data, "--out", tmp_path / "run"),
        *("--max_steps", "2", "--row_length", "512", "--batch_rows", "1"),
        *("--report_to", "none", "--optimizer.learning_rate", "0.1"),
        *("--optimizer.schedule", "constant", "--adapter.name", *flags),
    )
    run(
        "export", "--run", tmp_path / "run", "--format", "peft", "--out", tmp_path / "a"
    )
    found = {}
    for name in ("run", "a"):
        out = tmp_path / f"{name}.jsonl"
        run(
            *("score", "--model", tiny_llama, "--adapter", tmp_path / name),
            *("--data", data, "--out", out, "--token_logps", "true"),
        )
        found[name] = [json.loads(line) for line in out.read_text().splitlines()]
    base = model_scenes.torch_model(tiny_llama)
    loaded = torch_loader.load(base, tmp_path / "a").eval()
    want = model_scenes.torch_logps(loaded, model_scenes.dataset(tiny_llama, 4, seed=2))
    want = {(*key[key.index(-1) + 1 :],): values for key, values in want.items()}
    for index in range(4):
        for side, name in enumerate(("chosen", "rejected")):
            run_side, peft_side = (found[k][index][name] for k in ("run", "a"))
            key = (side, *run_side["token_ids"])
            np.testing.assert_allclose(run_side["token_logps"], want[key], atol=1e-4)
            np.testing.assert_allclose(peft_side["token_logps"], want[key], atol=1e-4)
            moved = np.subtract(run_side["token_logps"], run_side["ref_token_logps"])
            assert np.abs(moved).max() > 0.01


@pytest.mark.parametrize(
    ("config", "match"),
    [
        (HLPTConfig(rank=2, prefix_length=3), "has a prefix, which cannot be merged"),
        (LoRAConfig(rank=2, gate="sequence"), "has a sequence_gate, which depends on"),
    ],
)
def test_what_cannot_be_merged_is_refused(
    tiny_llama, tmp_path, capsys, config, match
) -> None:
    made = scenes.adapted(tiny_llama, config)
    adapter_files.save_adapter(made.checkpoint, made.collections, tmp_path / "a")
    with pytest.raises(SystemExit, match="2"):
        main(
            [
                *("export", "--model", str(tiny_llama), "--out", str(tmp_path / "out")),
                *("--adapter", str(tmp_path / "a"), "--format", "merged"),
            ]
        )
    assert match in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"a"}


def test_tied_embeddings_are_not_merged(make_llama, tmp_path) -> None:
    directory = make_llama(tie_word_embeddings=True)
    made = scenes.adapted(directory, LoRAConfig(rank=2, targets=("embed_tokens",)))
    from jaxalign.checkpoints import export

    with pytest.raises(UserError, match="changes the embeddings, but not the head"):
        export.save_hf(made.variables, tmp_path / "out", like=made.checkpoint)
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def saved(tiny_llama, tmp_path_factory) -> Path:
    config = HLPTConfig(rank=2, prefix_length=3, layers="0", prefix_layers="1-2")
    made = scenes.adapted(tiny_llama, config)
    out = tmp_path_factory.mktemp("adapter") / "a"
    return adapter_files.save_adapter(made.checkpoint, made.collections, out)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: t.pop("layers.2.key"), "prefix of layer 2 has .* as other layers"),
        (
            lambda t: t.update({"layers.9.key": t["layers.2.key"]}),
            "layer 9, but the mod",
        ),
        (
            lambda t: t.update({"layers.2.key": t["layers.2.key"][:1]}),
            r"layers.2.key has the shape \[1, 3, 16\]: expected \[2, 3, 16\]",
        ),
        (
            lambda t: t.update({"layers.1.token_gate": np.ones(41, np.float32)}),
            r"token_gate has the shape \[41\]: expected \[40\]",
        ),
        (lambda t: t.update({"layer.1.key": t["layers.1.key"]}), "is not understood"),
        (
            lambda t: [t.pop(n) for n in list(t) if "value" in n],
            "needs keys and values",
        ),
    ],
)
def test_broken_prefixes_are_refused(
    tiny_llama, saved, tmp_path, change, match
) -> None:
    adapter = shutil.copytree(saved, tmp_path / "a")
    tensors = load_file(adapter / "prefix" / "prefix.safetensors")
    change(tensors)
    save_file(tensors, adapter / "prefix" / "prefix.safetensors")
    with pytest.raises(UserError, match=match):
        adapter_files.AdapterFiles(adapter, tiny_llama).collections()


def test_other_broken_adapters_are_refused(tiny_llama, saved, tmp_path) -> None:
    adapter = shutil.copytree(saved, tmp_path / "a")
    config = adapter / "prefix" / "prefix_config.json"
    config.write_text(json.dumps({"position": "here"}))
    with pytest.raises(UserError, match="position must be a number: got 'here'"):
        adapter_files.AdapterFiles(adapter, tiny_llama).collections()
    shutil.rmtree(adapter / "prefix")
    gate = {"model.layers.2.mlp.down_proj.token_gate": np.ones(56, np.float32)}
    save_file(gate, adapter / "lora" / "gates.safetensors")
    with pytest.raises(UserError, match="is of no layer that the adapter adapts"):
        adapter_files.AdapterFiles(adapter, tiny_llama).collections()
    gate = {"model.layers.0.mlp.down_proj.token_gate": np.ones(5, np.float32)}
    save_file(gate, adapter / "lora" / "gates.safetensors")
    with pytest.raises(
        UserError, match=r"token_gate of .* shape \[5\]: expected \[56\]"
    ):
        adapter_files.AdapterFiles(adapter, tiny_llama).collections()
    with pytest.raises(UserError, match="is no adapter: expected a PEFT directory"):
        adapter_files.AdapterFiles(tmp_path, tiny_llama)


def test_a_prefix_on_sliding_windows_is_not_left_to_peft(tmp_path) -> None:
    """PEFT's would fall out of the window; the loader's is seen by every token."""
    import torch

    from jaxalign.adapters import torch_loader

    directory = synthetic.make_checkpoint(
        tmp_path / "base", "mistral", sliding_window=9
    )
    made = scenes.adapted(directory, PrefixConfig(prefix_length=3))
    out = adapter_files.save_adapter(
        made.checkpoint, made.collections, tmp_path / "prefix"
    )
    assert (out / "prefix").is_dir() and not (out / "adapter_config.json").exists()
    tokens = np.random.default_rng(0).integers(5, 200, (1, 30))
    model = torch_loader.load(model_scenes.torch_model(directory), out)
    with torch.no_grad():
        got = model(torch.from_numpy(tokens)).logits.numpy()
    want = scenes.logits(made, scenes.one_sequence(tokens))
    np.testing.assert_allclose(got, want, atol=1e-4)
    # And one that PEFT made is not taken for what it is not.
    stock = tmp_path / "stock"
    stock.mkdir()
    config = {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 3}
    (stock / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="sliding windows, which such a prefix"):
        adapter_files.AdapterFiles(stock, str(directory))
