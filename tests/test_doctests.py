"""Every example in a docstring is run."""

import doctest
import importlib
from pathlib import Path

import pytest

import jaxalign


ROOT = Path(jaxalign.__file__).parent
MODULES = sorted(
    ".".join(("jaxalign", *path.relative_to(ROOT).with_suffix("").parts))
    for path in ROOT.rglob("*.py")
    if path.name != "__init__.py" and ">>>" in path.read_text(encoding="utf-8")
)


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted and not result.failed
