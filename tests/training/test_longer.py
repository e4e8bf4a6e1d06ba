"""A run that is given more steps goes on as if meant, or is told the way."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxalign.checkpoints.policy import open_run
from jaxalign.errors import UserError
from jaxalign.training import run_directory
from jaxalign.training.config import from_dict
from jaxalign.training.inputs import fingerprints
from jaxalign.training.run import train
from tests import synthetic


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    return synthetic.write_jsonl(path, synthetic.feedback_records(20))


def options(model: Path, data: Path, out: Path, **changes: Any) -> dict[str, Any]:
    return {
        "model": str(model),
        "data": str(data),
        "out": str(out),
        "batch_rows": 4,
        "row_length": 192,
        "max_length": 96,
        "logging_steps": 1,
        "save_steps": 100,
        "report_to": "none",
        "optimizer": {"learning_rate": 1e-3, "schedule": "constant"},
        "adapter": {"rank": 4, "dropout": 0.1},
        **changes,
    }


def lines(run: Path) -> list[dict[str, Any]]:
    """Metrics without what a clock changes."""
    found = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    timed = ("time", "perf/pairs_per_second", "perf/tokens_per_second")
    return [
        {k: v for k, v in line.items() if k not in (*timed, "memory/peak_gb")}
        for line in found
    ]


def test_it_ends_as_if_the_larger_number_had_been_meant(
    tiny_llama, data, tmp_path
) -> None:
    run, want = tmp_path / "run", tmp_path / "want"
    constant = {"learning_rate": 1e-3, "schedule": "constant", "warmup_steps": 1}

    def trained(out: Path, **end: Any) -> None:
        values = options(tiny_llama, data, out, optimizer=constant, **end)
        train(from_dict(values))

    trained(run, max_steps=1)
    trained(run, max_steps=3)
    # Two epochs take four steps.
    trained(run, num_train_epochs=2)
    trained(want, num_train_epochs=2)
    assert [line["step"] for line in lines(run)] == [1, 2, 3, 4]
    assert lines(run) == lines(want)
    states = [jax.tree.leaves(open_run(out).variables["lora"]) for out in (run, want)]
    for got, expected in zip(*states, strict=True):
        np.testing.assert_array_equal(got, expected)
    # It is now a run of two epochs: the same command leaves it alone, less is refused.
    assert run_directory.read_config(run).num_train_epochs == 2
    before = (run / "metrics.jsonl").read_bytes()
    trained(run, num_train_epochs=2)
    assert (run / "metrics.jsonl").read_bytes() == before
    with pytest.raises(UserError, match="max_steps: None there, 3 now"):
        trained(run, max_steps=3)


LINEAR = {"learning_rate": 1e-3}
COSINE = {"learning_rate": 1e-3, "schedule": "cosine", "warmup_steps": 1}


@pytest.mark.parametrize(
    ("begun", "now", "match"),
    [
        (
            {"optimizer": LINEAR, "max_steps": 2},
            {"max_steps": 5},
            r"holds a run of 2 steps .*schedule linear.*cannot go on to 5 .*"
            r"export --run \S+run --format peft --out ADAPTER.* adapter.name peft",
        ),
        (
            {"optimizer": COSINE, "num_train_epochs": 1},
            {"num_train_epochs": 3},
            "run of 2 steps .*schedule cosine.*cannot go on to 6 .* adapter.path",
        ),
        (
            {
                "optimizer": LINEAR,
                "max_steps": 2,
                "adapter": {"name": "none"},
                "trainable": (".*",),
            },
            {"max_steps": 3},
            r"export --run \S+ --out MODEL`, .* model MODEL reference \S*llama",
        ),
        (
            {
                "optimizer": LINEAR,
                "max_steps": 2,
                "adapter": {"name": "none"},
                "trainable": (".*",),
                "objective": {"name": "sft"},
            },
            {"max_steps": 3},
            "model MODEL and another out",
        ),
        ({"max_steps": 4}, {"max_steps": 2}, "max_steps: 4 there, 2 now"),
        ({"num_train_epochs": 2}, {"num_train_epochs": 1}, "epochs: 2 there, 1 now"),
        # Something else differs too: all is named.
        (
            {"max_steps": 2},
            {"max_steps": 4, "seed": 1},
            "max_steps: 2 there, 4 now; seed: 0 there, 1 now",
        ),
        (
            {"max_steps": 2, "optimizer": LINEAR},
            {"max_steps": 4, "optimizer": COSINE},
            "max_steps: 2 there, 4 now; optimizer.schedule: 'linear' there, 'cosine'",
        ),
    ],
)
def test_otherwise_the_way_is_named(
    tiny_llama, data, tmp_path, begun, now, match
) -> None:
    run = tmp_path / "run"
    first = from_dict(options(tiny_llama, data, run, **begun))
    with run_directory.claim(first, fingerprints(first)):
        pass
    kept = (run / "config.yaml").read_bytes()
    with pytest.raises(UserError, match=match):
        train(from_dict(options(tiny_llama, data, run, **{**begun, **now})))
    assert (run / "config.yaml").read_bytes() == kept
