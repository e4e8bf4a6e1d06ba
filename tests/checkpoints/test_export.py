"""Checkpoints and adapters out, and PEFT adapters in, against transformers and peft."""

import functools
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxalign import trees
from jaxalign.adapters import adapter, lora
from jaxalign.checkpoints import adapter_files, export, runs
from jaxalign.checkpoints import load as load_lib
from jaxalign.checkpoints.policy import Policy, open_policy, open_run
from jaxalign.checkpoints.state import SavedState, StateStore
from jaxalign.cli.main import main
from jaxalign.errors import UserError
from jaxalign.parallel.mesh import make_mesh
from jaxalign.training import publish, run_directory
from jaxalign.training import step as step_lib
from jaxalign.training.config import NoAdapter, TrainConfig
from jaxalign.training.inputs import fingerprints
from jaxalign.training.optimizer import make_optimizer
from jaxalign.training.start import lay_out, load_start
from tests import scenes, synthetic
from tests.checkpoints.test_load import small_tensors, write


# peft 0.21 asks transformers 5.23 for it.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing")


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def run(*arguments: Any) -> None:
    """Run the command line; it must exit with 0."""
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    assert stop.value.code == 0


# --- untouched --------------------------------------------------------------------


def awkward(tensors: dict[str, np.ndarray], dtype: Any) -> dict[str, np.ndarray]:
    """Put numbers in that are easily lost: signed zeros, subnormals, infinities."""
    tensors = {name: value.astype(dtype) for name, value in tensors.items()}
    tiny = ml_dtypes.finfo(dtype).smallest_subnormal
    for name in ("model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"):
        tensors[name][1] = [-0.0, tiny, -3 * tiny, -np.inf]
    return tensors


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "mixed"])
@pytest.mark.parametrize("layout", ["single", "sharded", "tied", "tied sharded"])
def test_an_untouched_export_is_the_same_to_the_last_byte(
    tmp_path, dtype, layout
) -> None:
    kind = np.dtype("bfloat16" if dtype == "mixed" else dtype)
    tensors = awkward(small_tensors(), kind)
    if dtype == "mixed":
        tensors["model.norm.weight"] = np.float32([1 / 3, -0.0, 1e-45, 7])
    if "tied" in layout:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    source, items = tmp_path / "source", list(tensors.items())
    shards = [dict(items[7:]), dict(items[:7])] if "sharded" in layout else None
    tied = "tied" in layout
    write(source, tensors, shards=shards, tie_word_embeddings=tied, unknown={"a": [1]})
    (source / "tokenizer.json").write_bytes(b"any bytes \xff\r\n")
    (source / "chat_template.jinja").write_text("{{ messages }}")
    run("export", "--model", source, "--out", tmp_path / "out")
    assert contents(tmp_path / "out") == contents(source)
    assert len(contents(source)) == (6 if shards else 4)


def test_a_header_is_kept_as_it_was_written(tmp_path) -> None:
    """Other spacing, orders and metadata than this library's own writer gives."""
    source = write(tmp_path / "source")
    tensors = small_tensors()
    entries: dict[str, Any] = {"__metadata__": {"by": "another", "format": "pt"}}
    data = b""
    for name in reversed(tensors):
        begin, data = len(data), data + tensors[name].tobytes()
        shape, offsets = tensors[name].shape, [begin, len(data)]
        entries[name] = {"shape": shape, "data_offsets": offsets, "dtype": "F32"}
    entries["model.norm.weight"] = entries.pop("model.norm.weight")
    header = json.dumps(entries, indent=3).encode() + b" " * 5
    size = len(header).to_bytes(8, "little")
    (source / "model.safetensors").write_bytes(size + header + data)
    run("export", "--model", source, "--out", tmp_path / "out")
    assert contents(tmp_path / "out") == contents(source)


def test_a_model_saved_by_transformers_comes_out_the_same(tiny_llama, tmp_path) -> None:
    scenes.torch_model(tiny_llama).save_pretrained(
        tmp_path / "source", max_shard_size="30KB"
    )
    run("export", "--model", tmp_path / "source", "--out", tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "source")
    assert len(contents(tmp_path / "out")) > 5


@pytest.mark.parametrize("shards", [None, 2])
def test_shards_of_a_given_size(tiny_llama, tmp_path, shards) -> None:
    source = tiny_llama
    if shards:
        source = tmp_path / "source"
        scenes.torch_model(tiny_llama).save_pretrained(source, max_shard_size="90KB")
        assert len(list(source.glob("*.safetensors"))) > 1
    out = tmp_path / "out"
    run("export", "--model", source, "--out", out, "--max_shard_size", "60KB")
    files = sorted(out.glob("*.safetensors"))
    assert [path.name for path in files] == [
        f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))
    ]
    # The largest tensor, 296 × 40 numbers, takes 47 KB: no file holds one too many.
    assert all(path.stat().st_size < 62_000 for path in files)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    numbers = {k: v for file in files for k, v in load_file(file).items()}
    assert set(index["weight_map"]) == set(numbers)
    size = sum(value.nbytes for value in numbers.values())
    assert index["metadata"]["total_size"] == size
    want = scenes.torch_model(tiny_llama).state_dict()
    got = scenes.torch_model(out).state_dict()
    assert set(got) == set(want)
    for name, value in want.items():
        np.testing.assert_array_equal(got[name], value)
    # In one file again.
    run("export", "--model", out, "--out", tmp_path / "one", "--max_shard_size", "1GB")
    assert list(load_file(tmp_path / "one" / "model.safetensors")) == sorted(numbers)
    assert not (tmp_path / "one" / "model.safetensors.index.json").exists()


def test_numbers_that_would_be_rounded_are_refused(tmp_path) -> None:
    source = write(tmp_path / "source")
    tensors = {k: v.astype(np.float64) for k, v in small_tensors().items()}
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(SystemExit, match="2"):
        main(["export", "--model", str(source), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


# --- with an adapter --------------------------------------------------------------


def random_lora(params: Any, **options: Any) -> Any:
    """Make adapters that change the model: B is random too."""
    config = lora.LoRAConfig(**{"rank": 3, "alpha": 7.0, **options})
    rng = np.random.default_rng(1)

    def fill(path: str, leaf: Any) -> jax.Array:
        if path.endswith("/scale"):
            return jax.numpy.full(leaf.shape, config.alpha / config.rank)
        return jax.numpy.asarray(0.3 * rng.normal(size=leaf.shape), np.float32)

    shapes = jax.eval_shape(
        lambda key: lora.init(key, params, config), jax.random.key(0)
    )
    return trees.map_with_paths(fill, shapes)


def save_lora(checkpoint: Any, adapters: Any, out: Path, **options: Any) -> Path:
    return adapter_files.save_adapter(checkpoint, {"lora": adapters}, out, **options)


class Adapted:
    """A tiny Llama with random LoRA on it, and what it says of some records."""

    def __init__(self, directory: Path, groups: Any, **options: Any):
        self.directory = directory
        self.loaded = load_lib.load(directory, groups=groups)
        params = self.loaded.variables["params"]
        self.adapters = random_lora(params, **options)
        self.variables = {**self.loaded.variables, "lora": self.adapters}
        self.data = scenes.dataset(directory, 2)
        self.logps = logps(self.loaded.model, self.variables, self.data)
        self.base = scenes.torch_logps(scenes.torch_model(directory), self.data)


def logps(model: Any, variables: Any, data: Any) -> dict[tuple[int, ...], np.ndarray]:
    batch = scenes.batch(data, row_length=int(data.lengths.max()))
    score = functools.partial(scenes.token_logps, model=model)
    return scenes.responses(batch, score(variables, batch))


@pytest.fixture(scope="module")
def two_layers(tiny_llama: Path) -> Adapted:
    """All linear layers of layers 1 and 2 of 3."""
    return Adapted(tiny_llama, ((0, 1), (1, 3)), layers="1-2")


@pytest.fixture(scope="module")
def with_head(tiny_llama: Path) -> Adapted:
    """Of every layer two modules, and the head."""
    targets = ("q_proj", "down_proj", "lm_head")
    return Adapted(tiny_llama, None, targets=targets, rank=2, alpha=5.0)


@pytest.fixture(params=["two_layers", "with_head"])
def adapted(request: pytest.FixtureRequest) -> Adapted:
    return request.getfixturevalue(request.param)


def peft_model(base: Path, adapter: Path) -> Any:
    """Load with peft; a warning, such as that of missing keys, fails."""
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return PeftModel.from_pretrained(scenes.torch_model(base), adapter).eval()


def test_the_adapter_matters(adapted) -> None:
    """Or the tests below could not fail."""
    change = [np.abs(adapted.logps[k] - adapted.base[k]).mean() for k in adapted.base]
    assert min(change) > 0.1


def test_transformers_scores_a_merged_export_alike(adapted, tmp_path) -> None:
    out = export.save_hf(
        adapted.variables, tmp_path / "out", like=adapted.loaded, card="me"
    )
    got = scenes.torch_logps(scenes.torch_model(out), adapted.data)
    scenes.assert_same(got, adapted.logps, atol=1e-4)
    changed = {
        name
        for name, content in contents(out).items()
        if contents(adapted.directory).get(name) != content
    }
    assert changed == {"model.safetensors", "README.md"}
    # Only what has an adapter has changed.
    before = load_file(adapted.directory / "model.safetensors")
    after = load_file(out / "model.safetensors")
    same = {name for name in before if np.array_equal(before[name], after[name])}
    assert len(before) == 3 * 9 + 3
    assert len(same) == (30 - 2 * 7 if adapted.loaded.groups[1:] else 30 - 3 * 2 - 1)


def test_peft_scores_an_exported_adapter_alike(adapted, tmp_path) -> None:
    out = save_lora(adapted.loaded, adapted.adapters, tmp_path / "out")
    model = peft_model(adapted.directory, out)
    got = scenes.torch_logps(model, adapted.data)
    scenes.assert_same(got, adapted.logps, atol=1e-4)
    # Every factor that peft made room for is in the file, and the other way round.
    made = {name for name, _ in model.named_parameters() if "lora_" in name}
    held = load_file(out / "adapter_model.safetensors")
    assert {name.replace(".default", "") for name in made} == set(held)


def test_a_choice_of_layers_is_exported_as_such(two_layers, tmp_path) -> None:
    out = save_lora(
        two_layers.loaded, two_layers.adapters, tmp_path / "out", dropout=0.1
    )
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["layers_to_transform"] == [1, 2]
    assert config["target_modules"] == sorted(lora.LoRAConfig().targets)
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (3, 7, 0.1)
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert config["base_model_name_or_path"] == two_layers.directory.name
    names = load_file(out / "adapter_model.safetensors")
    assert len(names) == 2 * 7 * 2
    assert not any("layers.0." in name for name in names)


def test_merging_rounds_once(tmp_path) -> None:
    """bf16(W + scale B A), not bf16(W) + bf16(scale B A)."""
    tensors = {k: v.astype(ml_dtypes.bfloat16) for k, v in small_tensors().items()}
    source = write(tmp_path / "source", tensors)
    loaded = load_lib.load(source, dtype=jax.numpy.bfloat16)
    adapters = random_lora(loaded.variables["params"], targets=("q_proj",))
    variables = {**loaded.variables, "lora": adapters}
    out = export.save_hf(variables, tmp_path / "out", like=loaded)
    q_proj = "model.layers.0.self_attn.q_proj.weight"
    leaf = jax.tree.map(np.asarray, adapters["layers_0_1"]["self_attn"]["q_proj"])
    update = leaf["scale"][0] * (leaf["a"][0] @ leaf["b"][0]).T
    want = (tensors[q_proj].astype(np.float32) + update).astype(ml_dtypes.bfloat16)
    got = load_file(out / "model.safetensors")
    np.testing.assert_array_equal(got.pop(q_proj), want)
    for name, value in got.items():
        np.testing.assert_array_equal(value, tensors[name])


# --- adapters of peft -------------------------------------------------------------


def save_with_peft(
    base: Path, out: Path, *, seed: int = 0, **options: Any
) -> dict[str, np.ndarray]:
    """Save a random adapter with peft; return the merged weights that it gives.

    Of the adapter as peft loads it: its files do not keep the order of the patterns.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    options = {"r": 4, "lora_alpha": 6, "init_lora_weights": False, **options}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = LoraConfig(task_type="CAUSAL_LM", **options)
        model = get_peft_model(scenes.torch_model(base), config)
    model.save_pretrained(out, save_embedding_layers=False)
    merged = peft_model(base, out).merge_and_unload().state_dict()
    return {name: value.numpy() for name, value in merged.items()}


PATTERNS = {
    "plain": {"target_modules": ["q_proj", "v_proj"]},
    "everything": {"target_modules": "all-linear"},
    "rslora": {"target_modules": ["up_proj"], "use_rslora": True, "lora_alpha": 3},
    "layers": {
        "target_modules": ["down_proj", "o_proj"],
        "layers_to_transform": [0, 2],
    },
    "regex": {"target_modules": r".*layers\.[12]\.(self_attn\.k|mlp\.gate)_proj"},
    "full names": {
        "target_modules": [
            "model.layers.1.mlp.up_proj",
            "lm_head",
            "layers.2.mlp.up_proj",
        ]
    },
    "ranks": {
        "target_modules": ["q_proj", "v_proj", "up_proj"],
        # By the end of the name, by one layer's full name, anchored at the start.
        "rank_pattern": {"v_proj": 2, r"model\.layers\.1\.self_attn\.q_proj": 7},
        "alpha_pattern": {"up_proj": 2.5, "^model.layers.2.self_attn.q_proj": 11},
    },
    "ranks rslora": {
        "target_modules": ["q_proj", "k_proj"],
        "rank_pattern": {r".*\.0\..*": 1, "k_proj": 3},
        "alpha_pattern": {"layers.[01].self_attn.k_proj": 5, "k_proj": 9},
        "use_rslora": True,
    },
    "dora": {"target_modules": ["k_proj", "down_proj", "lm_head"], "use_dora": True},
    "embeddings": {"target_modules": ["embed_tokens", "v_proj"]},
}


@pytest.fixture(scope="module")
def load_patterns(
    tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Any]:
    """Return what loads one of the adapters above: ours, and peft's merged weights."""

    @functools.cache
    def load(name: str) -> tuple[Path, Policy, dict[str, np.ndarray]]:
        out = tmp_path_factory.mktemp("peft")
        merged = save_with_peft(tiny_llama, out, **PATTERNS[name])
        return out, open_policy(str(tiny_llama), str(out)), merged

    return load


@pytest.mark.parametrize("name", PATTERNS)
def test_an_adapter_of_peft_gives_the_same_weights(
    tiny_llama, load_patterns, tmp_path, name
) -> None:
    _, restored, want = load_patterns(name)
    assert restored.base is restored.checkpoint.variables
    out = export.save_hf(restored.variables, tmp_path / "out", like=restored.checkpoint)
    before = load_file(tiny_llama / "model.safetensors")
    got = load_file(out / "model.safetensors")
    assert set(got) == set(want)
    for tensor, value in want.items():
        np.testing.assert_allclose(got[tensor], value, atol=1e-6)
        # And the same ones were left alone.
        assert np.array_equal(value, before[tensor]) == np.array_equal(
            got[tensor], before[tensor]
        )


def test_an_adapter_of_peft_gives_the_same_log_probs(tiny_llama, load_patterns) -> None:
    out, restored, _ = load_patterns("ranks")
    data = scenes.dataset(tiny_llama, 2)
    want = scenes.torch_logps(peft_model(tiny_llama, out), data)
    got = logps(restored.checkpoint.model, restored.variables, data)
    scenes.assert_same(got, want, atol=1e-4)


@pytest.mark.parametrize("name", PATTERNS)
def test_an_adapter_goes_through_both_ways(load_patterns, tmp_path, name) -> None:
    source, restored, _ = load_patterns(name)
    checkpoint = restored.checkpoint
    out = save_lora(checkpoint, restored.variables["lora"], tmp_path / "out")
    before = load_file(source / "adapter_model.safetensors")
    after = load_file(out / "adapter_model.safetensors")
    assert set(after) == set(before)
    for tensor, value in before.items():
        np.testing.assert_array_equal(after[tensor], value)
    again = open_policy(str(checkpoint.path), str(out))
    jax.tree.map(
        np.testing.assert_array_equal,
        again.variables["lora"],
        restored.variables["lora"],
    )


@pytest.mark.parametrize("name", ["plain", "layers", "full names"])
def test_configs_go_through_both_ways(load_patterns, tmp_path, name) -> None:
    source, restored, _ = load_patterns(name)
    lora_tree = restored.variables["lora"]
    out = save_lora(restored.checkpoint, lora_tree, tmp_path / "out")
    before, after = (
        json.loads((path / "adapter_config.json").read_text()) for path in (source, out)
    )
    for field in ("r", "lora_alpha", "layers_to_transform", "bias", "peft_type"):
        assert after.get(field) == before[field], field
    if name != "full names":
        assert after["target_modules"] == sorted(before["target_modules"])


def test_ranks_that_differ_by_module_are_written_as_patterns(
    tiny_llama, load_patterns, tmp_path
) -> None:
    _, restored, want = load_patterns("ranks")
    out = save_lora(restored.checkpoint, restored.variables["lora"], tmp_path / "out")
    config = json.loads((out / "adapter_config.json").read_text())
    layers = [f"model.layers.{i}." for i in range(3)]
    ranks = {f"{at}self_attn.q_proj": 4 for at in layers}
    ranks |= {"model.layers.1.self_attn.q_proj": 7}
    ranks |= {f"{at}self_attn.v_proj": 2 for at in layers}
    ranks |= {f"{at}mlp.up_proj": 4 for at in layers}
    patterns = config["rank_pattern"]
    assert {name: patterns.get(name, config["r"]) for name in ranks} == ranks
    merged = peft_model(tiny_llama, out).merge_and_unload().state_dict()
    for name, value in want.items():
        np.testing.assert_allclose(merged[name], value, atol=1e-6)


# --- adapters that are refused ----------------------------------------------------


@pytest.fixture
def plain(load_patterns, tmp_path) -> Path:
    """Return a copy of a good adapter, to be spoilt."""
    shutil.copytree(load_patterns("plain")[0], tmp_path / "plain")
    return tmp_path / "plain"


def spoil(adapter: Path, **options: Any) -> Path:
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | options))
    return adapter


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"peft_type": "PREFIX_TUNING"}, "holds no table 'prompt_embeddings'"),
        ({"peft_type": "IA3"}, "peft_type 'IA3' is not supported: expected LORA or"),
        ({"peft_type": None}, "peft_type None is not supported: expected LORA"),
        ({"use_dora": True}, "q_proj lacks its magnitude vector, .* use_dora=True"),
        ({"lora_bias": True}, "q_proj lacks its bias lora_B.bias, .* lora_bias=True"),
        ({"bias": "some"}, "bias must be none, all or lora_only: got 'some'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save names 'lm_head', but the"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices names tokens, but"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out=True is not implemented"),
        ({"layer_replication": [[0, 2]]}, "layer_replication=.* is not implemented"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens=.* is not impl"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' belongs to base"),
        ({"lora_alpha": "16"}, "lora_alpha must be a number: got '16'"),
        ({"lora_alpha": True}, "lora_alpha must be a number: got True"),
        ({"lora_alpha": float("nan")}, "lora_alpha must be a number: got nan"),
        ({"alpha_pattern": {"q_proj": None}}, "lora_alpha must be a number: got None"),
        (
            {"alpha_pattern": {"(": 1}},
            r"alpha_pattern '\(' is not a regular expression",
        ),
        ({"alpha_pattern": ["q_proj"]}, "alpha_pattern must be an object"),
    ],
)
def test_options_that_are_refused(tiny_llama, plain, options, match) -> None:
    with pytest.raises(UserError, match=match):
        open_policy(str(tiny_llama), str(spoil(plain, **options)))


def test_real_adapters_of_other_kinds_are_refused(tiny_llama, tmp_path) -> None:
    from peft import IA3Config, get_peft_model

    base = scenes.torch_model(tiny_llama)
    ia3 = IA3Config(task_type="CAUSAL_LM")
    get_peft_model(base, ia3).save_pretrained(tmp_path / "ia3")
    with pytest.raises(UserError, match="'IA3' is not supported"):
        open_policy(str(tiny_llama), str(tmp_path / "ia3"))


def test_peft_changes_the_base_of_the_adapters_refused_for_their_start(
    tiny_llama, tmp_path
) -> None:
    """Why init_lora_weights=pissa is refused: W + B A is not what peft computes."""
    save_with_peft(
        tiny_llama,
        tmp_path / "pissa",
        target_modules=["q_proj"],
        init_lora_weights="pissa",
    )
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    model = peft_model(tiny_llama, tmp_path / "pissa")
    base = model.state_dict()[f"{name}.base_layer.weight"].numpy()
    before = load_file(tiny_llama / "model.safetensors")
    assert np.abs(base - before["model.layers.0.self_attn.q_proj.weight"]).max() > 0.01


def rewrite(adapter: Path, change: Callable[[dict[str, np.ndarray]], Any]) -> Path:
    tensors = load_file(adapter / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, adapter / "adapter_model.safetensors")
    return adapter


Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: t.pop(f"{Q_PROJ}.lora_B.weight"), "q_proj has one factor only"),
        (
            lambda t: t.update({f"{Q_PROJ}.lora_A.weight": np.ones((5, 40))}),
            "q_proj has factors that do not fit each other",
        ),
        (
            lambda t: t.update(
                {
                    f"{Q_PROJ}.lora_A.weight": np.ones((0, 40)),
                    f"{Q_PROJ}.lora_B.weight": np.ones((64, 0)),
                }
            ),
            "q_proj has factors that do not fit each other",
        ),
        (
            lambda t: t.update({f"{Q_PROJ}.lora_A.weight": np.ones((4, 41))}),
            "q_proj is for a layer of 41 inputs and 64 outputs: got one of 40 and 64",
        ),
        (
            lambda t: t.update(
                {f"{Q_PROJ}.lora_A.weight".replace(".0.", ".3."): np.ones((4, 40))}
            ),
            "layers.3.self_attn.q_proj.lora_A.weight' is no LoRA factor",
        ),
        (
            lambda t: t.update({f"{Q_PROJ}.lora_magnitude_vector": np.ones(64)}),
            "q_proj has a magnitude vector, but .* use_dora=False",
        ),
        (lambda t: t.clear(), "the adapter holds no tensors"),
    ],
)
def test_factors_that_are_refused(tiny_llama, plain, change, match) -> None:
    with pytest.raises(UserError, match=match):
        open_policy(str(tiny_llama), str(rewrite(plain, change)))


def test_the_adapter_of_another_model(make_llama, plain) -> None:
    other = make_llama(hidden_size=48)
    with pytest.raises(UserError, match="40 inputs .* one of 48 .* another model"):
        open_policy(str(other), str(plain))
    with pytest.raises(
        UserError, match="'base_model.model.model.layers.2.* is no LoRA"
    ):
        open_policy(str(make_llama(num_hidden_layers=2)), str(plain))


def test_a_tied_head_cannot_be_adapted(make_llama, load_patterns) -> None:
    tied = make_llama(tie_word_embeddings=True)
    with pytest.raises(UserError, match="has factors for lm_head, .* tied"):
        open_policy(str(tied), str(load_patterns("full names")[0]))


def test_what_is_no_adapter(tiny_llama, tmp_path) -> None:
    for path in (tmp_path, tmp_path / "absent", tiny_llama):
        with pytest.raises(UserError, match="is no adapter: expected a PEFT directory"):
            open_policy(str(tiny_llama), str(path))


# --- of a run ---------------------------------------------------------------------


def make_run(
    directory: Path, model: Path, train: Callable[[str, Any], Any], **options: Any
) -> Path:
    """Write the directory of a run at step 4, its start, and step 7, trained."""
    config = TrainConfig(
        model=str(model),
        data=str(synthetic.write_jsonl(directory / "private.jsonl", [])),
        out=str(directory / "run"),
        **options,
    )
    loaded = load_start(config, make_mesh(config.mesh), lay_out(config))
    start, whole = loaded.trainable, trees.combine(loaded.trainable, loaded.frozen)
    collections = {k: v for k, v in whole.items() if k in adapter.COLLECTIONS}
    tx = make_optimizer(config.optimizer, 9)
    with run_directory.claim(config, fingerprints(config)) as run:
        if collections:
            adapter_files.write_start(collections, run / runs.ADAPTER_START)
        store = StateStore(run / "checkpoints")
        for step, trainable in ((4, start), (7, trees.map_with_paths(train, start))):
            state = step_lib.init(trainable, tx, key=jax.random.key(1))
            store.save(SavedState(step, *step_lib.to_saved(state), {}))
        store.close()
        metrics = {"step": 6, "loss": 0.5}, {"step": 8, "loss": 0.25}
        synthetic.write_jsonl(run / "metrics.jsonl", metrics)
    return run


def test_a_run_is_exported(tmp_path) -> None:
    source = write(tmp_path / "source")
    loaded = load_lib.load(source)
    options = {"rank": 2, "alpha": 5.0, "targets": ("q_proj", "down_proj")}
    adapters = random_lora(loaded.variables["params"], **options)
    leaves = dict(zip(trees.paths(adapters), jax.tree.leaves(adapters), strict=True))
    run_path = make_run(
        tmp_path,
        source,
        lambda path, _: leaves[path.removeprefix("lora/")],
        adapter=lora.LoRAConfig(**options, dropout=0.25),
    )
    flags = ["export", "--run", run_path, "--format"]
    run(*flags, "merged", "--out", tmp_path / "merged")
    run(*flags, "peft", "--out", tmp_path / "peft")
    variables = {**loaded.variables, "lora": adapters}
    want = export.save_hf(variables, tmp_path / "a", like=loaded)
    got = contents(tmp_path / "merged")
    card = got.pop("README.md").decode()
    assert got == contents(want)
    want = save_lora(loaded, adapters, tmp_path / "b", dropout=0.25)
    got = contents(tmp_path / "peft")
    assert got.pop("README.md").decode() != card
    assert got == contents(want)
    # What was measured up to this step, and no path of this machine.
    assert "for 7 steps" in card and "| loss | 0.5 |" in card
    assert "private.jsonl" in card and str(tmp_path) not in card
    # An earlier step: B was still zero.
    run(*flags, "merged", "--step", "4", "--out", tmp_path / "first")
    before = (source / "model.safetensors").read_bytes()
    assert (tmp_path / "first" / "model.safetensors").read_bytes() == before
    # A run is an adapter too.
    restored = open_policy(str(source), str(run_path))
    jax.tree.map(np.testing.assert_array_equal, restored.variables["lora"], adapters)
    with pytest.raises(UserError, match="no checkpoint of step 5: got 4, 7"):
        open_run(run_path, step=5)
    other = shutil.copytree(source, tmp_path / "other")
    spoilt = bytearray(before)
    spoilt[-1] ^= 1
    (other / "model.safetensors").write_bytes(spoilt)
    with pytest.raises(UserError, match="is not the model that .*run was trained on"):
        open_policy(str(other), str(run_path))
    shutil.rmtree(run_path / "checkpoints")
    with pytest.raises(UserError, match="has no checkpoint yet"):
        open_run(run_path)


def test_trained_base_weights_are_no_adapter(tmp_path) -> None:
    source = write(tmp_path / "source")
    run_path = make_run(
        tmp_path,
        source,
        lambda path, leaf: jax.numpy.arange(4.0),
        adapter=NoAdapter(),
        trainable=("norm/scale",),
    )
    run("export", "--run", run_path, "--out", tmp_path / "out")
    got = load_file(tmp_path / "out" / "model.safetensors")
    want = {**small_tensors(), "model.norm.weight": np.float32([0, 1, 2, 3])}
    assert set(got) == set(want)
    for name, value in want.items():
        np.testing.assert_array_equal(got[name], value)
    with pytest.raises(UserError, match="trained base weights, so there is no adapter"):
        publish.publish_run(run_path, tmp_path / "peft", form="peft")


# --- whole or not at all ----------------------------------------------------------


@pytest.mark.parametrize("size", [None, "1KB"])
def test_a_failure_leaves_nothing(tmp_path, monkeypatch, size) -> None:
    loaded = load_lib.load(write(tmp_path / "source"))
    merged = export._tensor
    done = []

    def fail(base: Any, variables: Any, name: str) -> np.ndarray:
        done.append(name)
        if len(done) == 12:
            raise OSError("no space left")
        return merged(base, variables, name)

    monkeypatch.setattr(export, "_tensor", fail)
    with pytest.raises(UserError, match="no space left"):
        export.save_hf(
            loaded.variables, tmp_path / "out", like=loaded, max_shard_size=size
        )
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    export.save_hf(loaded.variables, tmp_path / "out", like=loaded, max_shard_size=size)
    assert (tmp_path / "out").is_dir()


def test_a_failed_adapter_leaves_nothing(two_layers, tmp_path, monkeypatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(export, "write", fail)
    with pytest.raises(UserError, match="no space left"):
        save_lora(two_layers.loaded, two_layers.adapters, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten(tmp_path, monkeypatch) -> None:
    loaded = load_lib.load(write(tmp_path / "source"))

    def save(out: Any) -> None:
        export.save_hf(loaded.variables, out, like=loaded)

    full, file = tmp_path / "full", tmp_path / "file"
    full.mkdir()
    for taken in (full / "mine", file):
        taken.write_text("keep me")
    for out in (full, file):
        with pytest.raises(UserError, match="is there already and not empty"):
            save(out)
    assert contents(full) == {"mine": b"keep me"} and file.read_text() == "keep me"
    with pytest.raises(UserError, match="cannot be written"):
        save(file / "inner")
    (tmp_path / "empty").mkdir()
    save(tmp_path / "empty")
    save(tmp_path / "new" / "inner")
    assert contents(tmp_path / "empty") == contents(tmp_path / "new" / "inner")
    # An empty directory named by a dot.
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    save(".")
    assert contents(tmp_path / "here") == contents(tmp_path / "empty")


@pytest.mark.parametrize("text", ["5", "5 bytes", "1.5GB", "-1MB", "GB", "5GiB", ""])
def test_sizes_that_are_refused(text) -> None:
    with pytest.raises(UserError, match="is not understood: expected such as 200MB"):
        export.parse_size(text)


def test_sizes() -> None:
    # Powers of ten, as transformers reads them; a file holds a tensor at least.
    assert [export.parse_size(t) for t in ("5GB", "7 MB", "1kb", "0KB")] == [
        5_000_000_000,
        7_000_000,
        1_000,
        1_000,
    ]
