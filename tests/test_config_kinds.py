"""Options made in Python are checked as those of files are."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest

from jaxalign import configs
from jaxalign.adapters.hybrid import HLPTConfig
from jaxalign.adapters.lora import LoRAConfig
from jaxalign.errors import UserError
from jaxalign.evaluation.score import ScoreConfig
from jaxalign.feedback.pairing import PairingConfig
from jaxalign.generation.engine import Sampling
from jaxalign.judging.config import JudgeConfig
from jaxalign.objectives.dpo2d import DPO2DConfig
from jaxalign.objectives.pairwise import PairwiseConfig
from jaxalign.parallel.mesh import MeshConfig
from jaxalign.training.config import TrainConfig
from jaxalign.training.optimizer import OptimizerConfig


PLACES = {"model": "m", "data": "d", "out": "o"}

WRONG = [
    (TrainConfig, {**PLACES, "dtype": "bf16"}, "option dtype: .*bfloat16.* got 'bf16'"),
    (TrainConfig, {**PLACES, "row_length": "512"}, "option row_length: .* got '512'"),
    (ScoreConfig, {**PLACES, "token_logps": "yes"}, "option token_logps: .* got 'yes'"),
    (LoRAConfig, {"rank": 8.5}, "the option rank: .*integer.*: got 8.5"),
    (LoRAConfig, {"targets": "q_proj"}, "the option targets: .*tuple.* got 'q_proj'"),
    (HLPTConfig, {"mode": "sum"}, "the option mode: .*concat.* got 'sum'"),
    (DPO2DConfig, {"form": "groups"}, "the option form: .*group.* got 'groups'"),
    (PairwiseConfig, {"name": "dpo", "beta": "0.1"}, "the option beta: .* got '0.1'"),
    (OptimizerConfig, {"learning_rate": "1e-5"}, "the option learning_rate: .*number"),
    (MeshConfig, {"data": "8"}, "the option data: .*integer.* got '8'"),
    (Sampling, {"temperature": "0"}, "the option temperature: .* got '0'"),
    (JudgeConfig, {"votes": None}, "the option votes: .*integer.* got None"),
    (PairingConfig, {"min_gap": "big"}, "the option min_gap: .* got 'big'"),
]


@pytest.fixture(scope="module")
def found() -> list[str]:
    """Return what is said of each in a process whose calls no test's hook checks."""
    cases = [(kind.__module__, kind.__name__, options) for kind, options, _ in WRONG]
    code = f"""
import importlib, json
from pathlib import Path
import numpy as np
from jaxalign.errors import UserError
said = []
for module, name, options in json.loads({json.dumps(cases)!r}):
    try:
        getattr(importlib.import_module(module), name)(**options)
        said.append("made")
    except UserError as error:
        said.append(str(error))
from jaxalign.training.config import TrainConfig
from jaxalign.adapters.lora import LoRAConfig
made = TrainConfig(model=Path("a/model"), data="d", out="o", row_length=np.int64(512))
targets = LoRAConfig(targets=["q_proj"]).targets
said.append(repr([made.model, made.row_length, targets]))
print(json.dumps(said))
"""
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    return json.loads(out.stdout)


@pytest.mark.parametrize("case", range(len(WRONG)))
def test_a_value_of_the_wrong_kind(found: list[str], case: int) -> None:
    kind, options, match = WRONG[case]
    assert re.search(match, found[case]), found[case]
    with pytest.raises(UserError, match=match):
        configs.build(kind, options)


def test_what_python_has_for_a_plain_value(found: list[str]) -> None:
    assert found[-1] == "['a/model', 512, ('q_proj',)]"
    assert LoRAConfig(alpha=np.float64(8)).alpha == 8
