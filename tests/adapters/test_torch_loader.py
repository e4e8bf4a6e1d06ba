"""Adapters in PyTorch: the logits are the same, cached, padded and in beams too."""

import copy
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from jaxalign import trees
from jaxalign.adapters import adapter, torch_loader
from jaxalign.adapters.adapter import HLPTConfig, LoRAConfig
from jaxalign.checkpoints.load import Checkpoint, load
from jaxalign.types import ModelInputs
from tests import scenes


# PEFT 0.21 reads a property that transformers 5.23 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing")

LENGTH = 5
GROUPS = ((0, 1), (1, 2), (2, 3))
TOKENS = np.random.default_rng(0).integers(4, 200, (3, 11))

CACHE = scenes.cache_name()

SIZES = {"width": 40, "kv_heads": 2, "head_dim": 16}
SPREAD = {"a": 0.1, "b": 0.3, "mix": 0.7, "token_gate": 0.5, "sequence_gate": 0.5}


@pytest.fixture(scope="module")
def base(tiny_llama: Path) -> Checkpoint:
    return load(tiny_llama, groups=GROUPS, attention_implementation="dense")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that wait for each other cost more than these models do."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def random_adapter(base: Checkpoint, config: Any, seed: int = 0) -> Any:
    """Make an adapter all of whose parts matter."""
    params = base.variables["params"]
    shapes = jax.eval_shape(
        lambda key: adapter.init(key, params, config, num_layers=3, sizes=SIZES),
        jax.random.key(0),
    )
    rng = np.random.default_rng(seed)
    shifted = getattr(config, "positions", None) == "shifted"
    fixed = {"scale": 7 / 3, "position": -float(LENGTH) if shifted else 0.0}

    def fill(path: str, leaf: Any) -> Any:
        name = path.split("/")[-1]
        normal = SPREAD.get(name, 1.0) * rng.normal(size=leaf.shape)
        value = np.full(leaf.shape, fixed[name]) if name in fixed else normal
        return jnp.asarray(value, jnp.float32)

    return trees.map_with_paths(fill, shapes)


def hlpt(gate: str = "token", mode: str = "concat", **options: Any) -> HLPTConfig:
    """LoRA in layers 0 and 1, prefixes in 1 and 2."""
    settings = {
        "rank": 3,
        "alpha": 7.0,
        "targets": ("down_proj", "q_proj"),
        "layers": "0-1",
        "prefix_layers": "1-2",
        "prefix_length": LENGTH,
        "prefix_init": "normal",
        **options,
    }
    return HLPTConfig(gate=gate, mode=mode, **settings)


def walk(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Yield the Hugging Face name of every adapted module, and its leaves."""
    if "scale" in tree or "position" in tree:
        leaves = {name: np.asarray(value) for name, value in tree.items()}
        if len(path) == 1:
            yield path[0], leaves
            return
        low, high = map(int, path[0].split("_")[1:])
        for i in range(high - low):
            name = ".".join(("model.layers", str(low + i), *path[1:]))
            yield name, {leaf: np.array(value[i]) for leaf, value in leaves.items()}
        return
    for name, child in tree.items():
        yield from walk(child, (*path, name))


def write(directory: Path, collections: Any) -> Path:
    """Write the directory of an adapter."""
    if "lora" in collections:
        _write_lora(directory / "lora", dict(walk(collections["lora"])))
    if "prefix" in collections:
        _write_prefix(directory / "prefix", dict(walk(collections["prefix"])))
    return directory


def _write_lora(directory: Path, modules: dict[str, Any]) -> None:
    directory.mkdir(parents=True)
    tensors, gates = {}, {}
    for name, leaves in modules.items():
        rank = leaves["a"].shape[1]
        stem = f"base_model.model.{name}"
        folded = leaves["b"] * leaves.get("gate", np.float32(1))
        tensors[f"{stem}.lora_A.weight"] = leaves["a"].T.copy()
        tensors[f"{stem}.lora_B.weight"] = folded.T.copy()
        alpha = float(leaves["scale"]) * rank
        for kind in ("token_gate", "sequence_gate", "mean_gate"):
            if kind in leaves:
                gates[f"{name}.{kind}"] = leaves[kind]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted(modules),
        "inference_mode": True,
    }
    (directory / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "adapter_model.safetensors")
    if gates:
        save_file(gates, directory / "gates.safetensors")


def _write_prefix(directory: Path, modules: dict[str, Any]) -> None:
    directory.mkdir(parents=True)
    tensors = {}
    for name, leaves in modules.items():
        position = float(leaves.pop("position"))
        layer = name.removeprefix("model.").removesuffix(".self_attn")
        tensors |= {f"{layer}.{leaf}": value for leaf, value in leaves.items()}
    config = {
        "prefix_length": LENGTH,
        "position": position,
        "base_model_name_or_path": "base",
        "num_layers": 3,
    }
    (directory / "prefix_config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "prefix.safetensors")


@functools.cache
def jitted(model: Any) -> Any:
    def logits(variables: Any, inputs: ModelInputs) -> Any:
        return model.logits_fn(variables, model.hidden_fn(variables, inputs))

    quick = {"xla_backend_optimization_level": 0}  # most of the time is compilation
    return jax.jit(logits, compiler_options=quick)


def jax_logits(base: Checkpoint, collections: Any, tokens: np.ndarray) -> np.ndarray:
    """Return the logits of rows that are a sequence each."""
    rows, length = tokens.shape
    whole = np.zeros(TOKENS.shape, np.int32)  # one shape, to compile once
    whole[:rows, :length] = tokens
    ids = np.zeros_like(whole)
    ids[:rows, :length] = 1
    positions = np.zeros_like(whole) + np.arange(whole.shape[1], dtype=np.int32)
    inputs = ModelInputs(whole, positions, ids, np.zeros_like(whole))
    inputs = jax.tree.map(jnp.asarray, inputs)
    logits = jitted(base.model)({**base.variables, **collections}, inputs)
    return np.asarray(logits)[:rows, :length]


def torch_logits(model: Any, tokens: np.ndarray, **options: Any) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(tokens), **options).logits.float().numpy()


def loaded(base: Checkpoint, directory: Path) -> Any:
    return torch_loader.load(scenes.torch_model(base.path), directory).eval()


def assert_near(got: Any, want: Any, tolerance: float = 1e-4) -> None:
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance)


GATES = ("none", "static", "token", "sequence", "mean")


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("mode", ["concat", "separate"])
def test_logits_are_those_of_jax(base, tmp_path, mode, gate) -> None:
    """LoRA below and prefixes above, in one layer both; the prefix at both places."""
    found = {}
    for place in ("shifted", "unshifted"):
        config = hlpt(gate, mode, positions=place)
        collections = random_adapter(base, config)
        want = jax_logits(base, collections, TOKENS)
        model = loaded(base, write(tmp_path / place, collections))
        found[place] = torch_logits(model, TOKENS)
        assert_near(found[place], want)
        assert_near(torch_logits(model, TOKENS[1:2]), want[1:2])  # its own mean
    assert np.abs(found["shifted"] - found["unshifted"]).max() > 0.01


@pytest.mark.parametrize("part", ["lora", "prefix"])
def test_either_part_may_be_absent(base, tmp_path, part) -> None:
    collections = random_adapter(base, hlpt("sequence", "separate"))
    model = loaded(base, write(tmp_path / "out", {part: collections[part]}))
    found = torch_logits(model, TOKENS)
    idle = "mix" if part == "lora" else "b"  # of the other part, at 0 without effect

    def still(path: str, leaf: Any) -> Any:
        return leaf * 0 if path.endswith(f"/{idle}") else leaf

    alone = trees.map_with_paths(still, collections)
    assert_near(found, jax_logits(base, alone, TOKENS))
    both = jax_logits(base, collections, TOKENS)
    assert np.abs(found - both).max() > 0.1


def test_the_head_may_have_a_token_gate(base, tmp_path) -> None:
    config = LoRAConfig(rank=2, targets=("lm_head", "v_proj"), gate="token")
    collections = random_adapter(base, config)
    model = loaded(base, write(tmp_path / "out", collections))
    want = jax_logits(base, collections, TOKENS)
    assert_near(torch_logits(model, TOKENS), want)
    last = torch_logits(model, TOKENS, logits_to_keep=1)
    assert_near(last, want[:, -1:])


CACHED = [(mode, gate) for mode in ("concat", "separate") for gate in GATES[2:4]]


@pytest.mark.parametrize(("mode", "gate"), CACHED)
def test_a_cache_changes_nothing(base, tmp_path, mode, gate) -> None:
    collections = random_adapter(base, hlpt(gate, mode))
    model = loaded(base, write(tmp_path / "out", collections))
    prompt = torch.from_numpy(TOKENS[:, :4])
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    more = {"return_dict_in_generate": True, "output_logits": True}
    cached = model.generate(prompt, **options, **more)
    plain = model.generate(prompt, **options, **more, use_cache=False)
    static = model.generate(prompt, **options, **more, cache_implementation="static")
    assert torch.equal(cached.sequences, plain.sequences)
    assert torch.equal(static.sequences, plain.sequences)
    assert_near(torch.stack(cached.logits), torch.stack(plain.logits))
    whole = jax_logits(base, collections, plain.sequences[:, :-1].numpy())
    assert_near(torch.stack(cached.logits, 1), whole[:, 3:])


def test_a_mean_over_the_sequence_generates_without_cache(base, tmp_path) -> None:
    collections = random_adapter(base, hlpt("mean"))
    model = loaded(base, write(tmp_path / "out", collections))
    prompt = torch.from_numpy(TOKENS[:1, :4])
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    with pytest.raises(ValueError, match="use_cache=False"):
        model.generate(prompt, **options)
    out = model.generate(prompt, **options, use_cache=False).numpy()
    for end in (5, 6, 7):
        last = jax_logits(base, collections, out[:, : end - 1])[0, -1]
        assert last.argmax() == out[0, end - 1]


@pytest.mark.parametrize("mode", ["concat", "separate"])
@pytest.mark.parametrize("gate", GATES[2:])
def test_left_padding_changes_nothing(base, tmp_path, mode, gate) -> None:
    collections = random_adapter(base, hlpt(gate, mode))
    model = loaded(base, write(tmp_path / "out", collections))
    pads = (0, 3, 6)
    mask = np.stack([np.arange(11) >= pad for pad in pads]).astype(np.int64)
    padded = np.where(mask, TOKENS, 3)
    alone = [
        jax_logits(base, collections, TOKENS[i : i + 1, pad:])[0]
        for i, pad in enumerate(pads)
    ]
    got = torch_logits(model, padded, attention_mask=torch.from_numpy(mask))
    for row, want in zip(got, alone, strict=True):
        assert_near(row[-len(want) :], want)
    if gate == "mean":
        return
    rows = {"attention_mask": torch.from_numpy(mask)}
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    together = model.generate(torch.from_numpy(padded), **rows, **options)
    for i, pad in enumerate(pads):
        one = model.generate(torch.from_numpy(TOKENS[i : i + 1, pad:]), **options)
        assert torch.equal(together[i, 11:], one[0, 11 - pad :])


def test_beams_carry_their_history(base, tmp_path) -> None:
    collections = random_adapter(base, hlpt("sequence"))
    model = loaded(base, write(tmp_path / "out", collections))
    prompt = torch.from_numpy(TOKENS[:2, :4])
    options = {"num_beams": 4, "max_new_tokens": 8, "do_sample": False}
    more = {"return_dict_in_generate": True, "output_scores": True}
    cached = model.generate(prompt, **options, **more)
    plain = model.generate(prompt, **options, **more, use_cache=False)
    assert torch.equal(cached.sequences, plain.sequences)
    assert_near(cached.sequences_scores, plain.sequences_scores)


def test_a_cache_can_be_copied_and_cropped(base, tmp_path) -> None:
    collections = random_adapter(base, hlpt("sequence"))
    model = loaded(base, write(tmp_path / "out", collections))
    want = jax_logits(base, collections, TOKENS[:1])
    with torch.no_grad():
        cache = model(torch.from_numpy(TOKENS[:1, :6]))[CACHE]
        kept = copy.deepcopy(cache)
        for past in (cache, kept):
            got = torch_logits(model, TOKENS[:1, 6:], **{CACHE: past})
            assert_near(got, want[:, 6:])
        kept.crop(-7)
        got = torch_logits(model, TOKENS[:1, 4:], **{CACHE: kept})
        assert_near(got, want[:, 4:])
        foreign = scenes.torch_model(base.path)(torch.from_numpy(TOKENS[:1, :6]))
        with pytest.raises(ValueError, match="tokens seen: got .*expected"):
            torch_logits(model, TOKENS[:1, 6:], **{CACHE: foreign[CACHE]})


def test_tokens_that_only_a_mask_knows_are_refused(base, tmp_path) -> None:
    """So a cache that comes in some way unknown to the loader is not passed over."""
    model = loaded(base, write(tmp_path / "out", random_adapter(base, hlpt())))
    mask = torch.zeros(3, 1, 11, 13)
    with pytest.raises(ValueError, match="without a cache.*got 13, expected 11"):
        torch_logits(model, TOKENS, attention_mask=mask, use_cache=False)


def test_two_models_and_the_plain_one_do_not_disturb_each_other(base, tmp_path) -> None:
    plain = scenes.torch_model(base.path)
    both = [
        random_adapter(base, hlpt("sequence"), seed=1),
        random_adapter(base, hlpt("sequence", "separate"), seed=2),
    ]
    models = [loaded(base, write(tmp_path / str(i), c)) for i, c in enumerate(both)]
    wants = [jax_logits(base, c, TOKENS) for c in both]
    caches: list[Any] = [None, None]
    with torch.no_grad():
        for begin, end in ((0, 5), (5, 7), (7, 11)):
            for i, model in enumerate(models):
                part = torch.from_numpy(TOKENS[:, begin:end])
                out = model(part, **{CACHE: caches[i]})
                caches[i] = out[CACHE]
                assert_near(out.logits, wants[i][:, begin:end])
    assert_near(torch_logits(plain, TOKENS), jax_logits(base, {}, TOKENS))


def test_checkpointing_computes_the_same_again(base, tmp_path) -> None:
    """The second time only parts of a layer run, and not all of its hooks."""
    directory = write(tmp_path / "out", random_adapter(base, hlpt("sequence")))
    tokens, grads = torch.from_numpy(TOKENS), []
    mask = torch.from_numpy((np.arange(11) >= [[0], [3], [6]]).astype(np.int64))
    for checkpointing in (False, True):
        model = torch_loader.load(scenes.torch_model(base.path), directory).train()
        weight = model.get_input_embeddings().weight.requires_grad_()
        if checkpointing:
            model.base_model.model.activation_checkpointing_enable()
        out = model(tokens, attention_mask=mask, labels=tokens, use_cache=False)
        out.loss.backward()
        grads.append(weight.grad)
    assert_near(grads[1], grads[0], 1e-6)


def test_it_computes_in_half_precision_and_follows_the_model(base, tmp_path) -> None:
    collections = random_adapter(base, hlpt("sequence", "separate"))
    model = loaded(base, write(tmp_path / "out", collections)).to(torch.bfloat16)
    want = jax_logits(base, collections, TOKENS)
    assert np.abs(torch_logits(model, TOKENS) - want).mean() < 0.1 * want.std()


def test_an_adapter_that_reads_its_input_is_not_merged(base, tmp_path) -> None:
    collections = {"lora": random_adapter(base, hlpt("token"))["lora"]}
    model = loaded(base, write(tmp_path / "out", collections))
    with pytest.raises(ValueError, match="cannot be merged"):
        model.merge_and_unload()


def test_another_attention_is_refused_rather_than_used(base, tmp_path) -> None:
    collections = {"prefix": random_adapter(base, hlpt("token"))["prefix"]}
    model = loaded(base, write(tmp_path / "out", collections))
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="attention.*got sdpa, expected"):
        torch_logits(model, TOKENS)


def test_a_model_takes_one_adapter_only(base, tmp_path) -> None:
    collections = random_adapter(base, hlpt("token"))
    for i, part in enumerate(({"lora"}, {"prefix"}, {"lora", "prefix"})):
        mine = {name: collections[name] for name in part}
        directory = write(tmp_path / str(i), mine)
        model = scenes.torch_model(base.path)
        adapted = torch_loader.load(model, directory)
        for used in (model, adapted):
            with pytest.raises(ValueError, match="expected a base model"):
                torch_loader.load(used, directory)


def test_no_adapter(base, tmp_path) -> None:
    model = scenes.torch_model(base.path)
    with pytest.raises(ValueError, match="neither lora/ nor prefix/"):
        torch_loader.load(model, tmp_path)
    (tmp_path / "prefix").mkdir()
    with pytest.raises(ValueError, match="prefix.safetensors"):
        torch_loader.load(model, tmp_path)
    save_file({}, tmp_path / "prefix" / "prefix.safetensors")
    with pytest.raises(ValueError, match="prefix_config.json"):
        torch_loader.load(model, tmp_path)
    with pytest.raises(ValueError, match="got Linear, expected a model like Llama"):
        torch_loader.load(torch.nn.Linear(2, 2), tmp_path)


BROKEN = {
    "a layer too many": ("prefix/prefix", "layers.7.key", "layers.2.key", None),
    "an unknown leaf": ("prefix/prefix", "layers.2.bias", "layers.2.key", None),
    "no value": ("prefix/prefix", None, "layers.2.value", None),
    "a long prefix": ("prefix/prefix", "layers.2.key", "layers.2.key", (2, 6, 16)),
    "wide gate": (
        "prefix/prefix",
        "layers.2.token_gate",
        "layers.2.token_gate",
        (41,),
    ),
    "another layer": (
        "lora/adapter_model",
        "base_model.model.model.layers.9.mlp.down_proj.lora_A.weight",
        "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight",
        None,
    ),
    "wide A": (
        "lora/adapter_model",
        "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight",
        "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight",
        (3, 57),
    ),
    "wide B": (
        "lora/adapter_model",
        "base_model.model.model.layers.0.mlp.down_proj.lora_B.weight",
        "base_model.model.model.layers.0.mlp.down_proj.lora_B.weight",
        (41, 3),
    ),
    "a gate alone": (
        "lora/gates",
        "model.layers.2.mlp.down_proj.token_gate",
        "model.layers.0.mlp.down_proj.token_gate",
        None,
    ),
    "a narrow gate": (
        "lora/gates",
        "model.layers.0.mlp.down_proj.token_gate",
        "model.layers.0.mlp.down_proj.token_gate",
        (55,),
    ),
    "an unknown gate": (
        "lora/gates",
        "model.layers.0.mlp.down_proj.gate",
        "model.layers.0.mlp.down_proj.token_gate",
        None,
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_does_not_fit_is_refused_and_changes_nothing(base, tmp_path, case) -> None:
    from safetensors.numpy import load_file

    file, new, old, shape = BROKEN[case]
    directory = write(tmp_path / "out", random_adapter(base, hlpt("token")))
    path = directory / f"{file}.safetensors"
    tensors = load_file(path)
    tensor = tensors.pop(old)
    if new is not None:
        tensors[new] = tensor if shape is None else np.zeros(shape, np.float32)
    save_file(tensors, path)
    model = scenes.torch_model(base.path)
    before = torch_logits(model, TOKENS)
    with pytest.raises(ValueError, match="got .*expected"):
        torch_loader.load(model, directory)
    np.testing.assert_array_equal(torch_logits(model, TOKENS), before)
    assert not hasattr(model, "peft_config")


def test_a_prefix_for_another_depth_is_refused(base, tmp_path) -> None:
    directory = write(tmp_path / "out", random_adapter(base, hlpt("token")))
    path = directory / "prefix" / "prefix_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_layers": 4}))
    with pytest.raises(ValueError, match="num_layers: got 4, expected 3"):
        torch_loader.load(scenes.torch_model(base.path), directory)
