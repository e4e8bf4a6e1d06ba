"""The worked examples of CONTRIBUTING.md work."""

import json
import math
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest

from jaxalign.checkpoints import load as load_lib
from jaxalign.models import families
from tests import scenes, synthetic


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
