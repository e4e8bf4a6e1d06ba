"""The log of a run: each step once, whatever was killed, whatever cannot be written."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from jaxalign.training import metrics
from jaxalign.training.event_files import EventFile
from jaxalign.training.metrics import MetricsLog
from tests.training.event_reader import shown


def steps_of(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def write(path: Path, *steps: int, start: int = 0, loss: float = 0.5) -> None:
    log = MetricsLog(path, start=start)
    for step in steps:
        log.write(step, {"loss": loss})
    log.close()


@pytest.mark.parametrize(
    ("start", "again", "want"),
    [
        (4, (5, 6), [0, 1, 2, 3, 4, 5, 6]),
        (2, (3,), [0, 1, 2, 3]),
        # No checkpoint: all begins anew, the evaluation before the first step too.
        (0, (0, 1), [0, 1]),
        # The line of a checkpoint's step is there before the checkpoint is.
        (7, (8,), [0, 1, 2, 3, 4, 5, 6, 7, 8]),
    ],
)
def test_a_resume_forgets_what_lies_past_its_checkpoint(
    tmp_path, start, again, want
) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, *range(8))
    before = path.read_text().splitlines()
    write(path, *again, start=start, loss=0.25)
    assert steps_of(path) == want
    # What stays does so to the last byte; what is new has the new values.
    lines = path.read_text().splitlines()
    kept = len(want) - len(again)
    assert lines[:kept] == before[:kept]
    assert [json.loads(line)["loss"] for line in lines[kept:]] == [0.25] * len(again)


@pytest.mark.parametrize(
    "torn", [b'{"step": 3, "ti', b"\x00\x00\x00", b'{"step": 2', "é".encode()[:1]]
)
def test_a_torn_line_is_forgotten(tmp_path, torn) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, 0, 1, 2)
    with path.open("ab") as file:
        file.write(torn)
    write(path, 3, start=2)
    assert steps_of(path) == [0, 1, 2, 3]


def test_steps_that_an_earlier_version_left_twice_stand_once(tmp_path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [{"step": step, "loss": loss} for step, loss in enumerate("abcde")]
    lines[3:3] = [{"step": 3, "loss": "old"}, {"step": 4, "loss": "old"}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    write(path, 5, start=4)
    assert steps_of(path) == [0, 1, 2, 3, 4, 5]
    assert "old" not in path.read_text()


def test_a_kill_while_forgetting_loses_nothing(tmp_path, monkeypatch) -> None:
    """The file is replaced as a whole: before that moment it is as it was."""
    path = tmp_path / "metrics.jsonl"
    write(path, *range(6))
    before = path.read_bytes()

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", killed)
        with pytest.raises(KeyboardInterrupt):
            MetricsLog(path, start=3)
    assert path.read_bytes() == before
    write(path, 4, start=3)
    assert steps_of(path) == [0, 1, 2, 3, 4]


def test_tensorboard_shows_each_step_once(tmp_path) -> None:
    first = EventFile(tmp_path, 0)
    for step in range(6):
        first.write(step, {"loss": 1.0 + step, "eval_loss": 7.0})
    first.flush()
    # As killed: never closed, and the last record is torn.
    (file,) = tmp_path.iterdir()
    with file.open("ab") as torn:
        torn.write(b"\x10\x00\x00\x00\x00\x00\x00\x00\x01")
    for start in (4, 2):
        again = EventFile(tmp_path, start + 1)
        for step in range(start + 1, 7):
            again.write(step, {"loss": 100.0 * start + step})
        again.close()
    first.close()
    assert shown(tmp_path) == {
        "train/loss": [*((s, 1.0 + s) for s in (0, 1, 2)),
                       *((s, 200.0 + s) for s in (3, 4, 5, 6))],
        "eval/loss": [(s, 7.0) for s in (0, 1, 2)],
    }  # fmt: skip


def test_tensorboard_has_what_was_logged_before_a_checkpoint(tmp_path) -> None:
    log = metrics.open_log(tmp_path, ("tensorboard",), {}, 0)
    for step in range(50):
        log.write(step, {"loss": float(step)})
    log.flush()
    there = shown(tmp_path / "tensorboard")["train/loss"]
    log.close()
    assert there == [(step, float(step)) for step in range(50)]


@pytest.mark.parametrize("failing", [0, 1])
def test_closing_closes_all_where_one_fails(tmp_path, failing) -> None:
    class Sink:
        closed = False

        def __init__(self, fails: bool):
            self.fails = fails

        def write(self, step: int, values: Any) -> None: ...

        def flush(self) -> None: ...

        def close(self) -> None:
            self.closed = True
            if self.fails:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    sinks = [Sink(i == failing) for i in range(2)]
    log = MetricsLog(tmp_path / "metrics.jsonl", sinks)
    with pytest.raises(OSError, match="No space left"):
        log.close()
    assert all(sink.closed for sink in sinks)
