"""The notebooks' scripts run cell by cell inside a live event loop, as in Jupyter."""

import ast
import asyncio
import inspect
import os
import re
from pathlib import Path
from typing import Any

import pytest


FOLDER = Path(__file__).parents[2] / "experiments" / "notebooks"
SCRIPTS = sorted(FOLDER.glob("*.py"))


def cells(path: Path) -> list[str]:
    """Return a script's cells, each below blank lines that keep its line numbers."""
    text = path.read_text(encoding="utf-8")
    starts = [match.start() for match in re.finditer(r"^# %%", text, re.MULTILINE)]
    assert starts, f"{path.name} has no cell"
    ends = [*starts[1:], len(text)]
    return [
        "\n" * text[:start].count("\n") + text[start:end]
        for start, end in zip(starts, ends, strict=True)
    ]


async def run_cells(path: Path) -> dict[str, Any]:
    """Execute all cells in one namespace; top-level await is allowed."""
    space: dict[str, Any] = {"__name__": "__main__", "__file__": str(path)}
    for cell in cells(path):
        code = compile(cell, str(path), "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        waiting = eval(code, space)  # a coroutine, where the cell awaits
        if inspect.isawaitable(waiting):
            await waiting
    return space


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path, tiny_llama: Path, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setitem(os.environ, "JAXALIGN_NOTEBOOK_MODEL", str(tiny_llama))
    # As ipykernel does it: the loop leaves SIGINT alone, which asyncio.run would not.
    loop = asyncio.new_event_loop()
    try:
        loop.run_until_complete(run_cells(path))
    finally:
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()


def lines_of_code(text: str) -> int:
    """Count lines that are neither blank nor comments."""
    lines = [line.strip() for line in text.splitlines()]
    return sum(bool(line) and not line.startswith("#") for line in lines)


def test_the_short_ways_stay_short() -> None:
    in_fit = cells(FOLDER / "02_own_objective.py")[-1]
    loss = "def ipo" + (FOLDER / "02_own_objective.py").read_text().split("def ipo")[1]
    assert lines_of_code(in_fit) + lines_of_code(loss.split("\n\n\n")[0]) <= 30
    judged = cells(FOLDER / "07_own_judge.py")
    steps = [cell.split("MODEL =")[-1] for cell in judged]  # without the imports
    assert sum(lines_of_code(cell) for cell in steps) <= 45
