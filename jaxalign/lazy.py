"""Packages whose modules are imported when they are first used (PEP 562)."""

import importlib
from collections.abc import Callable, Collection
from types import ModuleType


__all__ = ["submodules"]


def submodules(
    package: str, names: Collection[str]
) -> tuple[Callable[[str], ModuleType], Callable[[], list[str]]]:
    """Return ``__getattr__`` and ``__dir__`` of a package that imports on first use.

    So a command that needs no array imports no JAX: that takes seconds.
    """

    def import_named(name: str) -> ModuleType:
        if name not in names:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return importlib.import_module(f"{package}.{name}")

    return import_named, lambda: sorted(names)
