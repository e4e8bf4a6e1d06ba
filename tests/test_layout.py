"""The fences: which part may know which, where libraries live, how large things get."""

import ast
import functools
import graphlib
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest


PACKAGE = Path(__file__).parents[1] / "jaxalign"

# A part may import itself and what stands on a lower floor, not its neighbours.
FLOORS = (
    ("errors", "event_loops", "functions", "lazy"),
    ("variables",),
    ("types", "trees", "stacks", "whole_file", "configs", "progress", "shards"),
    ("products", "slices"),
    ("objectives", "adapters", "data", "parallel"),
    ("models",),
    ("checkpoints",),
    ("training", "generation"),
    ("judging",),
    ("feedback",),
    ("evaluation",),
    ("reports",),
    ("cli",),
)
FLOOR = {part: floor for floor, parts in enumerate(FLOORS) for part in parts}

# What ships inside an export for torch users stands alone.
APART = "adapters/torch_loader.py"

HOMES = {
    "flax": ("models/",),
    "optax": ("training/",),
    "orbax": ("checkpoints/",),
    "safetensors": ("checkpoints/",),
    "transformers": ("data/", "checkpoints/", "models/families/"),
    "llguidance": ("generation/structure.py",),
    "openai": ("judging/",),
    "aiohttp": ("judging/",),
    "sqlite3": ("judging/",),
    "fastapi": ("generation/serving/server.py",),
    "prometheus_client": ("generation/serving/metrics.py",),
    "uvicorn": ("generation/serving/server.py",),
    "matplotlib": ("reports/",),
    "pydantic": (
        "configs.py",
        "data/columns.py",
        "data/messages.py",
        "generation/serving/",
    ),
    "torch": (),
}

LONGEST_FILE = 400
# One file for one file format, all of whose tables belong together.
LONG_FILES = {"checkpoints/gguf.py"}
LONGEST_FUNCTION = 60

FILES = sorted(p for p in PACKAGE.rglob("*.py") if p.parent != PACKAGE)
IDS = [str(p.relative_to(PACKAGE)) for p in FILES]


def place_of(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path: Path) -> Iterator[str]:
    """Yield what a file imports anywhere, but for checkers of types alone."""
    hidden = {
        id(inner)
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(parsed(path)):
        if id(node) in hidden:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def file_of(name: str) -> Path | None:
    """Return our file that an imported name is in, None if it is none of ours."""
    parts = name.split(".")
    while parts[0] == "jaxalign" and len(parts) > 1:
        stem = PACKAGE.joinpath(*parts[1:])
        for path in (stem.with_suffix(".py"), stem / "__init__.py"):
            if path.is_file():
                return path
        parts.pop()
    return None


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_imports_stay_inside_the_fences(path: Path) -> None:
    place = place_of(path)
    part = place.split("/")[0]
    for name in imports(path):
        root, _, rest = name.partition(".")
        other = rest.split(".")[0]
        if root == "jaxalign" and other in FLOOR and other != part:
            assert FLOOR[other] < FLOOR[part], f"{place} imports {name}"
        if root in HOMES and place != APART:
            assert place.startswith(HOMES[root]), f"{place} imports {name}"


def test_the_ground_floor_imports_nothing_above_itself() -> None:
    for path in PACKAGE.glob("*.py"):
        if path.stem == "__init__":
            continue
        for name in imports(path):
            root, _, rest = name.partition(".")
            if root == "jaxalign":
                other = rest.split(".")[0]
                assert FLOOR[other] < FLOOR[path.stem], f"{path.name} imports {name}"


def test_every_part_has_its_floor() -> None:
    parts = {p.stem for p in PACKAGE.glob("*.py")} | {
        p.name for p in PACKAGE.iterdir() if (p / "__init__.py").is_file()
    }
    assert parts - {"__init__"} == FLOOR.keys()


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Return the nodes of a circle, none where there is none.

    >>> circle({"a": {"b"}, "b": {"a"}})
    ['a', 'b', 'a']
    """
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return sorted(error.args[1][:-1]) + sorted(error.args[1][:-1])[:1]
    return []


def test_no_files_import_in_a_circle() -> None:
    graph: dict[str, set[str]] = {}
    for path in FILES:
        found = {file_of(name) for name in imports(path)} - {None, path}
        # A package's own file only opens its doors.
        graph[place_of(path)] = {
            place_of(other)
            for other in found
            if other is not None and other.name != "__init__.py"
        }
        if path.name == "__init__.py":
            graph[place_of(path)] = set()
    assert circle(graph) == []


def test_no_packages_import_in_a_circle() -> None:
    """Neither the packages of a floor nor those inside a package."""
    graph: dict[str, set[str]] = {}
    for path in FILES:
        home = place_of(path.parent)
        mine = graph.setdefault(home, set())
        for name in imports(path):
            other = file_of(name)
            if other is None or other.parent in (path.parent, PACKAGE):
                continue
            there = place_of(other.parent)
            # A package may use its own parts, and they what stands beside them.
            if not there.startswith(f"{home}/") and not home.startswith(f"{there}/"):
                mine.add(there)
    assert circle(graph) == []


def test_a_circle_is_found() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == ["a", "b", "c", "a"]
    assert circle({"a": {"b"}, "b": {"c"}}) == []


def test_objectives_know_neither_models_nor_training() -> None:
    for path in (PACKAGE / "objectives").rglob("*.py"):
        for name in imports(path):
            assert not name.startswith(("jaxalign.models", "jaxalign.training"))


def test_every_module_says_what_it_is_and_what_is_public() -> None:
    for path in PACKAGE.rglob("*.py"):
        tree = parsed(path)
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


def code_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Count a function's lines without its docstring."""
    lines = (node.end_lineno or node.lineno) - node.lineno + 1
    first = node.body[0]
    if ast.get_docstring(node) is not None:
        lines -= (first.end_lineno or first.lineno) - first.lineno + 1
    return lines


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_files_and_functions_stay_small(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    if place_of(path) not in LONG_FILES:
        assert lines <= LONGEST_FILE, f"{place_of(path)} has {lines} lines"
    long = {
        node.name: code_lines(node)
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and code_lines(node) > LONGEST_FUNCTION
    }
    assert not long, f"{place_of(path)} has functions of {long} lines"


def test_no_drawer_modules() -> None:
    names = {path.stem for path in PACKAGE.rglob("*.py")}
    assert not names & {"utils", "common", "helpers", "util", "misc"}


def loaded_by(statement: str) -> set[str]:
    """Return the modules that a fresh interpreter has after a statement."""
    code = f"import sys\n{statement}\nprint(*sys.modules)"
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    return set(out.stdout.split())


def test_import_is_quick_and_touches_no_device() -> None:
    began = time.perf_counter()
    found = loaded_by("import jaxalign")
    assert not found & {"jax", "flax", "torch", "transformers"}
    # A bare interpreter takes part of this; the bound is for a busy machine.
    assert time.perf_counter() - began < 10


def test_generating_text_imports_no_trainer() -> None:
    found = loaded_by("import jaxalign.generation.files")
    assert not {name for name in found if name.startswith("jaxalign.training")}
    assert not found & {"optax", "grain"}
