"""Whole runs under objectives that ask for other data, models or steps than DPO."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from jaxalign.cli.main import main
from jaxalign.errors import UserError
from jaxalign.training import metrics as metrics_lib
from jaxalign.training.alarms import DisplacementAlarm
from jaxalign.training.config import from_dict
from jaxalign.training.run import train
from tests import synthetic


LN2 = math.log(2)


@pytest.fixture(scope="module")
def files(tiny_llama, tmp_path_factory):
    directory = tmp_path_factory.mktemp("files")
    rows = synthetic.feedback_records(12)
    synthetic.write_jsonl(directory / "pairs.jsonl", rows)
    labelled = [
        {
            "prompt": row["prompt"],
            "completion": row["chosen"],
            "label": i % 3 > 0,
            "weight": 0.5,
        }
        for i, row in enumerate(rows)
    ]
    synthetic.write_jsonl(directory / "labelled.jsonl", labelled)
    return tiny_llama, directory


def run(files, out: Path, data: str, objective: dict, **options) -> dict:
    model, directory = files
    values = {
        "model": str(model),
        "data": str(directory / data),
        "eval_data": str(directory / data),
        "out": str(out),
        "max_steps": 2,
        "batch_rows": 2,
        "row_length": 256,
        "max_length": 128,
        "logging_steps": 1,
        "report_to": "none",
        "optimizer": {"learning_rate": 1e-2},
        "adapter": {"rank": 2},
        "objective": objective,
        **options,
    }
    train(from_dict(values))
    return metrics_lib.read(out / "metrics.jsonl")


def test_kto_on_labelled_completions(files, tmp_path) -> None:
    """At the reference each loss is 1/2, here times the weight 1/2."""
    steps = run(
        files,
        tmp_path / "run",
        "labelled.jsonl",
        {"name": "kto"},
        gradient_accumulation_steps=2,
        reference="cached",
    )
    assert steps[1]["loss"] == pytest.approx(0.25, rel=1e-5)
    assert steps[1]["kl"] == pytest.approx(0, abs=1e-5)
    assert steps[2]["loss"] < steps[1]["loss"]
    assert steps[2]["eval_rewards/chosen"] > steps[2]["eval_rewards/rejected"]


def test_kto_takes_pairs_apart(files, tmp_path) -> None:
    steps = run(files, tmp_path / "run", "pairs.jsonl", {"name": "kto"}, max_steps=1)
    assert steps[1]["loss"] == pytest.approx(0.5, rel=1e-5)
    assert {"rewards/chosen", "rewards/rejected", "kl"} <= set(steps[1])


def test_a_mix_adds_up(files, tmp_path) -> None:
    steps = run(
        files,
        tmp_path / "run",
        "pairs.jsonl",
        {"mix": {"sigmoid": 1.0, "sft": 0.2, "dpo2d": 0.5}, "form": "vanilla"},
        gradient_accumulation_steps=2,
    )
    for values, prefix in ((steps[1], ""), (steps[0], "eval_"), (steps[2], "eval_")):
        total = (
            values[f"{prefix}loss/sigmoid"]
            + 0.2 * values[f"{prefix}loss/sft"]
            + 0.5 * values[f"{prefix}loss/dpo2d"]
        )
        assert values[f"{prefix}loss"] == pytest.approx(total, rel=1e-5)
    assert steps[1]["loss/sigmoid"] == pytest.approx(LN2, rel=1e-5)
    assert "segments/accuracy" in steps[1]
    text = (tmp_path / "run" / "config.yaml").read_text()
    assert "name: mix" in text
    # The same command goes on: the options read back are the same.
    run(
        files,
        tmp_path / "run",
        "pairs.jsonl",
        {"mix": {"sigmoid": 1.0, "sft": 0.2, "dpo2d": 0.5}, "form": "vanilla"},
        gradient_accumulation_steps=2,
    )


def test_token_weights_from_two_models(files, tmp_path) -> None:
    """Two equal models tell nothing: every weight is 1, and TIS-DPO is DPO."""
    model = str(files[0])
    both = {"positive_model": model, "negative_model": model}
    tis = run(files, tmp_path / "tis", "pairs.jsonl", {"name": "tis_dpo", **both})
    dpo = run(files, tmp_path / "dpo", "pairs.jsonl", {"name": "dpo"})
    assert tis[2]["loss"] == pytest.approx(dpo[2]["loss"], rel=1e-5)
    kept = sorted(p.name for p in (tmp_path / "tis" / "reference").iterdir())
    assert kept == [
        "eval_negative_model.npz", "eval_positive_model.npz",
        "train_negative_model.npz", "train_positive_model.npz",
    ]  # fmt: skip
    with pytest.raises(UserError, match="chosen_token_weights is missing"):
        run(files, tmp_path / "none", "pairs.jsonl", {"name": "tis_dpo"})


def test_supervised_then_sequential_kl(files, tmp_path) -> None:
    """Base weights trained without a reference; then TDPO with the live one."""
    steps = run(
        files,
        tmp_path / "sft",
        "labelled.jsonl",
        {"name": "sft", "completion_only_loss": False},
        adapter={"name": "none"},
        trainable=["norm/scale"],
    )
    assert steps[2]["loss"] < steps[1]["loss"]
    assert "rewards/margins" not in steps[1]
    steps = run(files, tmp_path / "tdpo", "pairs.jsonl", {"name": "tdpo2"})
    assert steps[1]["loss"] == pytest.approx(LN2, rel=1e-5)
    assert np.isfinite(steps[2]["loss"])


@pytest.mark.parametrize(
    ("objective", "options", "match"),
    [
        ({"name": "simpo"}, {"reference": "cached"}, "reference has no effect for sim"),
        (
            {"name": "sft"},
            {"reference": "elsewhere"},
            "reference has no effect for sft",
        ),
        ({"name": "tdpo1"}, {"reference": "cached"}, "compares whole distributions"),
        ({"name": "sigmoid", "gamma": 1.0}, {}, "objective.gamma has no effect for si"),
        ({"mix": {"sigmoid": 1.0}, "gamma": 1.0}, {}, "no member of the mix sigmoid"),
        ({"mix": {"sigmund": 1.0}}, {}, "cannot hold 'sigmund'. Did you mean sigmoid"),
        ({"mix": {"kto": 1.0}}, {}, "cannot hold 'kto'"),
        ({"mix": {"sft": -1.0}}, {}, "the weight of sft must be positive"),
    ],
)
def test_what_has_no_effect_is_refused(
    files, tmp_path, objective, options, match
) -> None:
    with pytest.raises(UserError, match=match):
        run(files, tmp_path / "run", "pairs.jsonl", objective, **options)
    assert not (tmp_path / "run").exists()


def test_weights_are_refused_where_the_batch_is_sorted(files, tmp_path) -> None:
    rows = [{**row, "weight": 2.0} for row in synthetic.feedback_records(4)]
    synthetic.write_jsonl(files[1] / "weighted.jsonl", rows)
    with pytest.raises(UserError, match="field weight has no meaning for aot"):
        run(files, tmp_path / "run", "weighted.jsonl", {"name": "aot"})


def test_train_from_the_command_line_writes_a_report(files, tmp_path) -> None:
    model, directory = files
    flags = {
        "model": model,
        "data": directory / "pairs.jsonl",
        "eval_data": directory / "pairs.jsonl",
        "out": tmp_path / "run",
        "max_steps": 1,
        "batch_rows": 1,
        "row_length": 256,
        "max_length": 128,
        "report_to": "none",
        "objective.mix": json.dumps({"hinge": 1.0, "sft": 0.2}),
        "objective.beta": 0.2,
    }
    with pytest.raises(SystemExit) as ended:
        main(["train", *(f"--{name}={value}" for name, value in flags.items())])
    assert ended.value.code == 0
    page = (tmp_path / "run" / "report.html").read_text()
    assert "jaxalign: mix on" in page and "Diagnostics" in page
    assert "fall of the chosen answers" in page


def test_the_displacement_alarm_goes_off_once() -> None:
    def values(drop: float, margin: float) -> dict[str, float]:
        return {
            "logps/chosen_drop": drop,
            "tokens/chosen": 10.0,
            "rewards/margins": margin,
        }

    alarm = DisplacementAlarm()
    said = [alarm.update(step, values(1.0, 0.2)) for step in (1, 2, 3, 4)]
    assert [text is not None for text in said] == [False, False, True, False]
    assert said[2] is not None
    assert "at step 3" in said[2] and "0.10 nats a token" in said[2]
    assert "--objective.sft_weight" in said[2]
    # A fall without a margin is no displacement, and three steps must be in a row.
    calm = DisplacementAlarm()
    for drop, margin in ((1.0, 0.2), (1.0, 0.2), (0.1, 0.2), (1.0, 0.2), (1.0, -0.1)):
        assert calm.update(1, values(drop, margin)) is None
    assert DisplacementAlarm().update(1, {"loss": 1.0}) is None


def test_without_a_reference_the_first_evaluation_is_the_measure() -> None:
    def values(logp: float, margin: float) -> dict[str, float]:
        return {
            "eval_logps/chosen": logp,
            "eval_tokens/chosen": 10.0,
            "eval_rewards/margins": margin,
        }

    alarm = DisplacementAlarm()
    steps = [(-20.0, -1.0), (-21.0, -0.5), (-22.0, 0.0), (-23.0, 0.5)]
    said = [alarm.update(i, values(*step)) for i, step in enumerate(steps)]
    assert [text is not None for text in said] == [False, False, False, True]
    assert said[3] is not None and "0.30 nats a token" in said[3]
    # Training steps between evaluations say nothing.
    assert DisplacementAlarm().update(1, {"logps/chosen": -5.0}) is None
