"""Packages whose modules are imported when they are first used (PEP 562)."""

import importlib
import sys
from collections.abc import Callable, Collection
from types import ModuleType
from typing import Any


__all__ = ["submodules"]


class _Namespace(ModuleType):
    """A package whose modules show what ``__all__`` names, and no import of theirs."""

    def __setattr__(self, name: str, value: Any) -> None:
        # However a module is imported, Python then sets it on its package: the one
        # place that all of them pass.
        mine = f"{self.__name__}.{name}"
        if isinstance(value, ModuleType) and value.__name__ == mine:
            public = getattr(value, "__all__", ())
            value.__dict__.setdefault("__dir__", lambda: sorted(public))
        super().__setattr__(name, value)


def submodules(
    package: str, names: Collection[str]
) -> tuple[Callable[[str], ModuleType], Callable[[], list[str]]]:
    """Return ``__getattr__`` and ``__dir__`` of a package that imports on first use.

    So a command that needs no array imports no JAX: that takes seconds. What ``dir()``
    and completion show of its modules are their public names.
    """
    sys.modules[package].__class__ = _Namespace

    def import_named(name: str) -> ModuleType:
        if name not in names:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return importlib.import_module(f"{package}.{name}")

    return import_named, lambda: sorted(names)
