"""Base weights of models that see, trained alone or beside an adapter."""

import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxalign import trees
from jaxalign.adapters.lora import LoRAConfig
from jaxalign.checkpoints.adapter_files import AdapterFiles
from jaxalign.checkpoints.policy import open_run
from jaxalign.errors import UserError
from jaxalign.training import metrics
from jaxalign.training.config import from_dict
from jaxalign.training.describe import DescribeConfig, describe
from jaxalign.training.publish import publish_run
from jaxalign.training.run import train
from tests.vision.test_adapters import close, in_peft, of_torch, own_logps


pytestmark = pytest.mark.filterwarnings(
    "ignore:.*is_gradient_checkpointing:FutureWarning"
)

LORA = {"name": "lora", "rank": 2, "targets": ["q_proj", "down_proj"]}


def options(scene: Any, out: Path, **changes: Any) -> dict[str, Any]:
    return {
        "model": str(scene.model),
        "data": str(scene.data),
        "out": str(out),
        "objective": {"name": "dpo"},
        "max_steps": 4,
        "save_steps": 2,
        "batch_rows": 2,
        "row_length": 420,
        "logging_steps": 1,
        "report_to": "none",
        "optimizer": {"learning_rate": 1e-2},
        **changes,
    }


def changed(run: Path) -> set[str]:
    """Return the paths of the base weights that are not as they were."""
    policy = open_run(run)
    before, after = (
        trees.by_path(jax.device_get(variables["params"]))
        for variables in (policy.base, policy.variables)
    )
    return {path for path in before if not np.array_equal(before[path], after[path])}


@pytest.mark.parametrize(
    "kind, trainable, module",
    [
        ("llava", ("connector/.*",), "multi_modal_projector"),
        ("llava-dinov2", ("connector/.*", "vision/.*"), "vision_tower.embeddings"),
        ("idefics3", ("connector/.*", "vision/positions"), "modality_projection.proj"),
        ("qwen2_5_vl", ("connector/.*", "vision/patch_.*"), "patch_embed.proj"),
    ],
)
def test_they_train_beside_an_adapter(scene, kind, trainable, module, tmp_path) -> None:
    """As in LLaVA's second stage: LoRA on the decoder, the connector whole."""
    found = scene(kind)
    run = tmp_path / "run"
    values = options(found, run, adapter=LORA, trainable=list(trainable))
    train(from_dict(values))
    steps = metrics.read(run / "metrics.jsonl")
    # The reference is what the connector was.
    assert steps[1]["rewards/margins"] == pytest.approx(0, abs=1e-4)
    assert abs(steps[4]["rewards/margins"]) > 1e-3
    policy = open_run(run)
    parts = tuple(pattern.split(".*")[0] for pattern in trainable)
    paths = trees.paths(policy.base["params"])
    assert changed(run) == {path for path in paths if path.startswith(parts)}
    # It goes on, bit for bit.
    shutil.copytree(run, tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "4")
    train(from_dict({**values, "out": str(tmp_path / "again")}))
    jax.tree.map(
        np.testing.assert_array_equal,
        jax.device_get(open_run(tmp_path / "again").variables),
        jax.device_get(policy.variables),
    )
    # Into files, for others.
    expected = own_logps(found, run, tmp_path / "scores.jsonl")
    merged = publish_run(run, tmp_path / "merged", form="merged")
    close(of_torch(found, _torch(merged)), expected)
    adapter = publish_run(run, tmp_path / "adapter", form="peft")
    theirs = in_peft(found, adapter)
    saved = {
        name.removeprefix("base_model.model.").partition(".modules_to_save.")[0]
        for name, _ in theirs.named_parameters()
        if ".modules_to_save." in name
    }
    assert any(module in name for name in saved)
    assert not any("language_model" in name or "text_model" in name for name in saved)
    close(of_torch(found, theirs), expected)
    close(own_logps(found, adapter, tmp_path / "again.jsonl"), expected)
    again = AdapterFiles(adapter, found.model).collections()
    for path, value in trees.by_path(again["saved"]).items():
        own = trees.by_path(policy.variables["params"])[path]
        np.testing.assert_array_equal(value, own)


def _torch(directory: Path) -> Any:
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(directory).eval()


@pytest.mark.parametrize("kind", ["llava", "idefics3", "qwen2_5_vl"])
@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_the_connector_alone(scene, kind, quantize, tmp_path) -> None:
    """As in LLaVA's first stage."""
    found = scene(kind)
    run = train(
        from_dict(
            options(
                found,
                tmp_path / "run",
                adapter={"name": "none"},
                trainable=["connector/.*"],
                quantize=quantize,
            )
        )
    )
    if quantize == "none":
        paths = {path for path in trees.paths(open_run(run).base["params"])}
        assert changed(run) == {path for path in paths if path.startswith("connector/")}
    steps = metrics.read(run / "metrics.jsonl")
    assert steps[1]["rewards/margins"] == pytest.approx(0, abs=1e-4)
    merged = publish_run(run, tmp_path / "merged", form="merged")
    before, after = (
        load_file(directory / "model.safetensors")
        for directory in (found.model, merged)
    )
    assert before.keys() == after.keys()
    names = {n for n in before if not np.array_equal(before[n], after[n])}
    mark = {"llava": "projector", "idefics3": "connector", "qwen2_5_vl": "merger"}
    assert names == {name for name in before if mark[kind] in name}
    if quantize == "none":
        expected = own_logps(found, run, tmp_path / "scores.jsonl")
        close(of_torch(found, _torch(merged)), expected)
    with pytest.raises(UserError, match="there is no adapter: use .*format merged"):
        publish_run(run, tmp_path / "adapter", form="peft")


@pytest.mark.parametrize(
    "changes, match",
    [
        (
            {"adapter": LoRAConfig(targets=("connector:linear_1",))},
            "trains connector/linear_1/kernel, by 'connector/.*', and adapter.targets",
        ),
        (
            {"adapter": LoRAConfig(modules_to_save=("connector/linear_2",))},
            "trains connector/linear_2/bias, by .*, and adapter.modules_to_save has it",
        ),
        (
            {"trainable": ("vision/layers_.*",), "quantize": "int8"},
            "quantize int8 holds vision/layers_0_2/.*kernel as codes, which cannot be",
        ),
        ({"trainable": ("conector/.*",)}, "'conector/.*' matches no weight"),
    ],
)
def test_what_cannot_be_trained(scene, changes, match) -> None:
    model = str(scene("llava").model)
    values: dict[str, Any] = {"trainable": ("connector/.*",), **changes}
    with pytest.raises(UserError, match=match):
        describe(DescribeConfig(model=model, **values))
