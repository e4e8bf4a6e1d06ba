"""Files that appear under their name when they are complete, or not at all."""

import contextlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

from jaxalign.errors import UserError


__all__ = ["check_target", "whole", "write_lines", "write_text", "writing"]


def check_target(path: Path) -> None:
    """Refuse to put a file in the place of a directory or a device.

    Raises:
      UserError: there is one, or no file can have that name.
    """
    with writing(path, "nothing was written"):
        taken = path.exists() and not path.is_file()
    if taken:
        raise UserError(f"{path} is not an ordinary file: give a file to write")


@contextlib.contextmanager
def whole(path: Path, kept: str) -> Iterator[TextIO]:
    """Give a text file to write; it gets its name after its last byte is on the disk.

    Args:
      path: where to.
      kept: what the user has not lost when writing fails, for the message.
    Raises:
      UserError: the disk is full or the place cannot be written.
    """
    check_target(path)
    with writing(path, kept):
        path.parent.mkdir(parents=True, exist_ok=True)
        with _complete(path) as file:
            yield file


@contextlib.contextmanager
def writing(what: object, kept: str) -> Iterator[None]:
    """Turn the system's errors into the user's.

    Args:
      what: is being written, for the message.
      kept: what the user has not lost, for the message.
    Raises:
      UserError: in the place of an OSError.
    """
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{what} cannot be written: {error}. Make room, or give another file; "
            f"{kept}"
        ) from None


def write_lines(path: Path, rows: Iterable[Any]) -> None:
    """Write JSON Lines, see :func:`write_text`."""
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def write_text(path: Path, text: str) -> None:
    """Write a file of a directory that is our own; errors are the system's."""
    with _complete(path) as file:
        file.write(text)


@contextlib.contextmanager
def _complete(path: Path) -> Iterator[TextIO]:
    part = path.with_name(f".{path.name}.part")
    try:
        with part.open("w", encoding="utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        with contextlib.suppress(OSError):
            part.unlink()
