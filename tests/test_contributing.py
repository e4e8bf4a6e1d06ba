"""The worked example of CONTRIBUTING.md works."""

import re
import types
from pathlib import Path

from jaxalign.checkpoints import load as load_lib
from jaxalign.models import families
from jaxalign.objectives import policy
from tests import scenes, synthetic


TEXT = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_a_family_is_one_file(tmp_path, monkeypatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    (case,) = re.findall(r'```\n"seed_oss": (.*?),\n```', TEXT)
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
    got = policy.policy_token_logps(loaded.variables, batch, model=loaded.model)
    scenes.assert_same(scenes.responses(batch, got), want, atol=1e-4)
