"""What PEFT trains beside LoRA (heads, norms, biases, tokens), in and out of files."""

import json
import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxalign import trees
from jaxalign.adapters import peft_names
from jaxalign.adapters.lora import LoRAConfig
from jaxalign.checkpoints import adapter_files, export
from jaxalign.checkpoints import load as load_lib
from jaxalign.checkpoints.policy import Policy, open_policy
from jaxalign.cli.main import main
from jaxalign.data.tokenizer import load_tokenizer
from jaxalign.errors import UserError
from tests import scenes as model_scenes
from tests import synthetic
from tests.adapters import scenes


pytestmark = pytest.mark.filterwarnings(
    "ignore:.*is_gradient_checkpointing:FutureWarning"
)

TOKENS = np.random.default_rng(0).integers(4, 200, (2, 17))


def run(*arguments: Any) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([str(argument) for argument in arguments])


def make_base(directory: Path, *, tied: bool, **options: Any) -> Path:
    """Qwen2 has biases on queries, keys and values, and none elsewhere."""
    return synthetic.make_checkpoint(
        directory, "qwen2", tie_word_embeddings=tied, **options
    )


def make_adapter(base: Path, out: Path, *, seed: int = 0, **options: Any) -> Path:
    """Have PEFT save an adapter of which every trained number is random."""
    import torch
    from peft import LoraConfig, get_peft_model

    options = {"target_modules": ["q_proj", "v_proj"], "r": 2, **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(
            model_scenes.torch_model(base),
            LoraConfig(task_type="CAUSAL_LM", lora_alpha=3, **options),
        )
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    noise = torch.randn(parameter.shape, generator=generator)
                    parameter += 0.2 * noise
        model.save_pretrained(out)
    return out


def peft_logps(base: Path, adapter: Path) -> np.ndarray:
    """Return the log-probabilities of every next token by PEFT."""
    import torch
    from peft import PeftModel

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(model_scenes.torch_model(base), adapter)
        logits = model.eval()(torch.from_numpy(TOKENS)).logits.double()
    return torch.log_softmax(logits, -1).numpy()


def own_logps(policy: Policy, variables: Any = None) -> np.ndarray:
    inputs = scenes.one_sequence(TOKENS)
    collections = policy.variables if variables is None else variables
    made = scenes.Adapted(policy.checkpoint, collections)
    return np.asarray(jax.nn.log_softmax(scenes.logits(made, inputs)))


CASES: dict[str, dict[str, Any]] = {
    "head": {"modules_to_save": ["lm_head"]},
    "embeddings": {"modules_to_save": ["embed_tokens"]},
    "both": {"modules_to_save": ["lm_head", "embed_tokens"]},
    "tied together": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "norms": {"modules_to_save": ["model.norm", "input_layernorm"]},
    "mlps": {"modules_to_save": ["mlp"]},
    "some layers": {
        "modules_to_save": ["layers.1.mlp.up_proj", "layers.1.self_attn.k_proj"]
    },
    "tokens": {"trainable_token_indices": [7, 3, 100]},
    "tokens of both": {
        "trainable_token_indices": {"embed_tokens": [3, 7], "lm_head": [9, 2, 30]}
    },
    "tokens of both alike": {
        "trainable_token_indices": {"embed_tokens": [3, 7], "lm_head": [3, 7]}
    },
    "tokens of the head": {"trainable_token_indices": {"lm_head": [5]}},
    "all biases": {"bias": "all"},
    "LoRA's biases": {"bias": "lora_only"},
    "biases of B": {"lora_bias": True},
    "much": {
        "modules_to_save": ["model.norm"],
        "trainable_token_indices": [3, 7],
        "bias": "all",
        "lora_bias": True,
        "layers_to_transform": [0, 2],
    },
}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", CASES)
def test_numbers_are_pefts_in_and_out(tmp_path, name, tied) -> None:
    base = make_base(tmp_path / "base", tied=tied)
    adapter = make_adapter(base, tmp_path / "adapter", **CASES[name])
    policy = open_policy(str(base), str(adapter))
    want = peft_logps(base, adapter)
    np.testing.assert_allclose(own_logps(policy), want, atol=1e-4)
    off = own_logps(policy, policy.base)
    assert np.abs(off - want).max() > 0.1
    again = adapter_files.save_adapter(
        policy.checkpoint, policy.variables, tmp_path / "again"
    )
    np.testing.assert_allclose(peft_logps(base, again), want, atol=1e-5)
    before, after = (
        load_file(d / "adapter_model.safetensors") for d in (adapter, again)
    )
    assert before.keys() == after.keys()
    for key, value in before.items():
        np.testing.assert_array_equal(value, after[key], err_msg=key)
    old, new = (
        json.loads((d / "adapter_config.json").read_text()) for d in (adapter, again)
    )
    for field in ("lora_bias", "bias"):
        assert (old[field] or False) == new.get(field, False), field
    for field in ("modules_to_save", "trainable_token_indices"):
        assert bool(old[field]) == bool(new.get(field)), field


@pytest.mark.parametrize(
    ("name", "tied"),
    [
        ("both", False),
        ("norms", True),
        ("tokens", True),
        ("tokens of both", False),
        ("all biases", True),
        ("mlps", False),
    ],
)
def test_merged_weights_are_pefts(tmp_path, name, tied) -> None:
    base = make_base(tmp_path / "base", tied=tied)
    adapter = make_adapter(base, tmp_path / "adapter", **CASES[name])
    run(
        *("export", "--model", base, "--adapter", adapter),
        *("--out", tmp_path / "merged"),
    )
    merged = open_policy(str(tmp_path / "merged"))
    np.testing.assert_allclose(own_logps(merged), peft_logps(base, adapter), atol=1e-4)


@pytest.mark.parametrize(
    ("case", "tied", "match"),
    [
        ("embeddings", True, "config.json ties the two"),
        ("head", True, "config.json ties the two"),
        ("tokens of the head", True, "config.json ties the two"),
    ],
)
def test_what_would_untie_is_not_merged(tmp_path, case, tied, match) -> None:
    base = make_base(tmp_path / "base", tied=tied)
    adapter = make_adapter(base, tmp_path / "adapter", **CASES[case])
    policy = open_policy(str(base), str(adapter))
    with pytest.raises(UserError, match=match):
        export.save_hf(policy.variables, tmp_path / "out", like=policy.checkpoint)
    assert not (tmp_path / "out").exists()


def test_biases_of_b_need_biases_to_be_merged(tmp_path) -> None:
    base = make_base(tmp_path / "base", tied=False)
    for name, targets in (("good", ["q_proj"]), ("bad", ["q_proj", "o_proj"])):
        adapter = make_adapter(
            base, tmp_path / name, target_modules=targets, lora_bias=True
        )
        policy = open_policy(str(base), str(adapter))
        np.testing.assert_allclose(
            own_logps(policy), peft_logps(base, adapter), atol=1e-4
        )
        out = tmp_path / f"merged {name}"
        if name == "bad":
            with pytest.raises(UserError, match="biases .lora_bias. on layers"):
                export.save_hf(policy.variables, out, like=policy.checkpoint)
            continue
        export.save_hf(policy.variables, out, like=policy.checkpoint)
        merged = own_logps(open_policy(str(out)))
        np.testing.assert_allclose(merged, peft_logps(base, adapter), atol=1e-4)


def rename(adapter: Path, change: Any) -> None:
    path = adapter / "adapter_model.safetensors"
    tensors = {change(name): value for name, value in load_file(path).items()}
    save_file(tensors, path)


def with_adapter_name(name: str) -> str:
    """As ``state_dict`` has it, which some save as it is."""
    for part in ("lora_A", "lora_B"):
        name = name.replace(f".{part}.", f".{part}.default.")
    name = name.replace("lm_head.weight", "lm_head.modules_to_save.default.weight")
    return name.replace("tokens_delta", "tokens_delta.default")


@pytest.mark.parametrize(
    "case",
    [
        {"modules_to_save": ["lm_head"], "lora_bias": True},
        {"trainable_token_indices": [3, 9]},
    ],
    ids=["head", "tokens"],
)
def test_keys_with_an_adapters_name(tmp_path, case) -> None:
    base = make_base(tmp_path / "base", tied=False)
    adapter = make_adapter(base, tmp_path / "adapter", **case)
    want = own_logps(open_policy(str(base), str(adapter)))
    rename(adapter, with_adapter_name)
    names = load_file(adapter / "adapter_model.safetensors")
    assert sum(".default" in name for name in names) > 12
    np.testing.assert_array_equal(own_logps(open_policy(str(base), str(adapter))), want)


def test_an_adapter_in_several_files(tmp_path) -> None:
    base = make_base(tmp_path / "base", tied=False)
    adapter = make_adapter(base, tmp_path / "adapter", **CASES["both"])
    want = own_logps(open_policy(str(base), str(adapter)))
    whole = adapter / "adapter_model.safetensors"
    tensors = load_file(whole)
    whole.unlink()
    names = sorted(tensors)
    index = {}
    for part, chosen in enumerate((names[::2], names[1::2]), 1):
        file = f"adapter_model-{part:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in chosen}, adapter / file)
        index |= dict.fromkeys(chosen, file)
    text = json.dumps({"metadata": {}, "weight_map": index})
    (adapter / "adapter_model.safetensors.index.json").write_text(text)
    np.testing.assert_array_equal(own_logps(open_policy(str(base), str(adapter))), want)
    (adapter / "adapter_model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match="00002-of-00002.safetensors is missing, but"):
        open_policy(str(base), str(adapter))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_copies_of_the_base_are_left_aside(tmp_path, capsys, tied) -> None:
    """And what was trained in their place is not: PEFT puts it into the base."""
    base = make_base(tmp_path / "base", tied=tied)
    adapter = make_adapter(base, tmp_path / "adapter")
    path, prefix = adapter / "adapter_model.safetensors", "base_model.model."
    tensors = load_file(path)
    own = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    name = f"{prefix}model.embed_tokens.weight"
    save_file({**tensors, name: own}, path)
    for _ in range(2):
        policy = open_policy(str(base), str(adapter))
    assert set(policy.variables) == {"params", "lora"}
    assert capsys.readouterr().err.count("1 tensor(s) are copies of the base") == 1
    np.testing.assert_allclose(own_logps(policy), peft_logps(base, adapter), atol=1e-4)
    save_file({**tensors, name: own[::-1].copy()}, path)
    policy = open_policy(str(base), str(adapter))
    np.testing.assert_allclose(own_logps(policy), peft_logps(base, adapter), atol=1e-4)
    assert ("lm_head" in policy.variables["saved"]) == tied


def test_a_resized_vocabulary_is_named(tmp_path) -> None:
    """PEFT saves embeddings and head by itself where they were resized [peft #1457]."""
    from peft import LoraConfig, get_peft_model

    base = make_base(tmp_path / "base", tied=False)
    model = model_scenes.torch_model(base)
    rows = model.get_input_embeddings().weight.shape[0]
    model.resize_token_embeddings(rows + 2, mean_resizing=False)
    model.save_pretrained(tmp_path / "resized")
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    names = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert "base_model.model.lm_head.weight" in names
    match = rf"saved in the shape \[.*{rows + 2}.*vocabulary was resized .* merge_and"
    with pytest.raises(UserError, match=match):
        open_policy(str(base), str(tmp_path / "adapter"))
    # On the base that was resized it is an adapter like any other.
    policy = open_policy(str(tmp_path / "resized"), str(tmp_path / "adapter"))
    assert set(policy.variables) == {"params", "lora"}


def settings(adapter: Path, **changes: Any) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"peft_type": "LOHA"}, r"peft_type 'LOHA' is not supp(.|\n)*merge_and_unload"),
        ({"peft_type": "IA3"}, r"peft_type 'IA3' is not supp(.|\n)*from_pretrained"),
        ({"peft_type": "P_TUNING"}, "'P_TUNING' .* PEFT cannot merge it"),
        ({"modules_to_save": 3}, "modules_to_save must be a list of names: got 3"),
        ({"bias": "most"}, "bias must be none, all or lora_only: got 'most'"),
        ({"trainable_token_indices": [1]}, r"shape \[2, 40\]: expected \[1, 40\]"),
        ({"trainable_token_indices": [1, 999]}, r"from 0 to 295: got \[1, 999\]"),
        ({"trainable_token_indices": [4, 4]}, r"different tokens .* got \[4, 4\]"),
        ({"trainable_token_indices": None}, "trainable_token_indices of model.embed"),
        ({"lora_bias": True}, "lacks its bias lora_B.bias"),
    ],
)
def test_broken_configs_are_named(tmp_path, changes, match) -> None:
    base = make_base(tmp_path / "base", tied=False)
    adapter = make_adapter(
        base, tmp_path / "adapter", trainable_token_indices=[3, 7], bias="none"
    )
    settings(adapter, **changes)
    with pytest.raises(UserError, match=match):
        open_policy(str(base), str(adapter))


def test_two_adapters_in_a_file_and_foreign_tensors(tmp_path) -> None:
    base = make_base(tmp_path / "base", tied=False)
    adapter = make_adapter(base, tmp_path / "adapter")
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    twice = {n.replace("lora_A.", "lora_A.second."): v for n, v in tensors.items()}
    save_file({**tensors, **twice}, path)
    with pytest.raises(UserError, match="twice, under two adapters' names"):
        open_policy(str(base), str(adapter))
    alien = {"base_model.model.model.vision.weight": np.ones((2, 2), np.float32)}
    save_file({**tensors, **alien}, path)
    with pytest.raises(UserError, match="vision.weight is neither a LoRA factor nor"):
        open_policy(str(base), str(adapter))
    save_file({**tensors, "scale": np.ones(2, np.float32)}, path)
    with pytest.raises(UserError, match="'scale' is not understood: expected names"):
        open_policy(str(base), str(adapter))


def test_names_are_sorted() -> None:
    names = {
        "x.q_proj.lora_A.default.weight": ("lora", "x.q_proj.lora_A.weight"),
        "x.q_proj.lora_B.weight": ("lora", "x.q_proj.lora_B.weight"),
        "x.q_proj.lora_B.bias": ("lora", "x.q_proj.lora_B.bias"),
        "x.q_proj.lora_B.mine.bias": ("lora", "x.q_proj.lora_B.bias"),
        "x.q_proj.lora_magnitude_vector.default.weight": (
            "lora",
            "x.q_proj.lora_magnitude_vector",
        ),
        "e.lora_embedding_A.default": ("lora", "e.lora_embedding_A"),
        "x.q_proj.base_layer.bias": ("saved", "x.q_proj.bias"),
        "x.q_proj.base_layer.weight": ("copies", "x.q_proj.weight"),
        "lm_head.weight": ("saved", "lm_head.weight"),
        "lm_head.original_module.weight": ("copies", "lm_head.weight"),
        "n.modules_to_save.default.weight": ("saved", "n.weight"),
        "e.token_adapter.trainable_tokens_delta": ("rows", "e"),
        "e.token_adapter.base_layer.weight": ("copies", "e.weight"),
    }
    for name, (kind, key) in names.items():
        config: dict[str, Any] = {"bias": "lora_only"}
        if name == "lm_head.weight":
            config["modules_to_save"] = ["lm_head"]
        found = peft_names.sort({f"base_model.model.{name}": np.zeros(1)}, config)
        wanted = f"base_model.model.{key}" if kind == "lora" else key
        assert [list(getattr(found, k)) for k in found._fields] == [
            [wanted] if k == kind else [] for k in found._fields
        ], name


def test_training_goes_on_from_them(tmp_path) -> None:
    """As PEFT would: what was saved trains too, and comes out again."""
    base = make_base(tmp_path / "base", tied=True)
    adapter = make_adapter(base, tmp_path / "adapter", **CASES["much"])
    data = synthetic.write_jsonl(
        tmp_path / "data.jsonl", synthetic.feedback_records(4, seed=1)
    )
    out = tmp_path / "run"
    run(
        *("train", "--model", base, "--data", data, "--out", out),
        *("--adapter.name", "peft", "--adapter.path", adapter, "--max_steps", "2"),
        *("--row_length", "512", "--batch_rows", "1", "--report_to", "none"),
        *("--optimizer.learning_rate", "0.01", "--objective.name", "dpo"),
    )
    steps = [json.loads(x) for x in (out / "metrics.jsonl").read_text().splitlines()]
    assert steps[0]["loss"] != pytest.approx(np.log(2), abs=1e-3)
    run("export", "--run", out, "--format", "peft", "--out", tmp_path / "out")
    before, after = (
        load_file(tmp_path / name / "adapter_model.safetensors")
        for name in ("adapter", "out")
    )
    assert before.keys() == after.keys()
    for name, value in before.items():
        moved = np.abs(value - after[name]).max()
        assert 0 < moved < 0.1, name
    policy = open_policy(str(base), str(tmp_path / "out"))
    np.testing.assert_allclose(
        own_logps(policy), peft_logps(base, tmp_path / "out"), atol=1e-4
    )
    again = open_policy(str(base), str(out))
    np.testing.assert_allclose(own_logps(again), own_logps(policy), atol=1e-5)
    assert load_lib.open_config(base)[0].text.tie_embeddings
    assert trees.paths(again.variables["saved"]) == trees.paths(
        policy.variables["saved"]
    )


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_our_own_runs_train_modules_whole(tmp_path, tied) -> None:
    """Beside LoRA, as TRL's users do; the base stays the reference."""
    base = make_base(tmp_path / "base", tied=tied)
    data = synthetic.write_jsonl(
        tmp_path / "data.jsonl", synthetic.feedback_records(4, seed=1)
    )
    out = tmp_path / "run"
    run(
        *("train", "--model", base, "--data", data, "--out", out, "--max_steps", "2"),
        *("--adapter.modules_to_save", "[lm_head,norm,.*_layernorm]"),
        *("--adapter.rank", "2", "--row_length", "512", "--batch_rows", "1"),
        *("--report_to", "none", "--optimizer.learning_rate", "0.01"),
        *("--objective.name", "dpo", "--logging_steps", "1"),
    )
    steps = [json.loads(x) for x in (out / "metrics.jsonl").read_text().splitlines()]
    losses = [step["loss"] for step in steps if "loss" in step]
    assert losses[0] == pytest.approx(np.log(2), abs=1e-5) and losses[1] < losses[0]
    run("export", "--run", out, "--format", "peft", "--out", tmp_path / "out")
    policy = open_policy(str(base), str(out))
    want = peft_logps(base, tmp_path / "out")
    np.testing.assert_allclose(own_logps(policy), want, atol=1e-4)
    plain = own_logps(open_policy(str(base)))
    np.testing.assert_array_equal(own_logps(policy, policy.base), plain)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert {"lm_head", "model.norm"} < set(config["modules_to_save"])
    stored = load_file(tmp_path / "out" / "adapter_model.safetensors")
    head = "model.embed_tokens.weight" if tied else "lm_head.weight"
    before = load_file(base / "model.safetensors")[head]
    moved = stored["base_model.model.lm_head.weight"] - before
    assert 0 < np.abs(moved).max() < 0.1


@pytest.mark.parametrize(
    ("modules", "match"),
    [
        (("lm_heads",), "'lm_heads' is no module of this model .* lm_head"),
        (("(",), "adapter.modules_to_save: '\\(' is not a regular expression"),
        (("mlp/.*",), "trains mlp/.*_proj whole, and adapter.targets adapts it"),
    ],
)
def test_modules_that_cannot_be_trained_whole(tmp_path, modules, match) -> None:
    base = make_base(tmp_path / "base", tied=False)
    with pytest.raises(UserError, match=match):
        scenes.adapted(base, LoRAConfig(modules_to_save=modules))


def test_modules_of_a_quantised_base_are_trained_whole(tmp_path) -> None:
    base = make_base(tmp_path / "base", tied=False)
    config = LoRAConfig(targets=("q_proj",), modules_to_save=("up_proj", "lm_head"))
    made = scenes.adapted(base, config, size=0.0, quantize="int8")
    own = made.collections["saved"]["layers_0_3"]["mlp"]["up_proj"]["kernel"]
    codes = made.checkpoint.variables["params"]["layers_0_3"]["mlp"]["up_proj"]
    np.testing.assert_array_equal(own, codes["kernel"].astype(np.float32))
    inputs = scenes.one_sequence(TOKENS)
    off = scenes.Adapted(made.checkpoint, {})
    np.testing.assert_allclose(
        scenes.logits(made, inputs), scenes.logits(off, inputs), atol=1e-4
    )


def test_generation_uses_them(tmp_path) -> None:
    """Cut layer by layer, against a cache: PEFT's most probable tokens."""
    import torch
    from peft import PeftModel

    base = make_base(tmp_path / "base", tied=True)
    adapter = make_adapter(base, tmp_path / "adapter", **CASES["much"])
    prompt = {"prompt": [{"role": "user", "content": "the answer is"}]}
    data = synthetic.write_jsonl(tmp_path / "prompts.jsonl", [prompt])
    out = tmp_path / "out.jsonl"
    run(
        *("generate", "--model", base, "--adapter", adapter, "--data", data),
        *("--out", out, "--max_new_tokens", "8", "--temperature", "0"),
        *("--batch_slots", "2"),
    )
    row = json.loads(out.read_text().splitlines()[0])
    tokenizer = load_tokenizer(str(base))
    ids = tokenizer.apply_chat_template(
        prompt["prompt"], add_generation_prompt=True, return_dict=False
    )
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(model_scenes.torch_model(base), adapter)
        for _ in range(8):
            logits = model.eval()(torch.tensor([ids])).logits
            ids.append(int(logits[0, -1].argmax()))
            if ids[-1] == tokenizer.eos_token_id:
                break
    text = tokenizer.decode(ids[-8:], skip_special_tokens=True)
    assert row["completions"][0]["text"] == text


def test_describe_counts_them(tmp_path, capsys) -> None:
    base = make_base(tmp_path / "base", tied=True)
    adapter = make_adapter(base, tmp_path / "adapter", modules_to_save=["lm_head"])
    flags = ("--adapter.name", "peft", "--adapter.path", adapter)
    run("describe", "--model", base, *flags, "--json")
    found = json.loads(capsys.readouterr().out)
    rows = load_file(base / "model.safetensors")["model.embed_tokens.weight"].size
    assert {g["name"]: g["saved"] for g in found["groups"]}["lm_head"] == rows
    assert found["trainable"] == rows + sum(g["lora"] for g in found["groups"])
    assert found["stored"] is None
    run("describe", "--model", base, *flags)
    assert " saved " in capsys.readouterr().out
