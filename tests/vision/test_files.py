"""Checkpoints that see, in every spelling of their names, out as they came in."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxalign import trees
from jaxalign.adapters.lora import LoRAConfig
from jaxalign.checkpoints import adapter_start, export
from jaxalign.checkpoints import load as load_lib
from jaxalign.checkpoints.convert import convert
from jaxalign.checkpoints.policy import open_run
from jaxalign.errors import UserError
from jaxalign.training.config import from_dict
from jaxalign.training.publish import publish_model
from jaxalign.training.run import train
from tests import vision_models
from tests.adapters import scenes
from tests.vision.test_adapters import close, of_torch, own_logps
from tests.vision.test_trained_weights import LORA, options


Rename = Callable[[str], str]

WEIGHTS = "model.safetensors"


def _fresh(name: str) -> str:
    """Return transformers 5's own name in memory for one of its files."""
    for old, new in (
        ("language_model.model.", "model.language_model."),
        ("language_model.lm_head", "lm_head"),
        ("vision_tower.vision_model.", "model.vision_tower."),
        ("vision_tower.", "model.vision_tower."),
        ("multi_modal_projector.", "model.multi_modal_projector."),
    ):
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def _published(name: str) -> str:
    """As in transformers 4's first files."""
    for old, new in (
        ("model.language_model.", "language_model.model."),
        ("lm_head", "language_model.lm_head"),
        ("model.vision_tower.", "vision_tower.vision_model."),
        ("model.multi_modal_projector.", "multi_modal_projector."),
    ):
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def _later(name: str) -> str:
    """As from transformers 4.52 on."""
    return name.replace("model.vision_tower.", "model.vision_tower.vision_model.")


def _saved_anew(name: str) -> str:
    """As transformers 5 saves a fresh model."""
    return _published(name).replace("vision_tower.vision_model.", "vision_tower.")


def _qwen(name: str) -> str:
    """As published, and as transformers saves a fresh model."""
    name = name.replace("model.visual.", "visual.")
    return name.replace("model.language_model.", "model.")


def _qwen_memory(name: str) -> str:
    """As in memory."""
    if name.startswith("visual."):
        return f"model.{name}"
    parts = ("model.layers.", "model.embed_tokens.", "model.norm.")
    if name.startswith(parts):
        return name.replace("model.", "model.language_model.", 1)
    return name


_LLAVA: dict[str, Rename] = {
    "published": lambda name: _published(_fresh(name)),
    "later": lambda name: _later(_fresh(name)),
    "memory": _fresh,
    "fresh": lambda name: _saved_anew(_fresh(name)),
}

# DINOv2 has no vision_model in its names, and has called its layers otherwise.
_DINOV2: dict[str, Rename] = {
    "memory": _fresh,
    "old layers": lambda name: (
        name.replace(".attention.q_proj.", ".attention.attention.query.")
        .replace(".attention.k_proj.", ".attention.attention.key.")
        .replace(".attention.v_proj.", ".attention.attention.value.")
        .replace(".attention.o_proj.", ".attention.output.dense.")
    ),
}

SPELLINGS: dict[str, dict[str, Rename]] = {
    "llava": _LLAVA,
    "llava-siglip": _LLAVA,
    "llava-dinov2": _DINOV2,
    "idefics3": {"as it is": str},
    "smolvlm": {"as it is": str},
    "qwen2_5_vl": {"published": _qwen, "memory": _qwen_memory},
}

CASES = [(kind, name) for kind, names in SPELLINGS.items() for name in names]


def spelled(source: Path, out: Path, rename: Rename, **more: np.ndarray) -> Path:
    """Copy a checkpoint, its tensors under other names; 0 stays 0 where it is rare."""
    tensors = {rename(name): v for name, v in load_file(source / WEIGHTS).items()}
    assert len(tensors) == len(load_file(source / WEIGHTS))
    out.mkdir()
    for file in source.iterdir():
        if file.name != WEIGHTS:
            (out / file.name).write_bytes(file.read_bytes())
    save_file({**tensors, **more}, out / WEIGHTS, metadata={"format": "pt"})
    return out


def in_older_words(directory: Path, *, flat: bool = False) -> None:
    """Write config.json as transformers 4 did."""
    config = json.loads((directory / "config.json").read_text())
    text = config["text_config"]
    for part in (config, text, config["vision_config"]):
        if "dtype" in part:
            part["torch_dtype"] = part.pop("dtype")
    config["vision_config"].pop("rope_parameters", None)
    rope = text.pop("rope_parameters")
    text["rope_theta"] = rope["rope_theta"]
    if "mrope_section" in rope:
        text["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    if flat:
        kind = config["model_type"]
        config = {**config.pop("text_config"), **config, "model_type": kind}
    (directory / "config.json").write_text(json.dumps(config))


def values(directory: Path) -> Any:
    return jax.device_get(load_lib.load(directory).variables["params"])


def same(found: Any, expected: Any) -> None:
    assert trees.paths(found) == trees.paths(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def files(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


@pytest.mark.parametrize("kind, spelling", CASES)
def test_it_comes_out_bit_for_bit(tmp_path, kind, spelling) -> None:
    model = vision_models.write(kind, tmp_path / "model")
    rename = SPELLINGS[kind][spelling]
    other = spelled(model, tmp_path / "other", rename)
    names = load_file(other / WEIGHTS).keys()
    assert names == {rename(name) for name in load_file(model / WEIGHTS)}
    if kind.startswith("llava"):
        # Both are there, and neither is run: vision_feature_layer is -2.
        assert any(".2.mlp.fc1" in name for name in names)
        assert any("layernorm" in name for name in names)
    same(values(other), values(model))
    out = publish_model(other, tmp_path / "out")
    assert files(out) == files(other)
    assert {"preprocessor_config.json", "processor_config.json"} <= files(out).keys()


@pytest.mark.parametrize(
    "kind, flat",
    [
        ("llava", False),
        ("idefics3", False),
        ("qwen2_5_vl", False),
        ("qwen2_5_vl", True),
    ],
)
def test_configs_of_transformers_4(tmp_path, kind, flat) -> None:
    model = vision_models.write(kind, tmp_path / "model")
    expected = load_lib.open_config(model)[0]
    found = values(model)
    in_older_words(model, flat=flat)
    text = (model / "config.json").read_text()
    assert "torch_dtype" in text and "rope_parameters" not in text
    assert ("text_config" in text) is not flat
    assert load_lib.open_config(model)[0] == expected
    same(values(model), found)
    before = files(model)
    assert files(publish_model(model, tmp_path / "out")) == before


@pytest.mark.parametrize("kind", vision_models.KINDS)
def test_transformers_loads_what_is_merged(scene, kind, tmp_path) -> None:
    from transformers import AutoModelForImageTextToText

    found = scene(kind)
    targets = ("v_proj", "vision:fc2", "connector:.*")
    if kind == "qwen2_5_vl":
        targets = ("v_proj", "vision:qkv", "vision:proj", "connector:.*")
    config = LoRAConfig(rank=2, targets=targets, layers="all; vision:top:1")
    loaded = load_lib.load(found.model, adapter=config)
    made = adapter_start.make(jax.random.key(0), config, loaded)
    adapted = scenes.Adapted(loaded, scenes.shaken(made, size=0.2))
    out = export.save_hf(adapted.variables, tmp_path / "out", like=loaded)
    before, after = load_file(found.model / WEIGHTS), load_file(out / WEIGHTS)
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert before.keys() == after.keys()
    connector = 1 if kind in ("idefics3", "smolvlm") else 2
    assert len(changed) == 2 + (len(targets) - 2) + connector
    expected = of_torch(found, AutoModelForImageTextToText.from_pretrained(out).eval())
    merged = found._replace(model=out)
    close(own_logps(merged, None, tmp_path / "scores.jsonl"), expected)


@pytest.mark.parametrize("kind", ["llava", "idefics3", "qwen2_5_vl"])
def test_a_converted_base_stands_for_it(tmp_path, kind) -> None:
    model = vision_models.write(kind, tmp_path / "model")
    base = convert(model, tmp_path / "base")
    same(values(base), values(model))
    assert (tower := load_lib.open_config(model)[0].vision) is not None
    halves = [
        load_lib.load(
            source,
            groups=[(0, 1), (1, 2)],
            vision_groups=[(0, 1), (1, tower.num_layers)],
        )
        for source in (base, model)
    ]
    same(*(jax.device_get(half.variables) for half in halves))
    assert files(publish_model(base, tmp_path / "out")) == files(model)


def test_a_run_from_a_converted_base(scene, tmp_path) -> None:
    found = scene("llava")
    base = convert(found.model, tmp_path / "base")
    adapter = {**LORA, "targets": ["q_proj", "vision:q_proj"]}
    made = []
    for model in (found.model, base):
        values = options(
            found._replace(model=model),
            tmp_path / f"run of {model.name}",
            adapter=adapter,
            trainable=["connector/.*"],
            max_steps=2,
        )
        made.append(jax.device_get(open_run(train(from_dict(values))).variables))
    same(*made)


@pytest.mark.parametrize(
    "path, match",
    [
        (
            "vision/layers_0_2",
            r"params/vision: got the stacks none, .* each of the 2 layers",
        ),
        (
            "vision/positions",
            r"params/vision/positions is missing: expected .*\[17, 32",
        ),
        ("connector", "params/connector/linear_1/bias is missing"),
        ("vision", "params/vision/class_token is missing"),
    ],
)
def test_what_lacks_is_told(tmp_path, path, match) -> None:
    loaded = load_lib.load(vision_models.write("llava", tmp_path / "model"))
    params = jax.tree.map(lambda leaf: leaf, loaded.variables["params"])
    *above, last = path.split("/")
    del trees.node_at(params, above)[last]
    with pytest.raises(UserError, match=match):
        export.save_hf({"params": params}, tmp_path / "out", like=loaded)
    assert not (tmp_path / "out").exists()


def test_other_shapes_are_told(tmp_path) -> None:
    loaded = load_lib.load(vision_models.write("llava", tmp_path / "model"))
    params = jax.tree.map(lambda leaf: leaf, loaded.variables["params"])
    params["vision"]["positions"] = params["vision"]["positions"][:5]
    kernel = params["connector"]["linear_1"]["kernel"]
    params["connector"]["linear_1"]["kernel"] = kernel.T
    wrong = (
        r"params/connector/linear_1/kernel: got floats \[48, 32\], expected floats "
        r"\[32, 48\]; params/vision/positions: got floats \[5, 32\]"
    )
    with pytest.raises(UserError, match=wrong):
        export.save_hf({"params": params}, tmp_path / "out", like=loaded)
