"""Adapters trained on a quantised base, from the command line to exported files."""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import yaml

from jaxalign import trees
from jaxalign.adapters.adapter import NoAdapter
from jaxalign.adapters.lora import LoRAConfig
from jaxalign.checkpoints import load as load_lib
from jaxalign.checkpoints.policy import open_run
from jaxalign.cli.main import main
from jaxalign.errors import UserError
from jaxalign.models.quantised import Quantised
from jaxalign.training import metrics
from jaxalign.training.config import TrainConfig, from_dict
from jaxalign.training.describe import DescribeConfig, describe
from jaxalign.training.run import train
from tests import scenes, synthetic
from tests.checkpoints.test_export import peft_model


pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing")


def shell(*arguments: Any) -> None:
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    assert stop.value.code == 0


OPTIONS = {
    "max_steps": 3,
    "batch_rows": 2,
    "row_length": 192,
    "max_length": 96,
    "logging_steps": 1,
    "report_to": "none",
    "quantize": "nf4",
    "optimizer.learning_rate": 1e-2,
    "adapter.rank": 2,
}


@pytest.fixture(scope="module")
def files(make_llama, tmp_path_factory) -> tuple[Path, Path]:
    """Return a checkpoint and records."""
    directory = tmp_path_factory.mktemp("records")
    data = synthetic.write_jsonl(
        directory / "records.jsonl", synthetic.feedback_records(8)
    )
    return make_llama(hidden_size=144, intermediate_size=200), data


@pytest.fixture(scope="module")
def run(files, tmp_path_factory) -> Path:
    """Return the directory of a short run on an nf4 base."""
    out = tmp_path_factory.mktemp("runs") / "run"
    shell("train", *flags(files, out))
    return out


def flags(files, out: Path, **changes: Any) -> list[Any]:
    model, data = files
    values = {**OPTIONS, "model": model, "data": data, "out": out, **changes}
    return [f"--{name}={value}" for name, value in values.items()]


def scores(files, out: Path, *more: Any) -> list[dict[str, Any]]:
    model, data = files
    more = (*more, "--token_logps", "true")
    shell("score", "--model", model, "--data", data, "--out", out, *more)
    return [json.loads(line) for line in out.read_text().splitlines()]


def logps(found: list[dict[str, Any]], field: str = "token_logps") -> np.ndarray:
    values = [r[side][field] for r in found for side in ("chosen", "rejected")]
    return np.concatenate(values)


def test_the_run_learns_on_codes(run) -> None:
    assert yaml.safe_load((run / "config.yaml").read_text())["quantize"] == "nf4"
    steps = metrics.read(run / "metrics.jsonl")
    # Sums over tens of tokens of two float32 passes: a few roundings apart at most.
    assert steps[1]["rewards/margins"] == pytest.approx(0, abs=1e-4)
    assert steps[3]["rewards/margins"] > 0
    restored = open_run(run)
    layer = restored.base["params"]["layers_0_3"]
    assert isinstance(layer["mlp"]["up_proj"]["kernel"], Quantised)
    assert np.abs(restored.variables["lora"]["layers_0_3"]["mlp"]["up_proj"]["b"]).max()


def test_score_holds_the_base_as_the_run_did(files, run, tmp_path) -> None:
    own = scores(files, tmp_path / "own", "--adapter", run)
    nf4 = scores(files, tmp_path / "nf4", "--adapter", run, "--quantize", "nf4")
    full = scores(files, tmp_path / "full", "--adapter", run, "--quantize", "none")
    base = scores(files, tmp_path / "base", "--quantize", "nf4")
    plain = scores(files, tmp_path / "plain")
    np.testing.assert_array_equal(logps(own), logps(nf4))
    np.testing.assert_allclose(logps(own, "ref_token_logps"), logps(base), atol=1e-5)
    np.testing.assert_allclose(logps(full, "ref_token_logps"), logps(plain), atol=1e-5)
    for one, other in ((own, full), (base, plain)):
        assert np.abs(logps(one) - logps(other)).mean() > 1e-3


def test_exports_are_for_the_unquantised_model(files, run, tmp_path) -> None:
    model, _ = files
    want = scores(files, tmp_path / "want", "--adapter", run, "--quantize", "none")
    wanted = logps(want)
    for form in ("merged", "peft"):
        out = tmp_path / form
        shell("export", "--run", run, "--format", form, "--out", out)
        card = (out / "README.md").read_text()
        assert "base weights were held as nf4 codes in training" in card
    assert "merged into the unquantised" in (tmp_path / "merged/README.md").read_text()
    merged = scores((tmp_path / "merged", files[1]), tmp_path / "merged.jsonl")
    np.testing.assert_allclose(logps(merged), wanted, atol=1e-4)
    # A PEFT directory says nothing of how its base was held: as asked for, or whole.
    adapter = ("--adapter", tmp_path / "peft")
    np.testing.assert_allclose(
        logps(scores(files, tmp_path / "1", *adapter)), wanted, atol=1e-4
    )
    own = scores(files, tmp_path / "2", "--adapter", run)
    codes = scores(files, tmp_path / "3", *adapter, "--quantize", "nf4")
    np.testing.assert_allclose(logps(codes), logps(own), atol=1e-4)
    data = scenes.dataset(model, 8)
    got = scenes.torch_logps(peft_model(model, tmp_path / "peft"), data)
    by_torch = scenes.torch_logps(scenes.torch_model(tmp_path / "merged"), data)
    scenes.assert_same(got, by_torch, atol=1e-4)
    np.testing.assert_allclose(
        sorted(np.concatenate(list(got.values()))), sorted(wanted), atol=1e-3
    )


def test_a_run_goes_on_with_the_same_codes_only(files, run) -> None:
    shell("train", *flags(files, run))
    with pytest.raises(SystemExit) as stop:
        main(list(map(str, ["train", *flags(files, run, quantize="int8")])))
    assert stop.value.code == 2
    with pytest.raises(UserError, match="quantize: 'nf4' there, 'none' now"):
        train(options_of(run, quantize="none"))


def options_of(run: Path, **changes: Any) -> TrainConfig:
    return from_dict({**yaml.safe_load((run / "config.yaml").read_text()), **changes})


def test_another_reference_is_held_alike(files, run, tmp_path) -> None:
    """A cache made of other codes is stale; a directory is held in the same ones."""
    model, _ = files
    steps = {}
    for reference in ("cached", str(model)):
        out = tmp_path / Path(reference).name
        changes = {"reference": reference, "out": str(out), "max_steps": 1}
        train(options_of(run, **changes))
        steps[reference] = metrics.read(out / "metrics.jsonl")[1]
    for values in steps.values():
        assert values["rewards/chosen"] == pytest.approx(0, abs=1e-5)
    changes |= {"reference": "cached", "out": str(tmp_path / "other")}
    changes |= {"quantize": "int8", "reference_cache": str(tmp_path / "cached")}
    kept = tmp_path / "cached" / "reference" / "train.npz"
    kept.rename(tmp_path / "cached" / "train.npz")
    with pytest.raises(UserError, match="is stale"):
        train(options_of(run, **changes))


@pytest.mark.parametrize("adapter", [NoAdapter(), LoRAConfig(targets=("q_proj",))])
def test_codes_are_not_trained(files, adapter, tmp_path) -> None:
    model, data = map(str, files)
    options = {"model": model, "adapter": adapter, "quantize": "nf4"}
    codes = "quantize nf4 holds layers_0_3/mlp/down_proj/kernel as codes, which cannot"
    with pytest.raises(UserError, match=f"{codes} be trained: got '.*mlp/.*'"):
        describe(DescribeConfig(**options, trainable=("norm/.*", ".*/mlp/.*")))
    with pytest.raises(UserError, match=codes):
        out = str(tmp_path / "out")
        train(TrainConfig(**options, data=data, out=out, trainable=(".*/mlp/.*",)))
    assert not (tmp_path / "out").exists()
    found = describe(DescribeConfig(**options, trainable=("norm/scale",)))
    assert found["groups"][-2]["base"] == 144
    with pytest.raises(UserError, match="quantize"):
        from_dict({"model": "M", "data": "D", "out": "O", "quantize": "nf8"})


@pytest.mark.parametrize("kind", ["int8", "nf4"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_describe_counts_the_bytes_that_loading_takes(files, kind, dtype) -> None:
    found = describe(
        DescribeConfig(
            model=str(files[0]),
            adapter=LoRAConfig(rank=2),
            dtype=dtype,
            quantize=kind,
        )
    )
    loaded = load_lib.load(files[0], quantize=kind, dtype=jnp.dtype(dtype))
    by_name = {group["name"]: group for group in found["groups"]}
    adapters = 4 * (found["trainable"] + 3 * 7)  # and the scales
    assert found["weights_bytes"] == trees.num_bytes(loaded.variables) + adapters
    head = loaded.variables["params"]["lm_head"]
    assert by_name["lm_head"]["weights_bytes"] == trees.num_bytes(head)
    plain = load_lib.load(files[0])
    assert found["total"] == trees.num_params(plain.variables["params"])
