"""Every family against transformers, on tiny random checkpoints of odd sizes."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxalign.checkpoints import export
from jaxalign.checkpoints import load as load_lib
from jaxalign.errors import UserError
from tests import scenes, synthetic
from tests.adapters import scenes as decoding


HALF = 8  # pairs of dimensions of a head of 16

SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 500.0, "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0 + 0.1 * i for i in range(HALF)],
        "long_factor": [2.0 + 0.3 * i for i in range(HALF)],
        "original_max_position_embeddings": 16,
    },
}

# Texts have 30 to 120 tokens: windows and original lengths are shorter on purpose.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{
        f"llama {name}": ("llama", {"rope_parameters": rope})
        for name, rope in SCALINGS.items()
    },
    "mistral": ("mistral", {"sliding_window": 9}),
    "mistral, no window": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {"head_dim": ..., "tie_word_embeddings": True}),
    "qwen2, window": (
        "qwen2",
        {
            "head_dim": ...,
            "use_sliding_window": True,
            "sliding_window": 7,
            "max_window_layers": 1,
        },
    ),
    "qwen3": ("qwen3", {"attention_bias": True}),
    "qwen3, window": (
        "qwen3",
        {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2},
    ),
    "qwen3_moe": (
        "qwen3_moe",
        {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 24},
    ),
    "mixtral": (
        "mixtral",
        {"num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": 9},
    ),
    "gemma2": (
        "gemma2",
        {
            "sliding_window": 9,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 2.0,
        },
    ),
    "gemma3": (
        "gemma3_text",
        {
            "sliding_window": 9,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            "query_pre_attn_scalar": 24,
            "rope_parameters": {
                "full_attention": {
                    "rope_type": "linear",
                    "rope_theta": 1e6,
                    "factor": 8.0,
                },
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "phi3": ("phi3", {"head_dim": ..., "sliding_window": 9}),
    "phi3, part": (
        "phi3",
        {
            "head_dim": ...,
            "hidden_size": 64,
            "rope_parameters": {
                **SCALINGS["longrope"],
                "partial_rotary_factor": 0.5,
                "short_factor": [1.0, 1.1, 1.2, 1.3],
                "long_factor": [2.0, 2.3, 2.6, 2.9],
            },
        },
    ),
    "olmo2": ("olmo2", {"head_dim": ...}),
    "smollm3": ("smollm3", {"num_hidden_layers": 5, "head_dim": ...}),
    "granite": (
        "granite",
        {
            "head_dim": ...,
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.2,
            "residual_multiplier": 0.5,
            "logits_scaling": 2.0,
        },
    ),
}


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Any:
    def checkpoint(name: str) -> Path:
        model_type, options = CASES[name]
        directory = tmp_path_factory.mktemp(model_type)
        return synthetic.make_checkpoint(directory, model_type, **options)

    return checkpoint


@pytest.mark.parametrize("name", CASES)
def test_log_probs_are_those_of_transformers(make, name, tmp_path) -> None:
    directory = make(name)
    data = scenes.dataset(directory, 4, sentences=6)
    want = scenes.torch_logps(scenes.torch_model(directory), data)
    loaded = load_lib.load(directory)
    assert max(len(key) for key in want) > 60
    # Several pairs a row, and one pair a row; prompts are shared either way.
    for row_length in (3 * int(data.lengths.max()), int(data.lengths.max())):
        batch = scenes.batch(data, row_length=row_length)
        got = scenes.token_logps(loaded.variables, batch, model=loaded.model)
        scenes.assert_same(scenes.responses(batch, got), want, atol=1e-4)
    # There and back: every tensor, every bit.
    out = export.save_hf(loaded.variables, tmp_path / "out", like=loaded)
    before, after = (load_file(path / "model.safetensors") for path in (directory, out))
    assert before.keys() == after.keys()
    for tensor, value in before.items():
        np.testing.assert_array_equal(value, after[tensor])
    assert (out / "config.json").read_bytes() == (
        directory / "config.json"
    ).read_bytes()


@pytest.mark.parametrize("name", CASES)
def test_shards_in_half_precision_come_back_to_the_last_bit(tmp_path, name) -> None:
    model_type, options = CASES[name]
    source = synthetic.make_checkpoint(
        tmp_path / "source", model_type, save={"max_shard_size": "40KB"}, **options
    )
    for number, path in enumerate(sorted(source.glob("*.safetensors"))):
        kind = ("bfloat16", "float16", "bfloat16")[number % 3]
        values = {k: v.astype(kind) for k, v in load_file(path).items()}
        save_file(values, path, metadata={"format": "pt"})
    for dtype in ("auto", "float32"):
        loaded = load_lib.load(source, dtype=dtype)
        out = export.save_hf(loaded.variables, tmp_path / dtype, like=source)
        names = sorted(path.name for path in source.iterdir())
        assert names == sorted(path.name for path in out.iterdir())
        assert sum(name.endswith(".safetensors") for name in names) > 2
        for file in names:
            assert (out / file).read_bytes() == (source / file).read_bytes(), file


@pytest.mark.parametrize("kind", ["dynamic", "longrope", "yarn"])
def test_rules_that_look_at_the_length(tmp_path, kind) -> None:
    """Texts below, at and above the length for which the model was trained."""
    import torch

    rope = SCALINGS[kind] | {"original_max_position_embeddings": 16}
    directory = synthetic.make_checkpoint(
        tmp_path, "llama", rope_parameters=rope, max_position_embeddings=32
    )
    checkpoint = load_lib.load(directory)
    tokens = np.random.default_rng(0).integers(5, 200, (1, 45))
    for length in (12, 16, 17, 32, 45):
        model = scenes.torch_model(directory)
        with torch.no_grad():
            want = model(torch.from_numpy(tokens[:, :length])).logits.numpy()
        made = decoding.Adapted(checkpoint, {})
        got = decoding.logits(made, decoding.one_sequence(tokens[:, :length]))
        np.testing.assert_allclose(got, want, atol=1e-4)


@pytest.mark.parametrize("name", ["gemma3", "smollm3", "mixtral"])
def test_decoding_equals_the_full_forward_pass(make, name) -> None:
    """All families: tests/generation/test_engine.py, against transformers."""
    checkpoint = load_lib.load(make(name))
    model, variables = checkpoint.model, checkpoint.variables
    assert model.decode_fn is not None and model.cache_fn is not None
    tokens = np.random.default_rng(0).integers(5, 200, (1, 14)).astype(np.int32)
    made = decoding.Adapted(checkpoint, {})
    want = decoding.logits(made, decoding.one_sequence(tokens))
    cache = model.cache_fn(variables, 1, 64)
    decode = jax.jit(model.decode_fn)
    hidden = []
    for begin, end in ((0, 11), (11, 12), (12, 13), (13, 14)):
        places = np.arange(begin, end, dtype=np.int32)[None]
        out, cache = decode(
            variables, cache, tokens[:, begin:end], places, np.ones(places.shape, bool)
        )
        hidden.append(np.asarray(out))
    got = model.logits_fn(variables, jax.numpy.concatenate(hidden, axis=1))
    np.testing.assert_allclose(got, want, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "changes", "match"),
    [
        ("mistral", {"hidden_act": "gelu"}, "hidden_act 'gelu' is not implemented"),
        ("gemma2", {"hidden_activation": "silu"}, "hidden_activation 'silu' is not"),
        ("gemma2", {"layer_types": ["sliding_attention"]}, "for each of the 3 layers"),
        (
            "gemma2",
            {"use_bidirectional_attention": True},
            "use_bidirectional_attention",
        ),
        ("smollm3", {"no_rope_layers": [1, 2, 1, 0, 1]}, "no_rope_layers must be a 0"),
        ("phi3, part", {"rope_parameters": {"rope_type": "longrope"}}, "short_factor"),
        ("qwen3_moe", {"mlp_only_layers": [1]}, "mlp_only_layers .1. is not implem"),
        ("qwen3_moe", {"num_experts_per_tok": 7}, "a whole number from 1 to 6"),
        ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise 0.1 is not"),
        ("qwen2", {"model_type": "qwen9"}, "model_type 'qwen9' is not supported"),
    ],
)
def test_options_that_are_refused(make, name, changes, match) -> None:
    directory = make(name)
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(UserError, match=match):
        load_lib.open_config(directory)
