"""What a function of the user's can be known by when a run goes on."""

import functools
import hashlib
import inspect
import types
from typing import Any


__all__ = ["identity"]


def identity(function: Any) -> dict[str, str]:
    """Return a function's name and the SHA-256 of its code, as far as they can be seen.

    Equal code has an equal hash. What it closes over, imports or reads is not seen:
    that a run goes on with the same is then for the caller to know.

    Args:
      function: a function, a ``functools.partial`` of one or an object with
        ``__call__``.
    Returns:
      ``{"name", "code"}``.

    >>> identity(identity)["name"], len(identity(len)["code"])
    ('identity', 64)
    >>> identity(lambda x: x + 1) == identity(lambda x: x + 2)
    False
    """
    while isinstance(function, functools.partial):
        function = function.func
    code = getattr(function, "__code__", None)
    seen = function if code is not None else type(function)
    name = getattr(function, "__qualname__", type(function).__qualname__)
    try:
        text = inspect.getsource(seen)
    except (OSError, TypeError):  # typed at a prompt, or not of Python
        text = "" if code else name
    if code is not None and (not text or function.__name__ == "<lambda>"):
        text += _said(code)
    return {"name": name, "code": hashlib.sha256(text.encode()).hexdigest()}


def _said(code: types.CodeType) -> str:
    """Return compiled code as text that is the same in every process."""
    constants = [
        _said(c) if isinstance(c, types.CodeType) else repr(c) for c in code.co_consts
    ]
    return f" {code.co_code.hex()} {constants} {code.co_names}"
