"""Hugging Face checkpoints in: what is read, what is refused, how much it takes."""

import functools
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from jaxalign.checkpoints import load as load_lib
from jaxalign.checkpoints import places
from jaxalign.checkpoints import tensors as tensor_files
from jaxalign.data.tokenizer import load_tokenizer
from jaxalign.errors import UserError
from jaxalign.models import decoder, rotary
from tests import scenes, synthetic


# A checkpoint of 1 layer, for what is about files and not about numbers.
SMALL = {
    "model_type": "llama",
    "hidden_act": "silu",
    "vocab_size": 5,
    "hidden_size": 4,
    "intermediate_size": 6,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "torch_dtype": "float32",
}


def small_tensors() -> dict[str, np.ndarray]:
    layer = "model.layers.0"
    shapes = {
        "lm_head.weight": (5, 4),
        "model.embed_tokens.weight": (5, 4),
        f"{layer}.input_layernorm.weight": (4,),
        f"{layer}.mlp.down_proj.weight": (4, 6),
        f"{layer}.mlp.gate_proj.weight": (6, 4),
        f"{layer}.mlp.up_proj.weight": (6, 4),
        f"{layer}.post_attention_layernorm.weight": (4,),
        f"{layer}.self_attn.k_proj.weight": (2, 4),
        f"{layer}.self_attn.o_proj.weight": (4, 4),
        f"{layer}.self_attn.q_proj.weight": (4, 4),
        f"{layer}.self_attn.v_proj.weight": (2, 4),
        "model.norm.weight": (4,),
    }
    rng = np.random.default_rng(0)
    return {
        name: rng.normal(size=shape).astype(np.float32)
        for name, shape in shapes.items()
    }


def write(
    directory: Path,
    tensors: dict[str, np.ndarray] | None = None,
    *,
    shards: list[dict[str, np.ndarray]] | None = None,
    **config: Any,
) -> Path:
    """Write a checkpoint: one file, or shards with their index."""
    directory.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**SMALL, **config})
    (directory / "config.json").write_text(text)
    if shards is None:
        tensors = small_tensors() if tensors is None else tensors
        save_file(tensors, directory / "model.safetensors")
        return directory
    weight_map = {}
    for number, shard in enumerate(shards):
        save_file(shard, directory / f"part-{number}.safetensors")
        weight_map |= dict.fromkeys(shard, f"part-{number}.safetensors")
    write_index(directory, weight_map)
    return directory


def write_index(directory: Path, weight_map: Any) -> None:
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def weight(loaded: load_lib.Checkpoint, name: str) -> np.ndarray:
    """Return a Hugging Face tensor out of the parameters."""
    params = loaded.variables["params"]
    *parts, kind = name.removeprefix("model.").split(".")
    place = slice(None)
    if parts[0] == "layers":
        layer = int(parts[1])
        low, high = next(g for g in loaded.groups if g[0] <= layer < g[1])
        parts, place = [f"layers_{low}_{high}", *parts[2:]], layer - low
    node = functools.reduce(lambda tree, part: tree[part], parts, params)
    if "kernel" in node and kind == "weight":
        return np.asarray(node["kernel"][place]).T
    leaf = {"embed_tokens": "embedding"}.get(parts[-1], "scale")
    return np.asarray(node["bias" if kind == "bias" else leaf][place])


def logps(loaded: load_lib.Checkpoint, data: Any) -> dict[tuple[int, ...], np.ndarray]:
    batch = scenes.batch(data, row_length=int(data.lengths.max()))
    score = functools.partial(scenes.token_logps, model=loaded.model)
    return scenes.responses(batch, score(loaded.variables, batch))


# --- what is read -----------------------------------------------------------------


@pytest.fixture(scope="module")
def torch_llama(make_llama: Callable[..., Path]) -> Any:
    """Return a transformers Llama with biases on attention and MLP, in float32."""
    return scenes.torch_model(
        make_llama(attention_bias=True, mlp_bias=True, tie_word_embeddings=True)
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("size", ["5GB", "20KB"])
def test_every_number_of_a_saved_model_is_found(
    torch_llama, tmp_path, dtype, size
) -> None:
    import torch

    model = torch_llama.to(getattr(torch, dtype))
    model.save_pretrained(tmp_path, max_shard_size=size)
    # 36,000 numbers at 2 or 4 bytes.
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) == 1 if size == "5GB" else len(files) > 3
    loaded = load_lib.load(tmp_path, groups=((0, 1), (1, 3)))
    names = [name for name, _ in model.named_parameters()]
    assert len(names) == 3 * (7 * 2 + 2) + 2  # weights, biases, norms; embedding, norm
    for name, value in model.named_parameters():
        np.testing.assert_array_equal(weight(loaded, name), value.detach().float())
    assert len(jax.tree.leaves(loaded.variables)) == 2 * (7 * 2 + 2) + 2


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 5000.0},
        {"rope_theta": 5000.0, "rope_scaling": None},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}},
        {"rope_theta": 5000.0, "rope_scaling": {"type": "linear", "factor": 3.0}},
        {
            "rope_parameters": {
                "rope_type": "linear",
                "rope_theta": 5000.0,
                "factor": 3,
            }
        },
        {
            "rope_theta": 5000.0,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
        # transformers reads the older field where a config has both.
        {
            "rope_theta": 5000.0,
            "rope_scaling": {"rope_type": "linear", "factor": 3.0},
            "rope_parameters": {"rope_type": "default", "rope_theta": 7.0},
        },
        {},
    ],
)
@pytest.mark.parametrize("head_dim", [8, None], ids=["head_dim", "width-over-heads"])
def test_rotary_speeds_are_those_of_transformers(tmp_path, rope, head_dim) -> None:
    from transformers import AutoConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = {**SMALL, "hidden_size": 64, "num_attention_heads": 4}
    for name in ("rope_theta", "rope_scaling", "head_dim"):
        del config[name]
    config |= rope | ({} if head_dim is None else {"head_dim": head_dim})
    (tmp_path / "config.json").write_text(json.dumps(config))
    got = load_lib.open_config(tmp_path)[0].text
    want = LlamaRotaryEmbedding(AutoConfig.from_pretrained(tmp_path)).inv_freq
    speeds = rotary.speeds_of(got.rotaries[0]).near
    assert got.head_dim == (head_dim or 64 // 4) == 2 * len(speeds)
    np.testing.assert_allclose(speeds, want, rtol=1e-6)


def test_a_config_of_transformers_4_gives_the_same_log_probs(
    make_llama, tmp_path
) -> None:
    scaling = {
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    new = {"rope_type": "llama3", "rope_theta": 500.0, **scaling}
    directory = make_llama(
        rope_parameters=new, attention_bias=True, mlp_bias=True, num_hidden_layers=2
    )
    config = json.loads((directory / "config.json").read_text())
    assert config.pop("rope_parameters") == new and config.pop("dtype")
    config |= {"rope_theta": 500.0, "rope_scaling": {"type": "llama3", **scaling}}
    config |= {"torch_dtype": "float32", "transformers_version": "4.44.0"}
    shutil.copytree(directory, tmp_path / "old")
    (tmp_path / "old" / "config.json").write_text(json.dumps(config))
    data = scenes.dataset(directory, 2)
    loaded = load_lib.load(tmp_path / "old")
    assert loaded.config == load_lib.load(directory).config
    want = scenes.torch_logps(scenes.torch_model(directory), data)
    scenes.assert_same(logps(loaded, data), want, atol=1e-4)


def test_cutting_the_layers_changes_nothing(tiny_llama) -> None:
    data = scenes.dataset(tiny_llama, 2)
    want = logps(load_lib.load(tiny_llama), data)
    loaded = load_lib.load(tiny_llama, groups=((0, 1), (1, 3)))
    assert set(loaded.variables["params"]) > {"layers_0_1", "layers_1_3"}
    scenes.assert_same(logps(loaded, data), want, atol=1e-5)


def test_dtypes_and_progress(tmp_path) -> None:
    seen = []
    loaded = load_lib.load(
        write(tmp_path),
        dtype=jax.numpy.bfloat16,
        float32=lambda path: path.endswith("/scale"),
        progress=lambda done, total: seen.append((done, total)),
    )
    assert weight(loaded, "lm_head.weight").dtype == jax.numpy.bfloat16
    assert weight(loaded, "model.norm.weight").dtype == np.float32
    # Rounded once, to nearest.
    np.testing.assert_array_equal(
        weight(loaded, "lm_head.weight"),
        small_tensors()["lm_head.weight"].astype(jax.numpy.bfloat16),
    )
    # Bytes: 172 numbers of 4.
    assert [total for _, total in seen] == [688] * 12
    assert seen[-1] == (688, 688) and sorted(seen) == seen


KINDS = ["float32", "bfloat16", "float16"]


@pytest.mark.parametrize("dtype", [*KINDS, "auto"])
@pytest.mark.parametrize("source", KINDS)
def test_every_kind_is_read_as_every_other(tmp_path, source, dtype) -> None:
    stored = {name: value.astype(source) for name, value in small_tensors().items()}
    loaded = load_lib.load(write(tmp_path, stored), dtype=dtype)
    kind = source if dtype == "auto" else dtype
    for name, value in stored.items():
        got = weight(loaded, name)
        assert got.dtype == np.dtype(kind)
        np.testing.assert_array_equal(got, value.astype(kind))
    # Activations can leave the range of float16: only who asks for it gets it.
    compute = {"auto": "bfloat16" if source == "bfloat16" else "float32"}
    assert loaded.dtype == np.dtype(compute.get(dtype, dtype))
    assert load_lib.compute_dtype(tmp_path, dtype) == loaded.dtype


def test_kinds_of_one_checkpoint_stay_as_they_are(tmp_path) -> None:
    tensors = {k: v.astype("bfloat16") for k, v in small_tensors().items()}
    norm, second = "model.norm.weight", "model.layers.1.mlp.up_proj.weight"
    tensors[norm] = np.float32([1 / 3, 1, 2, 3])
    for name in list(tensors):
        tensors[name.replace("layers.0", "layers.1")] = tensors[name]
    tensors[second] = np.float32(np.random.default_rng(0).normal(size=(6, 4)))
    loaded = load_lib.load(write(tmp_path, tensors, num_hidden_layers=2), dtype="auto")
    assert loaded.dtype == np.dtype("bfloat16")
    for name, value in tensors.items():
        got = weight(loaded, name)
        # A stack has one kind, in which every layer has a place.
        wide = name in (norm, second, second.replace("1", "0"))
        assert got.dtype == np.dtype("float32" if wide else "bfloat16")
        np.testing.assert_array_equal(got, value.astype(got.dtype))


def test_a_weight_that_float16_cannot_hold(tmp_path) -> None:
    tensors = small_tensors()
    tensors["model.layers.0.mlp.up_proj.weight"][2, 1] = 70000
    directory = write(tmp_path, tensors)
    with pytest.raises(UserError, match="up_proj/kernel has a weight of 7e.04, above"):
        load_lib.load(directory, dtype="float16")
    load_lib.load(directory, dtype="bfloat16")


@pytest.mark.parametrize("source", KINDS)
@pytest.mark.parametrize("dtype", ["float16", "auto"])
def test_log_probs_in_half_precision(tiny_llama, tmp_path, source, dtype) -> None:
    shutil.copytree(tiny_llama, tmp_path / "half")
    file = tmp_path / "half" / "model.safetensors"
    save_file({k: v.astype(source) for k, v in load_file(file).items()}, file)
    data = scenes.dataset(tiny_llama, 2)
    want = logps(load_lib.load(tmp_path / "half"), data)
    got = logps(load_lib.load(tmp_path / "half", dtype=dtype), data)
    # bfloat16 has 8 bits, float16 11; a random model of three layers.
    exact = dtype == "auto" and source != "bfloat16"
    scenes.assert_same(got, want, atol=1e-5 if exact else 0.3)
    if not exact:
        differences = [np.abs(got[key] - want[key]).mean() for key in want]
        assert 0 < np.mean(differences) < 0.05


@pytest.mark.parametrize("head", ["absent", "stored", "other shard"])
def test_a_tied_head_is_read_once(tmp_path, head) -> None:
    tensors = small_tensors()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    one = {"lm_head.weight": tensors.pop("lm_head.weight")}
    shards = {
        "absent": [tensors],
        "stored": [tensors | one],
        "other shard": [tensors, one],
    }[head]
    write(tmp_path, shards=shards, tie_word_embeddings=True)
    loaded = load_lib.load(tmp_path)
    assert "lm_head" not in loaded.variables["params"]
    assert len(jax.tree.leaves(loaded.variables)) == 11
    np.testing.assert_array_equal(
        weight(loaded, "model.embed_tokens.weight"),
        tensors["model.embed_tokens.weight"],
    )


@pytest.mark.parametrize("other", ["one number", "shape"])
def test_a_tied_head_with_other_numbers_is_refused(tmp_path, other) -> None:
    # transformers 5 would use both, against its config; 4 would drop the head.
    tensors = small_tensors()
    head = tensors["model.embed_tokens.weight"].copy()
    head[4, 3] += 1
    tensors["lm_head.weight"] = head if other == "one number" else head[:4].copy()
    write(tmp_path, tensors, tie_word_embeddings=True)
    with pytest.raises(UserError, match="differs from model.embed_tokens.weight"):
        load_lib.load(tmp_path)


def test_buffers_of_old_checkpoints_are_ignored(tmp_path) -> None:
    tensors = small_tensors()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(1, np.float32)
    loaded = load_lib.load(write(tmp_path, tensors))
    assert len(jax.tree.leaves(loaded.variables)) == 12


# --- what is refused --------------------------------------------------------------


def test_all_misfits_are_named_at_once(tmp_path) -> None:
    tensors = small_tensors()
    for name in ("model.norm.weight", "model.layers.0.mlp.up_proj.weight"):
        del tensors[name]
    extra = np.zeros((4,), np.float32)
    tensors |= {
        "model.layers.0.mlp.up_proj.scales": extra,  # nobody knows it
        "model.layers.00.input_layernorm.weight": extra,  # nor this spelling
        "model.layers.0.self_attn.q_proj.bias": extra,  # known; attention_bias is off
        "model.layers.1.input_layernorm.weight": extra,  # known; there is 1 layer
    }
    with pytest.raises(UserError) as caught:
        load_lib.load(write(tmp_path, tensors))
    text = str(caught.value)
    problems = text.split("fit config.json. ")[1].split(". Check")[0].split(". ")
    assert problems == [
        "2 tensor(s) that no rule of the family knows: "
        "model.layers.0.mlp.up_proj.scales, model.layers.00.input_layernorm.weight",
        "2 unexpected tensor(s), which config.json leaves no place for: "
        "model.layers.0.self_attn.q_proj.bias, model.layers.1.input_layernorm.weight",
        "2 missing tensor(s): model.layers.0.mlp.up_proj.weight, model.norm.weight",
    ]


def test_wrong_shapes_are_all_named(tmp_path) -> None:
    tensors = small_tensors()
    tensors["model.norm.weight"] = np.zeros((4, 1), np.float32)
    q_proj = "model.layers.0.self_attn.q_proj.weight"
    tensors[q_proj] = np.zeros((4, 5), np.float32)
    match = (
        r"2 tensor\(s\) of the wrong shape: model.layers.0.self_attn.q_proj.weight "
        r"\[4, 5\] instead of \[4, 4\], model.norm.weight \[4, 1\] instead of \[4\]"
    )
    with pytest.raises(UserError, match=match):
        load_lib.load(write(tmp_path, tensors))


def test_an_untied_head_that_is_missing_is_missed(tmp_path) -> None:
    tensors = small_tensors()
    del tensors["lm_head.weight"]
    with pytest.raises(UserError, match=r"1 missing tensor\(s\): lm_head.weight\."):
        load_lib.load(write(tmp_path, tensors))


def two_shards(directory: Path) -> tuple[Path, dict[str, str]]:
    """Write a checkpoint of two shards; return it and its weight map."""
    items = list(small_tensors().items())
    write(directory, shards=[dict(items[:6]), dict(items[6:])])
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    return directory, index["weight_map"]


def test_a_shard_that_is_missing(tmp_path) -> None:
    directory, _ = two_shards(tmp_path)
    (directory / "part-1.safetensors").unlink()
    with pytest.raises(UserError, match="part-1.safetensors is missing, but .* names"):
        load_lib.load(directory)


@pytest.mark.parametrize("outside", ["../part-1.safetensors", "/etc/passwd", "a/b"])
def test_an_index_cannot_name_files_elsewhere(tmp_path, outside) -> None:
    directory, weight_map = two_shards(tmp_path / "inner")
    shutil.copy(directory / "part-1.safetensors", tmp_path)
    weight_map = {
        k: v.replace("part-1.safetensors", outside) for k, v in weight_map.items()
    }
    write_index(directory, weight_map)
    with pytest.raises(
        UserError, match="weight_map must map tensor names to file names"
    ):
        load_lib.load(directory)


def test_an_index_that_disagrees_with_its_files(tmp_path) -> None:
    directory, weight_map = two_shards(tmp_path)
    swapped = {k: f"part-{'10'[int(v[5])]}.safetensors" for k, v in weight_map.items()}
    write_index(directory, swapped)
    with pytest.raises(
        UserError, match="names 'lm_head.weight' in part-1.*not hold it"
    ):
        load_lib.load(directory)


def test_a_tensor_in_two_shards(tmp_path) -> None:
    tensors = small_tensors()
    again = {"model.norm.weight": tensors["model.norm.weight"] + 1}
    write(tmp_path, shards=[tensors, again])
    with pytest.raises(
        UserError, match="part-0.* and part-1.* hold .*model.norm.weight"
    ):
        load_lib.load(tmp_path)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("[]", "not a JSON object: got list"),
        ("{", "not a JSON object"),
        ("{}", "weight_map must map"),
        ('{"weight_map": {"a": 1}}', "weight_map must map"),
        ('{"weight_map": {"a": ".."}}', r"\.\. is missing"),
        ('{"weight_map": {"a": "\\u0000"}}', "is missing"),
    ],
)
def test_a_broken_index(tmp_path, content, match) -> None:
    directory, _ = two_shards(tmp_path)
    (directory / "model.safetensors.index.json").write_text(content)
    with pytest.raises(UserError, match=match):
        load_lib.load(directory)


def test_weights_that_are_pickled_or_absent(tmp_path) -> None:
    write(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match="holds no weights: expected model.safetensors"):
        load_lib.load(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match="pickled weights only; save it as safetensors"):
        load_lib.load(tmp_path)


def test_what_is_no_checkpoint_directory(tmp_path) -> None:
    file = tmp_path / "file"
    file.touch()
    for path in (file, tmp_path / "absent", "no/such/model"):
        with pytest.raises(UserError, match="is no directory: expected a Hugging Face"):
            load_lib.load(path)
    with pytest.raises(UserError, match="config.json is missing"):
        load_lib.load(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(UserError, match="config.json: not a JSON object: got list"):
        load_lib.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            {"model_type": "gpt2"},
            "model_type 'gpt2' is not supported: expected gemma2, ",
        ),
        ({"model_type": None}, "model_type None is not supported"),
        ({"model_type": ["llama"]}, "is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not implemented"),
        ({"pretraining_tp": 2}, "pretraining_tp 2 is not implemented"),
        (
            {"rope_scaling": {"rope_type": "proportional", "factor": 2.0}},
            "'proportional' is not implemented: expected default, linear, dynamic",
        ),
        ({"rope_scaling": {"type": ["linear"]}}, "is not implemented"),
        ({"rope_scaling": "linear"}, "rope_scaling must be an object: got 'linear'"),
        ({"rope_scaling": {"type": "linear"}}, "factor must be a positive number"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "got '2'"),
        (
            {
                "rope_scaling": {
                    "type": "linear",
                    "factor": 2,
                    "partial_rotary_factor": 0.5,
                }
            },
            "partial_rotary_factor 0.5 is not implemented",
        ),
        (
            {
                "rope_scaling": {
                    "type": "llama3",
                    "factor": 2,
                    "low_freq_factor": 4,
                    "high_freq_factor": 4,
                    "original_max_position_embeddings": 9,
                }
            },
            "high_freq_factor must be above low_freq_factor: got 4.0 and 4.0",
        ),
        ({"rope_theta": 10**400}, "rope_theta must be a positive number"),
        ({"rope_theta": float("inf")}, "rope_theta must be a positive number: got inf"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a positive number"),
        ({"vocab_size": 2**62}, "vocab_size must be a whole number from 1 to"),
        ({"vocab_size": 5.5}, "config.json: vocab_size must be a whole number"),
        ({"vocab_size": "5"}, "vocab_size must be a whole number .* got '5'"),
        ({"intermediate_size": None}, "intermediate_size must be a whole .* got None"),
        ({"hidden_act": None}, "hidden_act None is not implemented"),
        ({"model_type": None}, "/config.json: model_type None is not supported"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be a whole number"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers must be a whole number"),
        ({"num_attention_heads": 3, "num_key_value_heads": 2}, "must be a multiple"),
        ({"head_dim": 3}, "head_dim 3 even"),
        ({"head_dim": 2**30}, "head_dim 1073741824 even, from 2 to 65536"),
        ({"head_dim": None, "hidden_size": 2**30}, "head_dim 536870912 even, from 2"),
        # Without head_dim it is 4 // 8 = 0.
        ({"head_dim": None, "num_attention_heads": 8}, "head_dim 0 even"),
        ({"tie_word_embeddings": "false"}, "must be true or false: got 'false'"),
        ({"attention_bias": 1}, "attention_bias must be true or false: got 1"),
    ],
)
def test_configs_that_are_refused(tmp_path, change, match) -> None:
    with pytest.raises(UserError, match=match):
        load_lib.load(write(tmp_path, **change))


@pytest.mark.parametrize(
    "change",
    [
        {"intermediate_size": 6.0},
        {"vocab_size": 5.0, "num_attention_heads": 2.0, "head_dim": 2.0},
    ],
)
def test_whole_numbers_may_be_written_as_floats(tmp_path, change) -> None:
    plain = load_lib.load(write(tmp_path / "plain"))
    loaded = load_lib.load(write(tmp_path / "floats", **change))
    assert loaded.config == plain.config
    jax.tree.map(np.testing.assert_array_equal, loaded.variables, plain.variables)


@pytest.mark.parametrize(
    ("family", "change", "match"),
    [
        ("smollm3", {"no_rope_layers": 3.5}, "no_rope_layers must be a 0 or 1"),
        (
            "qwen2",
            {"use_sliding_window": True, "max_window_layers": "x"},
            "max_window_layers must be a whole number",
        ),
    ],
)
def test_fields_of_some_families_are_named(tmp_path, family, change, match) -> None:
    directory = write(tmp_path, model_type=family, **{"layer_types": None, **change})
    with pytest.raises(UserError, match=f"{tmp_path}/config.json: {match}"):
        load_lib.open_config(directory)


def test_a_tokenizer_needs_no_sizes(make_llama) -> None:
    """Which transformers checks with it, and calls wrong what we read as 56."""
    directory = make_llama()
    path = directory / "config.json"
    config = json.loads(path.read_text())
    loaded = {}
    for name, size in (("plain", 56), ("float", 56.0), ("text", "56")):
        path.write_text(json.dumps({**config, "intermediate_size": size}))
        loaded[name] = load_tokenizer(str(directory))
    for made in loaded.values():
        assert type(made) is type(loaded["plain"])
        assert (
            made("the answer is 好")["input_ids"]
            == loaded["plain"]("the answer is 好")["input_ids"]
        )
    with pytest.raises(UserError, match="intermediate_size must be a whole number"):
        load_lib.load(directory)


@pytest.mark.parametrize("shards", [1, 2])
def test_a_tied_weight_under_the_heads_name_alone(tmp_path, shards) -> None:
    """As transformers loads it [transformers #38870]."""
    from jaxalign.checkpoints import contents, convert, export

    directory = synthetic.make_checkpoint(
        tmp_path / "base", "llama", tie_word_embeddings=True
    )
    want = scenes.torch_logps(scenes.torch_model(directory), scenes.dataset(directory))
    tensors = load_file(directory / "model.safetensors")
    head = {"lm_head.weight": tensors.pop("model.embed_tokens.weight")}
    (directory / "model.safetensors").unlink()
    parts = [{**tensors, **head}] if shards == 1 else [tensors, head]
    mapping = {}
    for number, part in enumerate(parts):
        name = "model.safetensors" if shards == 1 else f"part-{number}.safetensors"
        save_file(part, directory / name, metadata={"format": "pt"})
        mapping |= dict.fromkeys(part, name)
    if shards > 1:
        write_index(directory, mapping)
    data = scenes.dataset(directory)
    scenes.assert_same(
        scenes.torch_logps(scenes.torch_model(directory), data), want, atol=1e-6
    )
    loaded = load_lib.load(directory)
    scenes.assert_same(logps(loaded, data), want, atol=1e-4)
    # And it goes out as it came, from a converted copy too.
    out = export.save_hf(loaded.variables, tmp_path / "out", like=loaded)
    copy = convert.convert(directory, tmp_path / "copy")
    again = load_lib.load(copy)
    export.save_hf(again.variables, tmp_path / "out2", like=again)
    for name in set(mapping.values()):
        content = (directory / name).read_bytes()
        assert content == (out / name).read_bytes()
        assert content == (tmp_path / "out2" / name).read_bytes()
    for model in (directory, copy):
        found = contents.read_tensor(model, "model.embed_tokens.weight")
        np.testing.assert_array_equal(found, head["lm_head.weight"])


def test_integers_are_no_weights(tmp_path) -> None:
    tensors = small_tensors()
    tensors["model.norm.weight"] = np.ones(4, np.int8)
    with pytest.raises(UserError, match="'model.norm.weight' has the type I8"):
        load_lib.load(write(tmp_path, tensors))


# --- any bytes at all -------------------------------------------------------------


class Small:
    """The small checkpoint, its header, and how a broken one is tried."""

    def __init__(self, directory: Path):
        self.directory = write(directory)
        self.file = directory / "model.safetensors"
        self.content = self.file.read_bytes()
        self.end = 8 + int.from_bytes(self.content[:8], "little")
        self.entries = json.loads(self.content[8 : self.end])
        self.config, self.family = load_lib.open_config(directory)
        self.shapes = decoder.param_shapes(self.config)
        self.read = 0

    def attempt(self, content: bytes) -> None:
        """Read a file's content as ``load`` does; only a UserError may stop it."""
        self.file.write_bytes(content)
        try:
            files = tensor_files.list_files(self.directory)
            places.match_tensors(
                files,
                self.family,
                self.config,
                places.stacks_of(self.config),
                self.shapes,
                self.directory,
            )
            if self.read < 5:
                load_lib.load(self.directory)
        except UserError as error:
            assert str(self.directory) in str(error)
        else:
            self.read += 1


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Small:
    return Small(tmp_path_factory.mktemp("small"))


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.sampled_from(["", "F32", "BF16", "I64", "F8_E4M3", "linear", "llama3", "\0"]),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner)
    ),
    max_leaves=6,
)


@settings(max_examples=800)
@given(data=st.data())
def test_flipped_and_cut_headers(small: Small, data) -> None:
    content = bytearray(small.content)
    for _ in range(data.draw(st.integers(0, 4))):
        # The length and the braces matter most.
        place = data.draw(st.integers(0, 24) | st.integers(0, small.end - 1))
        content[place] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content)))]
    small.attempt(bytes(content))


@settings(max_examples=800)
@given(data=st.data())
def test_headers_with_other_values(small: Small, data) -> None:
    entries = json.loads(json.dumps(small.entries))
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.sampled_from(sorted(entries)))
        what = data.draw(
            st.sampled_from(["entry", "name", "swap", "dtype", "shape", "data_offsets"])
        )
        other = data.draw(st.sampled_from(sorted(entries)))
        if what == "swap":
            entries[name], entries[other] = entries[other], entries[name]
        elif what == "name":
            entries[data.draw(st.text(max_size=9) | st.just(f"{name}0"))] = entries.pop(
                name
            )
        elif what == "entry" or not isinstance(entries[name], dict):
            entries[name] = data.draw(JSON)
        else:
            entries[name][what] = data.draw(
                JSON
                | st.lists(st.integers(-2, 200), max_size=3)
                | st.sampled_from(["I32", "U32", "F32"])
            )
    header = json.dumps(entries).encode()
    size = len(header).to_bytes(8, "little")
    small.attempt(size + header + small.content[small.end :])


def test_the_small_file_itself_is_read(small: Small) -> None:
    """Or the two tests above could not fail."""
    before = small.read
    small.attempt(small.content)
    assert small.read == before + 1


@settings(max_examples=1200)
@given(data=st.data())
def test_configs_with_other_values(small: Small, tried: set[Any], data) -> None:
    small.file.write_bytes(small.content)
    config = {**SMALL, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}
    numbers = st.integers(1, 12) | st.sampled_from([2**31 - 1, 2**62])
    for name in data.draw(st.lists(st.sampled_from(sorted(config)), max_size=3)):
        if isinstance(SMALL[name], int) and not isinstance(SMALL[name], bool):
            config[name] = data.draw(numbers | JSON)
        else:
            config[name] = data.draw(JSON)
    if data.draw(st.booleans()) and isinstance(config["rope_scaling"], dict):
        name = data.draw(st.sampled_from(["rope_type", "type", "factor", "rope_theta"]))
        config["rope_scaling"][name] = data.draw(JSON)
    (small.directory / "config.json").write_text(json.dumps(config))
    try:
        read, _ = load_lib.open_config(small.directory)
        if read not in tried and len(tried) < 12:
            # Making the shapes takes most of the time: only of so many.
            tried.add(read)
            load_lib.check(small.directory)
    except UserError as error:
        assert "config.json" in str(error)


@pytest.fixture(scope="module")
def tried() -> set[Any]:
    return set()


# --- memory -----------------------------------------------------------------------

MEASURE = """
import json, sys
import jax
from jaxalign.checkpoints import load

def memory(field):
    for line in open("/proc/self/status"):
        if line.startswith(field):
            return int(line.split()[1]) * 1024

load.load(sys.argv[1])
before = memory("VmRSS")
loaded = load.load(sys.argv[2])
jax.block_until_ready(loaded.variables)
size = sum(leaf.nbytes for leaf in jax.tree.leaves(loaded.variables))
torch = "torch" in sys.modules
print(json.dumps({"size": size, "grown": memory("VmHWM") - before, "torch": torch}))
"""


# getrusage would do, were its peak not inherited from the process that starts this one.
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_loading_takes_little_more_memory_than_the_model(tmp_path) -> None:
    """At most the model, a tensor and its file's pages, and 60 MB for the compiler."""
    rng = np.random.default_rng(0)
    width, mlp, layers = 512, 1024, 16
    config = {
        "vocab_size": 4096,
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "head_dim": width // 8,
        "tie_word_embeddings": True,
    }

    def random(*shape: int) -> np.ndarray:
        return rng.random(shape, np.float32)

    shards = []
    for layer in range(layers):
        if layer % 4 == 0:
            shards.append({})
        at = f"model.layers.{layer}"
        for name in ("input_layernorm", "post_attention_layernorm"):
            shards[-1][f"{at}.{name}.weight"] = random(width)
        for name in "qkvo":
            shards[-1][f"{at}.self_attn.{name}_proj.weight"] = random(width, width)
        shards[-1][f"{at}.mlp.down_proj.weight"] = random(width, mlp)
        for name in ("gate", "up"):
            shards[-1][f"{at}.mlp.{name}_proj.weight"] = random(mlp, width)
    shards[0]["model.embed_tokens.weight"] = random(4096, width)
    shards[0]["model.norm.weight"] = random(width)
    write(tmp_path / "large", shards=shards, **config)
    write(tmp_path / "small")
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, tmp_path / "small", tmp_path / "large"],
        capture_output=True,
        text=True,
        check=True,
    )
    measured = json.loads(result.stdout.splitlines()[-1])
    # 16 × (4 × 512² + 3 × 512 × 1024 + 2 × 512) + 4096 × 512 + 512 numbers of 4 bytes.
    assert measured["size"] == 176_228_352
    largest = 4096 * width * 4
    # A second copy of the model, or a file mapped whole (44 MB), would be seen.
    assert measured["grown"] < measured["size"] + 2 * largest + 60e6
    assert not measured["torch"]
