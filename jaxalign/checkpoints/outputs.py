"""Directories that appear under their name when they are complete, or not at all."""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from jaxalign.errors import UserError


__all__ = ["check_room", "whole_directory"]


@contextlib.contextmanager
def whole_directory(out: Path) -> Iterator[Path]:
    """Give a temporary directory that becomes ``out`` when all went well.

    Raises:
      UserError: ``out`` exists and is not empty, or the disk is full.
    """
    out = Path(os.path.abspath(out))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(
            f"--out {out} is there already and not empty: nothing is overwritten. Give "
            "another directory, or delete it"
        )
    temporary = out.with_name(f".{out.name}.tmp-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error}") from None
    try:
        yield temporary
        if out.exists():
            out.rmdir()
        temporary.rename(out)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"--out {out} cannot be written: {_reason(error)}. Make room, or give "
            "another directory; nothing was left there"
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def _reason(error: Exception) -> str:
    """Tell why a directory cannot be written; what was copied into it is not why."""
    number = getattr(error, "errno", None)
    return os.strerror(number) if number in _FULL and number else str(error)


def check_room(directory: Path, size: int) -> None:
    """Refuse to begin where the disk has no room for so many bytes.

    Raises:
      OSError: that it has not, as writing would raise it.
    """
    if shutil.disk_usage(directory).free < size:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
