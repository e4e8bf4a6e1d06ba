"""Runs from the command line: the same to the last bit, however often killed."""

import contextlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from jaxalign.checkpoints.policy import open_run
from jaxalign.errors import UserError
from jaxalign.training import metrics as metrics_lib
from jaxalign.training import run_directory
from jaxalign.training.config import from_dict
from jaxalign.training.run import train
from tests import synthetic
from tests.training import event_reader


STEPS = 12
KILLS = int(os.environ.get("JAXALIGN_TEST_KILLS", "3"))
"""How often the run is killed; 30 takes some five minutes."""


@pytest.fixture(scope="module")
def files(tiny_llama, tmp_path_factory):
    directory = tmp_path_factory.mktemp("files")
    synthetic.write_jsonl(directory / "train.jsonl", synthetic.feedback_records(40))
    synthetic.write_jsonl(
        directory / "eval.jsonl", synthetic.feedback_records(6, seed=1)
    )
    return tiny_llama, directory


def options(files, out: Path, **changes):
    model, directory = files
    return {
        "model": str(model),
        "data": str(directory / "train.jsonl"),
        "eval_data": str(directory / "eval.jsonl"),
        "out": str(out),
        "max_steps": STEPS,
        "batch_rows": 2,
        "row_length": 192,
        "max_length": 96,
        "gradient_accumulation_steps": 2,
        "logging_steps": 1,
        "eval_steps": 5,
        "save_steps": 2,
        "report_to": "tensorboard",
        "optimizer": {"learning_rate": 1e-3},
        "adapter": {"rank": 4, "alpha": 8.0, "dropout": 0.1},
        **changes,
    }


def command(values, *extra: str):
    arguments = []
    for name, value in values.items():
        if isinstance(value, dict):
            arguments += [f"--{name}.{k}={v}" for k, v in value.items()]
        else:
            arguments.append(f"--{name}={value}")
    return [sys.executable, "-m", "jaxalign.cli.main", "train", *arguments, *extra]


def environment() -> dict[str, str]:
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")
    return {**os.environ, "XLA_FLAGS": flags}


def comparable(run: Path) -> dict[int, dict]:
    """Metrics without what a clock or another process changes."""
    return {
        step: {
            name: value
            for name, value in values.items()
            if name != "time" and not name.startswith(("perf/", "memory/"))
        }
        for step, values in metrics_lib.read(run / "metrics.jsonl").items()
    }


def shown(run: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows, likewise."""
    return {
        tag: points
        for tag, points in event_reader.shown(run / "tensorboard").items()
        if not tag.startswith(("train/perf/", "train/memory/"))
    }


def final_weights(run: Path) -> list[np.ndarray]:
    import jax

    restored = open_run(run)
    assert restored.step == STEPS
    return [np.asarray(leaf) for leaf in jax.tree.leaves(restored.variables["lora"])]


@pytest.fixture(scope="module")
def undisturbed(files, tmp_path_factory):
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    subprocess.run(
        command(options(files, run)), env=environment(), check=True, timeout=600
    )
    return run


def test_a_run_leaves_what_the_design_says(undisturbed) -> None:
    run = undisturbed
    steps = metrics_lib.read(run / "metrics.jsonl")
    assert list(steps) == list(range(STEPS + 1))
    first = steps[1]
    for name in (
        "time", "loss", "grad_norm", "learning_rate", "epoch",
        "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies",
        "logps/chosen", "logps/rejected", "logps/chosen_drop",
        "segments/accuracy", "segments/loss_per_pair", "segments/pairs_per_example",
        "segments/coverage_chosen", "segments/coverage_rejected",
        "segments/zero_weights", "segments/contradictory",
        "perf/pairs_per_second", "perf/tokens_per_second", "memory/peak_gb",
    ):  # fmt: skip
        assert name in first, name
    # Step 1 has the values before the first update.
    assert first["rewards/margins"] == pytest.approx(0.0, abs=1e-4)
    assert first["learning_rate"] == pytest.approx(1e-3)
    with_eval = [step for step, values in steps.items() if "eval_loss" in values]
    assert with_eval == [0, 5, 10, STEPS]
    assert {p.name for p in run.iterdir()} >= {"config.yaml", "checkpoints"}
    # save_total_limit 2
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["10", "12"]
    config = run_directory.read_config(run)
    assert config.max_steps == STEPS and config.adapter.dropout == 0.1


def saving(run: Path) -> bool:
    """Whether a checkpoint is being written: it has a temporary name until whole."""
    return any("tmp" in path.name for path in run.glob("checkpoints/*"))


def logged(run: Path) -> int:
    metrics = run / "metrics.jsonl"
    return metrics.stat().st_size if metrics.exists() else 0


def test_killed_again_and_again_it_ends_the_same(files, undisturbed, tmp_path) -> None:
    """kill -9 in start-up, in compilation, between steps and in the middle of saves."""
    want = undisturbed
    run = tmp_path / "run"
    rng = random.Random(0)
    kills = in_saves = 0
    while kills < KILLS:
        process = subprocess.Popen(
            command(options(files, run)),
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        when, begun = (2, 1, 0)[kills % 3], logged(run)
        # Waiting for another process, not for a result.
        while when and process.poll() is None and logged(run) == begun:
            time.sleep(0.01)
        while when == 2 and process.poll() is None and not saving(run):
            time.sleep(0.0005)
        try:
            process.wait((rng.uniform(0, 6), rng.uniform(0, 1), 0)[when])
        except subprocess.TimeoutExpired:
            in_saves += saving(run)
            process.kill()
            process.wait()
            kills += 1
            continue
        assert process.returncode == 0
        # It came to its end: what it was killed for so far must have left no trace.
        check_same(run, want)
        shutil.rmtree(run)
    assert in_saves
    subprocess.run(
        command(options(files, run)), env=environment(), check=True, timeout=600
    )
    check_same(run, want)


def check_same(run: Path, want: Path) -> None:
    assert comparable(run) == comparable(want)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(STEPS + 1))
    assert shown(run) == shown(want)
    for got, expected in zip(final_weights(run), final_weights(want), strict=True):
        np.testing.assert_array_equal(got, expected)


def test_sigterm_saves_and_asks_to_be_run_again(files, undisturbed, tmp_path) -> None:
    want = undisturbed
    run = tmp_path / "run"
    process = subprocess.Popen(
        command(options(files, run)), env=environment(), stderr=subprocess.DEVNULL
    )
    metrics = run / "metrics.jsonl"
    while process.poll() is None and not (
        metrics.exists() and len(metrics.read_bytes().splitlines()) >= 3
    ):
        time.sleep(0.02)  # waiting for another process, not for a result
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 42
    saved = max(int(p.name) for p in (run / "checkpoints").iterdir())
    assert 0 < saved < STEPS
    subprocess.run(
        command(options(files, run)), env=environment(), check=True, timeout=300
    )
    check_same(run, want)


@contextlib.contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """Let no file of this process grow further, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_loses_nothing(files, tmp_path) -> None:
    """Full at the config, then at the first checkpoint, then not."""
    # Embeddings: TensorStore may cut what it writes into several files.
    short = {"max_steps": 3, "save_steps": 1, "eval_data": None}
    short |= {"adapter": {"name": "none"}, "trainable": ["embed_tokens/.*"]}
    run = tmp_path / "run"
    for size, match in (
        (100, "a file of the run .*cannot be read or written: .*File too large"),
        (10_000, "a checkpoint in .*checkpoints cannot be written: File too large"),
    ):
        with files_up_to(size), pytest.raises(UserError, match=match):
            train(from_dict(options(files, run, **short)))
    train(from_dict(options(files, run, **short)))
    want = train(from_dict(options(files, tmp_path / "want", **short)))
    assert comparable(run) == comparable(want)
    assert shown(run) == shown(want)


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Callable[[str], Path]]:
    """Give a disk of a size, which may be called again with another one."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def sized(size: str) -> Path:
        remount = ["-o", "remount"] if disk.is_mount() else []
        made = subprocess.run(
            ["mount", "-t", "tmpfs", *remount, "-o", f"size={size}", "tmpfs", disk],
            stderr=subprocess.DEVNULL,
            check=False,
        )
        if made.returncode:
            pytest.skip("a small disk cannot be mounted without privileges")
        return disk

    yield sized
    subprocess.run(["umount", disk], stderr=subprocess.DEVNULL, check=False)


@pytest.mark.parametrize("size", ["8k", "300k"])
def test_a_run_on_a_small_disk_goes_on_on_a_larger_one(
    files, undisturbed, small_disk, size
) -> None:
    run = small_disk(size) / "run"
    ended = subprocess.run(
        command(options(files, run)),
        env=environment(),
        timeout=300,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 2, ended.stderr
    # TensorStore's threads may still tell of a late write by themselves.
    (line,) = [x for x in ended.stderr.splitlines() if x.startswith("jaxalign: error")]
    assert "No space left on device" in line and str(run) in line
    small_disk("50m")
    subprocess.run(
        command(options(files, run)), env=environment(), check=True, timeout=300
    )
    check_same(run, undisturbed)


def test_a_finished_run_is_left_alone(files, undisturbed) -> None:
    run = undisturbed
    before = (run / "metrics.jsonl").read_bytes()
    assert train(from_dict(options(files, run))) == run
    assert (run / "metrics.jsonl").read_bytes() == before


def test_another_run_s_directory_is_refused(files, undisturbed, tmp_path) -> None:
    run = undisturbed
    other = options(files, run, optimizer={"learning_rate": 2e-3})
    with pytest.raises(UserError, match="optimizer.learning_rate: 0.001 there, 0.002"):
        train(from_dict(other))
    # The same options, but the data have changed.
    changed = tmp_path / "train.jsonl"
    changed.write_bytes((files[1] / "train.jsonl").read_bytes())
    out = tmp_path / "run"
    values = options(files, out, data=str(changed), max_steps=1, eval_data=None)
    train(from_dict(values))
    synthetic.write_jsonl(changed, synthetic.feedback_records(40, seed=5))
    with pytest.raises(UserError, match="the data has changed"):
        train(from_dict(values))


def test_a_run_goes_on_with_another_mesh_and_says_so(files, tmp_path, capfd) -> None:
    rate = {"optimizer": {"learning_rate": 1e-3, "schedule": "constant"}}
    short = options(files, tmp_path / "run", max_steps=1, eval_data=None, **rate)
    train(from_dict(short))
    train(from_dict({**short, "max_steps": 2, "mesh": {"data": 2}}))
    assert "mesh.data: 1 there, 2 now" in capfd.readouterr().err
    train(from_dict({**short, "max_steps": 2, "out": str(tmp_path / "one")}))
    got, want = (
        metrics_lib.read(tmp_path / n / "metrics.jsonl") for n in ("run", "one")
    )
    assert got[2]["loss"] == pytest.approx(want[2]["loss"], rel=1e-5)


def test_the_cached_reference_is_used_and_a_stale_one_refused(files, tmp_path) -> None:
    values = options(files, tmp_path / "off", max_steps=2)
    cached = {**values, "out": str(tmp_path / "cached"), "reference": "cached"}
    for config in (values, cached):
        train(from_dict(config))
    off, on = (
        metrics_lib.read(tmp_path / n / "metrics.jsonl") for n in ("off", "cached")
    )
    for step in (0, 1, 2):
        for name in ("loss", "rewards/margins", "eval_loss", "logps/chosen"):
            if name in off[step]:
                assert on[step][name] == pytest.approx(off[step][name], abs=2e-4)
    other = {
        **cached,
        "out": str(tmp_path / "other"),
        "reference_cache": str(tmp_path / "cached" / "reference"),
        "data": str(files[1] / "eval.jsonl"),
    }
    with pytest.raises(UserError, match="stale"):
        train(from_dict(other))


@pytest.mark.parametrize(
    "patterns",
    [(".*",), ("layers_.*/mlp/.*", "norm/scale")],
    ids=["all", "some"],
)
def test_base_weights_by_pattern(files, tmp_path, patterns) -> None:
    import jax

    from jaxalign import trees

    values = options(
        files,
        tmp_path / "run",
        max_steps=2,
        eval_data=None,
        adapter={"name": "none"},
        trainable=patterns,
    )
    run = train(from_dict(values))
    restored = open_run(run)
    paths = trees.paths(restored.base["params"])
    changed = {
        path
        for path, before, after in zip(
            paths,
            jax.tree.leaves(restored.base["params"]),
            jax.tree.leaves(restored.variables["params"]),
            strict=True,
        )
        if not np.array_equal(before, after)
    }
    everything = patterns == (".*",)
    assert changed == {
        p for p in paths if everything or "/mlp/" in p or p == "norm/scale"
    }
    first = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-5)
