"""The worked examples of CONTRIBUTING.md work."""

import json
import math
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from jaxalign.checkpoints import load as load_lib
from jaxalign.data.positions import multimodal_positions
from jaxalign.evaluation.config import EndpointConfig, EvalConfig
from jaxalign.evaluation.harness import evaluate
from jaxalign.models import families
from jaxalign.types import ImageInputs, ModelInputs
from tests import scenes, synthetic
from tests.judging.stub_server import serving


ROOT = Path(__file__).parents[1]
SECTIONS = dict(
    part.split("\n", 1)
    for part in (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("\n## ")
)


def test_a_family_is_one_file(tmp_path, monkeypatch) -> None:
    text = SECTIONS["Adding a family of models"]
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (case,) = re.findall(r'```\n"seed_oss": (.*?),\n```', text)
    module = types.ModuleType("seed_oss")
    exec(compile(code, "CONTRIBUTING.md", "exec"), module.__dict__)
    family = module.FAMILY
    monkeypatch.setitem(families.FAMILIES, family.model_type, family)
    model_type, options = eval(case)
    directory = synthetic.make_checkpoint(tmp_path, model_type, **options)
    data = scenes.dataset(directory, 3)
    want = scenes.torch_logps(scenes.torch_model(directory), data)
    loaded = load_lib.load(directory)
    assert loaded.config.text.qkv_bias and loaded.config.text.o_bias
    batch = scenes.batch(data)
    got = scenes.token_logps(loaded.variables, batch, model=loaded.model)
    scenes.assert_same(scenes.responses(batch, got), want, atol=1e-4)


def test_a_family_that_sees_is_one_file(tmp_path, monkeypatch) -> None:
    text = SECTIONS["Adding a family that sees"]
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    module = types.ModuleType("qwen2_vl")
    exec(compile(code, "CONTRIBUTING.md", "exec"), module.__dict__)
    family = module.FAMILY
    monkeypatch.setitem(families.FAMILIES, family.model_type, family)
    model = _qwen2_vl(tmp_path)
    rows, columns, merge, patch = 4, 6, 2, 14
    rng = np.random.default_rng(0)
    pixels = rng.normal(size=(3, rows * patch, columns * patch)).astype(np.float32)
    blocks = pixels.reshape(3, rows // 2, 2, patch, columns // 2, 2, patch)
    patches = blocks.transpose(1, 4, 2, 5, 0, 3, 6).reshape(-1, 3, patch * patch)
    count = rows * columns // merge**2
    tokens = np.array([[5, 97, *[99] * count, 96, 8, 9]])
    is_picture = tokens == 99
    with torch.no_grad():
        want = model(
            input_ids=torch.tensor(tokens),
            # A tower of videos: each frame twice.
            pixel_values=torch.tensor(
                np.repeat(patches, 2, 1).reshape(len(patches), -1)
            ),
            image_grid_thw=torch.tensor([[1, rows, columns]]),
            mm_token_type_ids=torch.tensor(is_picture.astype(int)),
        ).logits.numpy()
    loaded = load_lib.load(tmp_path)
    assert loaded.model.image_fn is not None
    places = np.indices((rows, columns)).reshape(2, rows // 2, 2, columns // 2, 2)
    images = ImageInputs(
        image_ids=jnp.ones((1, rows * columns), jnp.int32),
        places_in_image=jnp.asarray(places.transpose(1, 3, 2, 4, 0).reshape(1, -1, 2)),
        features_to=jnp.asarray(np.flatnonzero(is_picture)[None]),
        patches=jnp.asarray(patches.reshape(1, len(patches), -1)),
    )
    positions, _ = multimodal_positions(
        tokens[0], 99, [(rows // merge, columns // merge)], 3
    )
    ones = jnp.ones(tokens.shape, jnp.int32)
    inputs = ModelInputs(
        jnp.asarray(tokens), jnp.asarray(positions[None]), ones, 0 * ones, images
    )
    hidden = loaded.model.hidden_fn(loaded.variables, inputs)
    got = loaded.model.logits_fn(loaded.variables, hidden)
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())


def test_a_task_is_one_file(tmp_path) -> None:
    text = SECTIONS["Adding a task"]
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (tmp_path / "backwards.py").write_text(code)
    (tmp_path / "words.txt").write_text("on tip live")

    def say(body: dict[str, Any]) -> str:
        word = body["messages"][0]["content"].split()[1]
        return word[::-1] if len(body["messages"]) == 1 or word == "on" else word

    with serving(say=say) as stub:
        config = EvalConfig(
            tasks=(str(tmp_path / "backwards.py"),),
            out=str(tmp_path / "out"),
            endpoint=EndpointConfig(base_url=stub.url, model="m"),
        )
        (report,) = evaluate(config)
    assert report.metrics["first"]["value"] == 1
    assert report.metrics["again"]["value"] == 1 / 3


def _qwen2_vl(directory: Path) -> Any:
    """Write a tiny random checkpoint and return it as transformers has it."""
    torch.manual_seed(0)
    config = transformers.Qwen2VLConfig(
        vision_config={
            **{"embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2, "depth": 2},
            **{"num_heads": 4, "patch_size": 14, "spatial_merge_size": 2},
        },
        text_config={
            **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2},
            **{"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100},
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [1, 1, 2],
            },
        },
        image_token_id=99,
        video_token_id=98,
        vision_start_token_id=97,
        vision_end_token_id=96,
    )
    model = transformers.Qwen2VLForConditionalGeneration(config).eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    model.save_pretrained(directory)
    return model


USES_OF_AN_OBJECTIVE = """
import json
import jax.numpy as jnp
from jaxalign.cli import parsing
from jaxalign.errors import UserError
from jaxalign.objectives import objective
from jaxalign.objectives.pairwise import LOSSES
from jaxalign.objectives.responses import make_responses
from jaxalign.training.config import TrainConfig

flags = ["--model=m", "--data=d", "--out=o", "--objective.name=cal_dpo"]

def parse(*more):
    arguments = [*flags, *more]
    parts = {"objective": parsing.chosen_objective(arguments),
             "adapter": parsing.chosen_adapter(arguments)}
    parser = parsing.make_parser("train", TrainConfig, parts, description="")
    return parsing.parse(parser, arguments, TrainConfig, parts).objective

config = parse("--objective.beta=0.25")
try:
    refusal = str(parse("--objective.gamma=1.0"))
except UserError as error:
    refusal = str(error)
four = jnp.array(4.0)
sides = [make_responses(jnp.array(h), jnp.array(0.0), four) for h in (1.5, -3.0)]
loss = LOSSES["cal_dpo"].fn(*sides, beta=config.beta)
mix = objective.MixConfig(mix={"cal_dpo": 1.0, "sft": 0.2}, beta=0.5)
print(json.dumps([
    objective.beta_of(config),
    float(loss),
    objective.members(mix)[0][1].beta,
    refusal,
]))
"""


def test_an_objective_is_a_function_and_a_line(tmp_path) -> None:
    text = SECTIONS["Adding an objective"]
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (line,) = re.findall(r'```\n("cal_dpo": .*?)\n```', text)
    copy = tmp_path / "jaxalign"
    shutil.copytree(
        ROOT / "jaxalign", copy, ignore=shutil.ignore_patterns("__pycache__")
    )
    losses = copy / "objectives" / "anchored.py"
    losses.write_text(losses.read_text(encoding="utf-8") + f"\n\n{code}")
    table = copy / "objectives" / "pairwise.py"
    before, head, after = table.read_text(encoding="utf-8").partition(
        "LOSSES: Mapping[str, Loss] = {\n"
    )
    table.write_text(f"{before}{head}    {line}\n{after}")
    out = subprocess.run(
        [sys.executable, "-c", USES_OF_AN_OBJECTIVE],
        env={"PYTHONPATH": str(tmp_path), "JAX_PLATFORMS": "cpu"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert out.returncode == 0, out.stderr
    beta, loss, mixed, refusal = json.loads(out.stdout.splitlines()[-1])
    # H is 1.5 and -3, the targets are 2 and -2.
    want = math.log1p(math.exp(-4.5)) + 0.5**2 + 1.0**2
    assert loss == pytest.approx(want, rel=1e-6)
    assert (beta, mixed) == (0.25, 0.5)
    assert "objective.gamma has no effect for cal_dpo: got 1.0" in refusal
