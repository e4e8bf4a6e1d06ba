"""Pictures of records: where one comes from, its size, and opening it safely."""

from pathlib import Path
from typing import Any, NamedTuple


__all__ = ["Picture"]


class Picture(NamedTuple):
    """A picture that a record has, not opened yet."""

    source: Path | bytes
    where: str
    """File, line and field, for messages."""

    def read(self) -> bytes:
        """Return the file's bytes.

        Raises:
          UserError: it is not there; names the path tried.
        """
        raise NotImplementedError

    def size(self) -> tuple[int, int]:
        """Return width and height as :meth:`open` gives them, from the header alone.

        Raises:
          UserError: see :meth:`open`.
        """
        raise NotImplementedError

    def open(self) -> Any:
        """Return the picture as ``PIL.Image`` in RGB.

        EXIF's orientation is applied, alpha is laid on white, 16-bit grey is scaled to
        8 bits; of an animation the first frame is taken, which is said once.

        Raises:
          UserError: missing, no picture, cut off, or too many pixels.
        """
        raise NotImplementedError
