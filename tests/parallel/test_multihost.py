"""Several processes do what one does: the same numbers, one directory, one end."""

import json
import signal
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxalign.checkpoints.policy import open_run
from jaxalign.errors import UserError
from jaxalign.parallel import multihost
from tests import synthetic
from tests.parallel import hosts


STEPS = 6


@pytest.fixture(scope="module")
def files(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    directory = tmp_path_factory.mktemp("files")
    synthetic.write_jsonl(directory / "train.jsonl", synthetic.feedback_records(40))
    held_out = synthetic.feedback_records(6, seed=1)
    synthetic.write_jsonl(directory / "eval.jsonl", held_out)
    return tiny_llama, directory


def command(files: Any, out: Path, *more: str) -> list[str]:
    model, directory = files
    return [
        *("train", f"--model={model}", f"--data={directory / 'train.jsonl'}"),
        *(f"--eval_data={directory / 'eval.jsonl'}", f"--out={out}"),
        *(f"--max_steps={STEPS}", "--batch_rows=4", "--row_length=192"),
        *("--max_length=96", "--logging_steps=1", "--eval_steps=3"),
        *("--save_steps=2", "--report_to=none", "--optimizer.learning_rate=1e-3"),
        *("--adapter.rank=4", "--adapter.dropout=0.1", "--mesh.data=2"),
        *("--mesh.fsdp=2", *more),
    ]


@pytest.fixture(scope="module")
def alone(files: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the run of one process with four devices."""
    directory = tmp_path_factory.mktemp("alone")
    logs = directory / "logs"
    ends = hosts.run(command(files, directory / "run"), logs, processes=1, devices=4)
    assert ends == [0], hosts.log_of(logs)
    return directory / "run"


@pytest.fixture(scope="module")
def together(files: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the run of two processes with two devices each."""
    directory = tmp_path_factory.mktemp("together")
    logs = directory / "logs"
    ends = hosts.run(command(files, directory / "run"), logs, processes=2, devices=2)
    assert ends == [0, 0], hosts.log_of(logs)
    assert "step" not in hosts.log_of(logs, 1)  # the first one speaks for all
    return directory / "run"


def lines(run: Path) -> list[dict[str, float]]:
    text = (run / "metrics.jsonl").read_text(encoding="utf-8")
    found = [json.loads(line) for line in text.splitlines()]
    # Where a run is told to stop, it does not evaluate first.
    changing = ("time", "perf/", "memory/", "eval_")
    return [
        {k: v for k, v in line.items() if not k.startswith(changing)} for line in found
    ]


def check_close(run: Path, want: Path, *, exactly: bool = False) -> None:
    got, expected = lines(run), lines(want)
    assert [x["step"] for x in got] == [*range(int(expected[-1]["step"]) + 1)]
    for one, other in zip(got, expected, strict=True):
        if exactly:
            assert one == other
            continue
        # Not accuracies: before the first update every margin is 0 but for rounding.
        assert one.keys() == other.keys()
        for name in {"loss", "rewards/margins", "grad_norm"} & one.keys():
            assert one[name] == pytest.approx(other[name], rel=1e-5, abs=1e-5), name
    pairs = zip(weights(run), weights(want), strict=True)
    for one, other in pairs:
        bound = 0.0 if exactly else 1e-5
        np.testing.assert_allclose(one, other, rtol=bound, atol=bound)


def weights(run: Path) -> list[np.ndarray]:
    return [*map(np.asarray, jax.tree.leaves(open_run(run).variables["lora"]))]


def wait_for_step(run: Path, step: int, started: list[Any], logs: Path) -> None:
    """Wait until a run's log has a step; for other processes, not for a result."""
    log = run / "metrics.jsonl"
    while not log.exists() or len(log.read_bytes().splitlines()) <= step:
        ended = [process.poll() is not None for process in started]
        assert not any(ended), hosts.log_of(logs, ended.index(True))
        time.sleep(0.02)


def test_two_processes_train_as_one(alone: Path, together: Path) -> None:
    check_close(together, alone)
    got, want = (evaluated(run) for run in (together, alone))
    assert got == pytest.approx(want, rel=1e-5) and len(got) == 3


def evaluated(run: Path) -> list[float]:
    text = (run / "metrics.jsonl").read_text(encoding="utf-8")
    lines = map(json.loads, text.splitlines())
    return [line["eval_loss"] for line in lines if "eval_loss" in line]


@pytest.mark.variants
def test_four_processes_train_as_one(files: Any, alone: Path, tmp_path: Path) -> None:
    ends = hosts.run(
        command(files, tmp_path / "run"), tmp_path / "logs", processes=4, devices=1
    )
    assert ends == [0] * 4, hosts.log_of(tmp_path / "logs")
    check_close(tmp_path / "run", alone)


@pytest.mark.variants
def test_columns_that_hosts_share(files: Any, alone: Path, tmp_path: Path) -> None:
    """With ``tensor`` across processes both build the same rows."""
    mesh = ("--mesh.data=1", "--mesh.fsdp=1", "--mesh.tensor=2")
    arguments = command(files, tmp_path / "run", *mesh)
    ends = hosts.run(arguments, tmp_path / "logs", processes=2, devices=1)
    assert ends == [0, 0], hosts.log_of(tmp_path / "logs")
    check_close(tmp_path / "run", alone)


@pytest.mark.kill
def test_one_host_is_told_to_end_and_all_save_and_go_on(
    files: Any, tmp_path: Path
) -> None:
    """SIGTERM to the second: the same step everywhere, 42, then the same to the bit."""
    run, whole, logs = (tmp_path / name for name in ("run", "whole", "logs"))
    # A second or so until all have heard: more steps than can be made by then.
    steps = 30
    longer = (f"--max_steps={steps}", "--eval_steps=10", "--save_steps=20")
    assert hosts.run(command(files, whole, *longer), logs, processes=2, devices=2) == [
        0,
        0,
    ], hosts.log_of(logs)
    started = hosts.start(command(files, run, *longer), logs, processes=2, devices=2)
    wait_for_step(run, 1, started, logs)
    started[1].send_signal(signal.SIGTERM)
    assert hosts.end(started) == [42, 42], hosts.log_of(logs)
    saved = max(int(path.name) for path in (run / "checkpoints").iterdir())
    assert 0 < saved < steps
    again = hosts.run(command(files, run, *longer), logs, processes=2, devices=2)
    assert again == [0, 0], hosts.log_of(logs)
    check_close(run, whole, exactly=True)


@pytest.mark.kill
def test_a_host_dies_the_others_end_at_once_and_two_go_on_for_four(
    files: Any, alone: Path, tmp_path: Path
) -> None:
    run, logs = tmp_path / "run", tmp_path / "logs"
    started = hosts.start(command(files, run), logs, processes=4, devices=1)
    wait_for_step(run, 3, started, logs)
    began = time.monotonic()
    started[2].kill()
    ends = hosts.end(started)
    assert ends[2] == -signal.SIGKILL
    assert [ends[n] for n in (0, 1, 3)] == [42] * 3, hosts.log_of(logs)
    assert time.monotonic() - began < 5  # a quiet machine needs less than one
    again = hosts.run(command(files, run), logs, processes=2, devices=2)
    assert again == [0, 0], hosts.log_of(logs)
    check_close(run, alone)


@pytest.mark.kill
def test_the_first_host_dies_and_the_others_end(
    files: Any, together: Path, tmp_path: Path
) -> None:
    run, logs = tmp_path / "run", tmp_path / "logs"
    started = hosts.start(command(files, run), logs, processes=2, devices=2)
    wait_for_step(run, 3, started, logs)
    started[0].kill()
    # JAX ends it, unless Python hears of the broken line before.
    dead, other = hosts.end(started)
    assert dead == -signal.SIGKILL and other in (-signal.SIGABRT, 42)
    again = hosts.run(command(files, run), logs, processes=2, devices=2)
    assert again == [0, 0], hosts.log_of(logs)
    check_close(run, together, exactly=True)


@pytest.mark.variants
def test_scores_of_two_processes_are_those_of_one(files: Any, tmp_path: Path) -> None:
    model, directory = files
    found = []
    for processes in (1, 2):
        out, logs = tmp_path / f"{processes}.jsonl", tmp_path / f"logs{processes}"
        arguments = [
            *("score", f"--model={model}", f"--data={directory / 'eval.jsonl'}"),
            *(f"--out={out}", "--batch_rows=2", "--mesh.data=2", "--token_logps=true"),
            "--row_length=192",
        ]
        ends = hosts.run(arguments, logs, processes=processes, devices=2 // processes)
        assert ends == [0] * processes, hosts.log_of(logs)
        found.append([json.loads(x) for x in out.read_text().splitlines()])
    one, two = found
    for left, right in zip(one, two, strict=True):
        assert left["index"] == right["index"]
        assert right["chosen"]["token_logps"] == pytest.approx(
            left["chosen"]["token_logps"], rel=1e-5, abs=1e-5
        )


@pytest.mark.variants
def test_a_mistake_is_told_by_every_process(files: Any, tmp_path: Path) -> None:
    """The first finds it, where it alone looks; no process waits for one that left."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("not a run")
    ends = hosts.run(
        command(files, tmp_path / "run"), tmp_path / "logs", processes=2, devices=2
    )
    assert ends == [2, 2]
    for number in range(2):
        log = hosts.log_of(tmp_path / "logs", number)
        assert "is not empty and no run's directory" in log
        assert "Traceback" not in log


@pytest.mark.parametrize(
    "text", ["on", "host:1,2", "host,2,0", "host:1,2,2", "host:1,2,-1", ":1,2,0", ""]
)
def test_what_cannot_be_joined_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="expected auto, off, or COORDINATOR:PORT,N,ID"):
        multihost.initialise(text)


def test_without_a_cluster_there_is_one_process_without_a_word(
    capfd: pytest.CaptureFixture[str],
) -> None:
    multihost.initialise("auto")
    assert not multihost.several()
    assert multihost.is_first()
    assert capfd.readouterr() == ("", "")


def test_a_launcher_s_processes_that_jax_is_too_late_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One of many that silently trains alone would be far worse than an error."""
    jax.devices()
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
    with pytest.raises(UserError, match="cannot be joined: .* must be called before"):
        multihost.initialise("auto")


def test_alone_everything_returns_at_once() -> None:
    multihost.barrier("here")
    assert multihost.on_first(lambda: 3) == 3
    assert multihost.agreed("ä") == "ä"
    found = multihost.gather({"x": jax.numpy.arange(3)})
    np.testing.assert_array_equal(found["x"], [0, 1, 2])
