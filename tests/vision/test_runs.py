"""Training on pictures: every kind of loss, evaluation, cut texts, kills."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxalign.checkpoints.policy import open_run
from jaxalign.checkpoints.renderer import open_renderer
from jaxalign.data import kept_pairs, pairs, records
from jaxalign.training import metrics as metrics_lib
from jaxalign.training.config import from_dict
from jaxalign.training.run import train
from tests import synthetic, vision_records


def options(made: Any, out: Path, **changes: Any) -> dict[str, Any]:
    return {
        "model": str(made.model),
        "data": str(made.data),
        "out": str(out),
        "max_steps": 2,
        "batch_rows": 1,
        "row_length": 420,
        "max_length": 200,
        "logging_steps": 1,
        "optimizer": {"learning_rate": 1e-3},
        "adapter": {"name": "lora", "rank": 2},
        "objective": {"name": "dpo"},
        **changes,
    }


def losses(run: Path) -> list[float]:
    steps = metrics_lib.read(run / "metrics.jsonl").values()
    return [row["loss"] for row in steps if "loss" in row]


OBJECTIVES: dict[str, dict[str, Any]] = {
    "dpo": {"name": "dpo"},
    "ipo": {"name": "ipo"},
    "simpo": {"name": "simpo"},
    "aot": {"name": "aot"},
    "dpo2d": {"name": "dpo2d"},
    "tdpo2": {"name": "tdpo2"},
    "sdpo": {"name": "sdpo"},
    "step_dpo": {"name": "step_dpo"},
    "kto": {"name": "kto"},
    "bco": {"name": "bco"},
    "sft": {"name": "sft"},
    "sft with prompt": {"name": "sft", "completion_only_loss": False},
    "mix": {"name": "mix", "mix": {"sigmoid": 1.0, "sft": 0.2}},
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_trains_on_pictures(scene, tmp_path, name) -> None:
    made = scene("llava")
    train(from_dict(options(made, tmp_path / "run", objective=OBJECTIVES[name])))
    found = losses(tmp_path / "run")
    assert len(found) == 2 and np.isfinite(found).all()


@pytest.mark.parametrize("kind", ["llava", "smolvlm", "qwen2_5_vl"])
def test_all_is_trained_and_evaluated_with_and_without_pictures(
    scene, tmp_path, kind
) -> None:
    """Tower, connector and decoder; texts alone are evaluated by the same program."""
    made = scene(kind)
    words = synthetic.write_jsonl(
        tmp_path / "words.jsonl", vision_records.text_records(3)
    )
    for number, held_out in enumerate((made.data, words)):
        run = tmp_path / f"run {number}"
        changes = {"adapter": {"name": "none"}, "trainable": [".*"]}
        changes |= {"eval_data": str(held_out), "eval_steps": 2}
        train(from_dict(options(made, run, **changes)))
        steps = metrics_lib.read(run / "metrics.jsonl").values()
        found = [row["eval_loss"] for row in steps if "eval_loss" in row]
        assert found and np.isfinite([*found, *losses(run)]).all()


@pytest.mark.variants
def test_a_run_on_kept_tokens_is_the_one_that_made_them(
    scene, tmp_path, monkeypatch, capsys
) -> None:
    """Workers are sent what is mapped, and nothing writes into it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(kept_pairs, "_WORTH_SECONDS", 0.0)
    made = scene("qwen2_5_vl")
    found = []
    for name in ("made", "read"):
        capsys.readouterr()
        train(from_dict(options(made, tmp_path / name, data_workers=1)))
        assert ("of an earlier start" in capsys.readouterr().err) == (name == "read")
        state = open_run(tmp_path / name)
        found.append((losses(tmp_path / name), jax.tree.leaves(state.variables)))
    (loss, trained), (again, others) = found
    assert loss == again and len(loss) == 2
    for one, other in zip(trained, others, strict=True):
        np.testing.assert_array_equal(one, other)


def test_pictures_are_never_cut_from_their_tokens(scene, tmp_path) -> None:
    """The case in which TRL's features and tokens do not match (#5881)."""
    made = scene("llava")
    found, renderer = records.read(made.data), open_renderer(made.model)
    whole = pairs.prepare(found, renderer, max_length=None)
    cut = pairs.prepare(found, renderer, max_length=40, overflow="truncate")
    assert cut.report["truncated"] > 2 and cut.report["dropped_images_too_long"] > 0
    for index, pair in zip(cut.indices, cut.pairs, strict=True):
        same = whole.pairs[index]
        assert pair.layouts == same.layouts and pair.units == same.units
        assert renderer.patcher is not None
        tokens = pair.prompt[pair.feature_places]
        assert (tokens == renderer.patcher.token_id).all()
        assert len(tokens) == len(same.feature_places)
    changes = {"overflow": "truncate", "max_length": 40, "packing": False}
    train(from_dict(options(made, tmp_path / "run", **changes)))
    assert np.isfinite(losses(tmp_path / "run")).all()


def command(values: dict[str, Any]) -> list[str]:
    arguments = []
    for name, value in values.items():
        if isinstance(value, dict):
            arguments += [f"--{name}.{k}={v}" for k, v in value.items()]
        else:
            arguments.append(f"--{name}={value}")
    return [sys.executable, "-m", "jaxalign.cli.main", "train", *arguments]


@pytest.mark.kill
@pytest.mark.parametrize("workers", [0, 1])
def test_killed_it_goes_on_to_the_last_bit(scene, tmp_path, workers) -> None:
    made = scene("smolvlm")
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")
    environment = {**os.environ, "XLA_FLAGS": flags}
    found = []
    for name, kills in (("whole", 0), ("killed", 2)):
        out = tmp_path / name
        values = options(made, out, max_steps=12, save_steps=1, data_workers=workers)
        for _ in range(kills):
            before = steps_of(out)
            process = subprocess.Popen(
                command(values), env=environment, stderr=subprocess.DEVNULL
            )
            limit = time.monotonic() + 200
            while steps_of(out) < before + 2 and process.poll() is None:
                assert time.monotonic() < limit
                time.sleep(0.01)
            process.send_signal(signal.SIGKILL)
            process.wait()
        subprocess.run(command(values), env=environment, check=True)
        found.append(open_run(out).variables["lora"])
        assert len(losses(out)) >= 12
    for one, two in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_array_equal(one, two)


def steps_of(run: Path) -> int:
    """Return the newest step that is saved."""
    place = run / "checkpoints"
    names = [p.name for p in place.iterdir()] if place.is_dir() else []
    return max((int(name) for name in names if name.isdigit()), default=0)
