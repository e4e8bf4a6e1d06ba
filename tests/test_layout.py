"""The import fences: which part may know which, and which library lives where."""

import ast
import time
from collections.abc import Iterator
from pathlib import Path

import pytest


PACKAGE = Path(__file__).parents[1] / "jaxalign"

# A part may import itself, everything in an earlier tier, and its own tier.
TIERS = (
    ("errors", "types", "trees"),
    ("objectives", "adapters", "data", "parallel"),
    ("models", "checkpoints", "generation", "training"),
    ("feedback", "evaluation"),
    ("cli",),
)
TIER = {part: tier for tier, parts in enumerate(TIERS) for part in parts}

# What ships inside an export for torch users stands alone.
APART = "adapters/torch_loader.py"

HOMES = {
    "flax": ("models/",),
    "optax": ("training/",),
    "orbax": ("checkpoints/",),
    "safetensors": ("checkpoints/",),
    "transformers": ("data/", "checkpoints/", "models/families/"),
    "openai": ("feedback/judges/",),
    "aiohttp": ("feedback/judges/",),
    "sqlite3": ("feedback/",),
    "fastapi": ("generation/server.py",),
    "uvicorn": ("generation/server.py",),
    "torch": (),
}


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


FILES = sorted(p for p in PACKAGE.rglob("*.py") if p.parent != PACKAGE)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_stay_inside_the_fences(path: Path) -> None:
    place = path.relative_to(PACKAGE).as_posix()
    tier = TIER[place.split("/")[0]]
    for name in imports(path):
        root, _, rest = name.partition(".")
        if root == "jaxalign" and rest.split(".")[0] in TIER:
            assert TIER[rest.split(".")[0]] <= tier, f"{place} imports {name}"
        if root in HOMES and place != APART:
            assert place.startswith(HOMES[root]), f"{place} imports {name}"


def test_objectives_know_neither_models_nor_training() -> None:
    for path in (PACKAGE / "objectives").rglob("*.py"):
        for name in imports(path):
            assert not name.startswith(("jaxalign.models", "jaxalign.training"))


def test_every_module_says_what_is_public_and_stays_small() -> None:
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert ast.get_docstring(tree), f"{path.name} has no docstring"
        names = [
            t.id
            for n in tree.body
            if isinstance(n, ast.Assign)
            for t in n.targets
            if isinstance(t, ast.Name)
        ]
        if path.relative_to(PACKAGE).as_posix() != "cli/__init__.py":
            assert "__all__" in names, f"{path} has no __all__"


def test_no_drawer_modules() -> None:
    names = {path.stem for path in PACKAGE.rglob("*.py")}
    assert not names & {"utils", "common", "helpers", "util", "misc"}


def test_import_is_quick_and_touches_no_device() -> None:
    import subprocess
    import sys

    code = (
        "import sys, jaxalign; "
        "print(sorted(m for m in ('jax', 'flax', 'torch', 'transformers') "
        "if m in sys.modules))"
    )
    began = time.perf_counter()
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert out.stdout.strip() == "[]"
    # A bare interpreter takes part of this; the bound is for a busy machine.
    assert time.perf_counter() - began < 10
