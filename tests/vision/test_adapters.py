"""Adapters on decoder, tower and connector, to PEFT and back."""

import json
import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxalign.adapters.lora import LoRAConfig
from jaxalign.checkpoints import adapter_files, adapter_start
from jaxalign.checkpoints import load as load_lib
from jaxalign.checkpoints.adapter_files import AdapterFiles
from jaxalign.errors import UserError
from jaxalign.evaluation.score import ScoreConfig, score
from tests.adapters import scenes
from tests.vision.test_log_probs import SIDES


pytestmark = pytest.mark.filterwarnings(
    "ignore:.*is_gradient_checkpointing:FutureWarning"
)

KINDS = ("llava", "idefics3", "qwen2_5_vl")

TARGETS = {
    "llava": ("q_proj", "vision:q_proj", "vision:fc2", "connector:.*"),
    "llava-dinov2": ("q_proj", "vision:v_proj", "vision:fc1", "connector:.*"),
    "idefics3": ("q_proj", "vision:out_proj", "vision:fc1", "connector:.*"),
    "qwen2_5_vl": ("q_proj", "vision:qkv", "vision:up_proj", "connector:mlp_0"),
}

# In the names of transformers' modules, of the decoder's last and the tower's first.
ADAPTED = {
    "llava": {
        "model.language_model.layers.1.self_attn.q_proj",
        "model.vision_tower.encoder.layers.0.self_attn.q_proj",
        "model.vision_tower.encoder.layers.0.mlp.fc2",
        "model.multi_modal_projector.linear_1",
        "model.multi_modal_projector.linear_2",
    },
    "llava-dinov2": {
        "model.language_model.layers.1.self_attn.q_proj",
        "model.vision_tower.encoder.layer.0.attention.v_proj",
        "model.vision_tower.encoder.layer.0.mlp.fc1",
        "model.multi_modal_projector.linear_1",
        "model.multi_modal_projector.linear_2",
    },
    "idefics3": {
        "model.text_model.layers.1.self_attn.q_proj",
        "model.vision_model.encoder.layers.0.self_attn.out_proj",
        "model.vision_model.encoder.layers.0.mlp.fc1",
        "model.connector.modality_projection.proj",
    },
    "qwen2_5_vl": {
        "model.language_model.layers.1.self_attn.q_proj",
        "model.visual.blocks.0.attn.qkv",
        "model.visual.blocks.0.mlp.up_proj",
        "model.visual.merger.mlp.0",
    },
}


def made(model: Path, **options: Any) -> scenes.Adapted:
    """Return an adapter whose every trained number is random."""
    config = LoRAConfig(**{"rank": 2, "alpha": 3.0, **options})
    loaded = load_lib.load(model, adapter=config)
    collections = adapter_start.make(jax.random.key(0), config, loaded)
    return scenes.Adapted(loaded, scenes.shaken(collections, size=0.2))


def own_logps(scene: Any, adapter: Path | None, out: Path) -> list[list[float]]:
    """Return the log-probabilities of all completions by ``score``."""
    config = ScoreConfig(
        model=str(scene.model),
        adapter=None if adapter is None else str(adapter),
        data=str(scene.data),
        out=str(out),
        token_logps=True,
        row_length=420,
    )
    lines = map(json.loads, score(config).read_text().splitlines())
    return [line[side]["token_logps"] for line in lines for side in SIDES]


def of_torch(scene: Any, model: Any) -> list[np.ndarray]:
    """Return the same by a model of transformers or PEFT."""
    import torch

    other, found = scene.theirs(), []
    with torch.no_grad():
        for row in scene.rows:
            for side in SIDES:
                answer = other.answer(row, side, scene.data.parent)
                found.append(answer.log_probs(model).numpy())
    return found


def in_peft(scene: Any, adapter: Path) -> Any:
    """Load an adapter with PEFT, on a model of its own."""
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    base = AutoModelForImageTextToText.from_pretrained(scene.model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings")
        return PeftModel.from_pretrained(base, adapter).eval()


def close(found: list[Any], expected: list[Any]) -> None:
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-4)


def same(found: Any, expected: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize(
    "kind, options",
    [
        ("llava", {}),
        ("llava", {"dora": True}),
        ("llava", {"init": "pissa"}),
        ("llava-dinov2", {}),
        ("idefics3", {}),
        ("idefics3", {"dora": True}),
        ("qwen2_5_vl", {}),
        ("qwen2_5_vl", {"init": "pissa", "rslora": True}),
    ],
    ids=str,
)
def test_peft_loads_it_with_exactly_these_modules(
    scene, kind, options, tmp_path
) -> None:
    found = scene(kind)
    layers = "top:1; vision:bottom:1"
    adapted = made(found.model, targets=TARGETS[kind], layers=layers, **options)
    out = adapter_files.save_adapter(
        adapted.checkpoint, adapted.collections, tmp_path / "adapter"
    )
    theirs = in_peft(found, out)
    names = {
        name.removeprefix("base_model.model.").partition(".lora_A.")[0]
        for name, _ in theirs.named_parameters()
        if ".lora_A." in name
    }
    assert names == ADAPTED[kind]
    expected = of_torch(found, theirs)
    close(own_logps(found, out, tmp_path / "scores.jsonl"), expected)
    plain = of_torch(found, found.theirs().model)
    moved = [np.abs(a - b).max() for a, b in zip(expected, plain, strict=True)]
    assert min(moved) > 1e-3  # also where there is no picture
    if not options:
        again = AdapterFiles(out, found.model).collections()
        same(again, jax.device_get(adapted.collections))


SAVED = {
    "llava": "multi_modal_projector",
    "idefics3": "connector",
    "qwen2_5_vl": "merger",
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("old", [False, True], ids=["5", "4"])
def test_it_loads_what_peft_wrote(scene, kind, old, tmp_path) -> None:
    """In the names of either era; PEFT adapts layers of towers that are not run."""
    import torch
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForImageTextToText

    found = scene(kind)
    base = AutoModelForImageTextToText.from_pretrained(found.model)
    config = LoraConfig(
        r=2,
        lora_alpha=3,
        target_modules=["qkv"] * (kind == "qwen2_5_vl") + ["q_proj", "v_proj"],
        modules_to_save=[SAVED[kind]],
    )
    theirs = get_peft_model(base, config)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape)
    theirs.save_pretrained(tmp_path / "adapter")
    expected = of_torch(found, theirs.eval())
    if old:
        file = tmp_path / "adapter" / "adapter_model.safetensors"
        tensors = load_file(file)
        names = {name: name for name in tensors}
        for new, other in (
            ("model.model.language_model.", "model.language_model.model."),
            ("model.model.vision_tower.", "model.vision_tower.vision_model."),
            ("model.model.multi_modal_projector.", "model.multi_modal_projector."),
            ("model.model.visual.", "model.visual."),
        ):
            if kind == "qwen2_5_vl" and "language_model" in new:
                other = "model.model."
            for name, now in names.items():
                names[name] = now.replace(f"base_model.{new}", f"base_model.{other}")
        if kind != "idefics3":
            assert len(set(tensors) - set(names.values())) == len(tensors)
        save_file({names[name]: value for name, value in tensors.items()}, file)
    close(own_logps(found, tmp_path / "adapter", tmp_path / "out.jsonl"), expected)


@pytest.mark.parametrize(
    "options, match",
    [
        (
            {"targets": ("q_proj", "vision:fc3")},
            "'vision:fc3' is no linear layer.*vision:fc1",
        ),
        ({"targets": ("fc1",)}, "'fc1' is no linear layer.*vision:fc1"),
        ({"targets": ("connector:proj",)}, "connector:linear_1"),
        ({"targets": ("vision:patch_embedding",)}, "is no linear layer"),
        ({"targets": ("q_proj", "vision:q_proj", "vision:.*")}, "twice, by 'vision:q_"),
        ({"targets": ("vision:fc1",), "gate": "sequence"}, "gate sequence is a mean"),
        ({"targets": ("connector:.*",), "gate": "mean"}, "gate mean is a mean over"),
        ({"targets": ("vision:fc1",), "layers": "all; vision:0-7"}, "not within 0-1"),
    ],
    ids=str,
)
def test_what_is_not_there_is_told(scene, options, match) -> None:
    with pytest.raises(UserError, match=match):
        made(scene("llava").model, **options)
