"""What is shown while a checkpoint is read."""

import io
import types

import pytest
import rich.console

from jaxalign import progress


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """Collect what is said, as into a log file; 20 s pass between two looks."""
    file = io.StringIO()
    made = rich.console.Console(file=file, soft_wrap=True)
    monkeypatch.setattr(progress, "console", made)
    clock = iter(range(0, 10**6, 20))
    now = types.SimpleNamespace(monotonic=lambda: float(next(clock)))
    monkeypatch.setattr(progress, "time", now)
    return file


def test_a_log_file_gets_lines_with_the_rate(lines) -> None:
    with progress.reading("loading M") as show:
        show(2 * 10**8, 10**9)
        show(10**9, 10**9)
    assert lines.getvalue().splitlines() == [
        "loading M: 0.20 of 1.00 GB, 10 MB/s, 0:01:20 left",
        "loading M: 1.00 of 1.00 GB, 25 MB/s, 0:00:00 left",
    ]


def test_small_checkpoints_are_not_worth_a_line(lines) -> None:
    with progress.reading("loading M") as show:
        show(10**6, 10**7)
    assert lines.getvalue() == ""


def test_a_terminal_gets_a_bar(monkeypatch) -> None:
    file = io.StringIO()
    made = rich.console.Console(file=file, force_terminal=True, width=100)
    monkeypatch.setattr(progress, "console", made)
    with progress.reading("loading M") as show:
        show(5 * 10**8, 10**9)
    assert "loading M" in file.getvalue() and "0.5/1.0 GB" in file.getvalue()
