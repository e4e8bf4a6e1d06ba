"""Pictures of records: where one comes from, its size, and opening it safely."""

import base64
import contextlib
import functools
import hashlib
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from jaxalign import progress
from jaxalign.errors import UserError


__all__ = ["MOST_PIXELS", "Picture", "Stretch"]

MOST_PIXELS = 89_478_485
"""Of a picture: Pillow's own limit, a quarter of a GiB decoded. Kilobytes can claim to
be many more (a decompression bomb), so that the header is looked at first."""


class Stretch(NamedTuple):
    """Bytes that lie in a file among others."""

    path: str
    start: int
    length: int

    def read(self) -> bytes:
        """Return them."""
        with open(self.path, "rb") as file:
            return os.pread(file.fileno(), self.length, self.start)


class Picture(NamedTuple):
    """A picture that a record has, not opened yet."""

    source: Path | bytes | Stretch
    where: str
    """File, line and field, for messages."""

    def __repr__(self) -> str:
        """Name a picture by what it is of, not by its megabytes."""
        named = self.source
        if isinstance(named, bytes):
            named = f"sha256:{hashlib.sha256(named).hexdigest()}"
        return f"Picture({named}, {self.where!r})"

    def read(self) -> bytes:
        """Return the file's bytes.

        Raises:
          UserError: it is not there; names the path tried.
        """
        with self._file() as file:
            try:
                return file.read()
            except OSError as error:
                raise self._unread(error) from None

    def digest(self) -> str:
        """Return the SHA-256 of the file's bytes, in hexadecimal.

        Raises:
          UserError: see :meth:`read`.
        """
        return hashlib.sha256(self.read()).hexdigest()

    def data_url(self) -> str:
        """Return the file as a data URL, which texts can hold.

        Raises:
          UserError: see :meth:`open`.
        """
        from PIL import Image

        with self._header() as image:
            kind = Image.MIME.get(image.format, "image/png")
        return f"data:{kind};base64,{base64.b64encode(self.read()).decode('ascii')}"

    def size(self) -> tuple[int, int]:
        """Return width and height as :meth:`open` gives them, from the header alone.

        Raises:
          UserError: see :meth:`open`.
        """
        with self._header() as image:
            turned = _orientation(image) >= _SIDEWAYS
            return image.size[::-1] if turned else image.size

    def open(self) -> Any:
        """Return the picture as ``PIL.Image`` in RGB.

        EXIF's orientation is applied, alpha is laid on white, 16-bit grey is scaled to
        8 bits; of an animation the first frame is taken, which is said once.

        Raises:
          UserError: missing, no picture, cut off, or too many pixels.
        """
        with self._header() as image:
            turn = _TURNS.get(_orientation(image))
            if image.format in _ANIMATED and getattr(image, "is_animated", False):
                progress.say_once(
                    "some pictures are animations or have several pages: the first "
                    f"frame is taken, as of {self.where}"
                )
            image.load()
            rgb = self._rgb(image)
            return rgb if turn is None else rgb.transpose(turn)

    def thumbnail(self, side: int = 128) -> tuple[str, int, int]:
        """Return a small JPEG as a data URL, with its width and height.

        Args:
          side: most pixels of its longer side; 128 are some 4 KB.
        Raises:
          UserError: see :meth:`open`.
        """
        small = self.open()
        small.thumbnail((side, side))
        file = io.BytesIO()
        small.save(file, "JPEG", quality=80)
        code = base64.b64encode(file.getvalue()).decode("ascii")
        return f"data:image/jpeg;base64,{code}", small.width, small.height

    @contextlib.contextmanager
    def _header(self) -> Iterator[Any]:
        """Give the picture with its header read, and say what Pillow says of it."""
        from PIL import Image

        with self._file() as file:
            try:
                with Image.open(file, formats=_formats()) as image:
                    self._check(image.size)
                    yield image
            except UserError:
                raise
            except (Image.DecompressionBombError, Image.DecompressionBombWarning):
                raise self._too_large("more") from None
            except Image.UnidentifiedImageError:
                file.seek(0)
                raise UserError(
                    f"{self.where}: no picture: {self._named()} begins with "
                    f"{file.read(8)!r}. Expected one of {', '.join(_formats())}"
                ) from None
            except Exception as error:  # decoders raise many kinds on broken files
                raise UserError(
                    f"{self.where}: the picture is broken, cut off or of no known "
                    f"kind: {self._named()}: {type(error).__name__}: {error}. Save it "
                    "again, or leave the record out"
                ) from None

    def _check(self, size: tuple[int, int]) -> None:
        width, height = size
        if width < 1 or height < 1:
            raise UserError(
                f"{self.where}: a picture of {width} x {height} pixels: "
                f"{self._named()}. Leave the record out"
            )
        if width * height > MOST_PIXELS:
            raise self._too_large(f"{width} x {height}")

    def _too_large(self, count: str) -> UserError:
        return UserError(
            f"{self.where}: too many pixels: {self._named()}: at most "
            f"{MOST_PIXELS:,} are opened: got {count}. Scale the picture down"
        )

    def _rgb(self, image: Any) -> Any:
        """Return a picture in RGB, what is transparent white."""
        from PIL import Image

        if image.mode == "F":
            raise UserError(
                f"{self.where}: a picture of floats, whose range is not known: "
                f"{self._named()}. Scale it to 0..255 and save it as 8-bit grey"
            )
        if image.mode.startswith("I"):
            return Image.fromarray(self._eight_bits(image)).convert("RGB")
        if not image.has_transparency_data:
            return image.convert("RGB")
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(white, layer).convert("RGB")

    def _eight_bits(self, image: Any) -> np.ndarray:
        """Return 16-bit grey as 8-bit: v / 257, rounded."""
        values = np.asarray(image).astype(np.int64)
        lowest, highest = int(values.min()), int(values.max())
        if lowest < 0 or highest > 0xFFFF:
            raise UserError(
                f"{self.where}: integers of 32 bits, {lowest} to {highest}: "
                f"{self._named()}. Scale them to 0..255 and save 8-bit grey"
            )
        clear = image.info.get("transparency")
        grey = (values + 128) // 257
        if isinstance(clear, int):
            grey[values == clear] = 255
        return grey.astype(np.uint8)

    @contextlib.contextmanager
    def _file(self) -> Iterator[IO[bytes]]:
        source = self.source
        if isinstance(source, bytes):
            yield io.BytesIO(source)
            return
        try:
            if isinstance(source, Stretch):
                file: IO[bytes] = io.BytesIO(source.read())
            else:
                # Of what is no plain file, such as a pipe, reading may never end.
                if source.exists() and not source.is_file():
                    raise OSError("it is no file")
                file = source.open("rb")
        except (OSError, ValueError) as error:
            raise self._unread(error) from None
        with file:
            yield file

    def _unread(self, error: Exception) -> UserError:
        if isinstance(error, FileNotFoundError):
            return UserError(
                f"{self.where}: no picture there: tried {self._named()}. Put it there, "
                "or say where relative paths start with --image_dir DIR"
            )
        return UserError(
            f"{self.where}: {self._named()} cannot be read: {error}. Give a picture's "
            "file that can"
        )

    def _named(self) -> str:
        match self.source:
            case bytes():
                return f"{len(self.source)} bytes"
            case Stretch():
                path, start, length = self.source
                return f"{length} bytes of {path} from {start}"
            case _:
                return str(self.source)


_FORMATS = (
    *("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "DIB", "TIFF", "AVIF"),
    *("JPEG2000", "PPM"),
)
"""What is opened: pixels alone, nothing that runs a program or reads other files."""

# MPO is what telephones write: a photo, and behind it what its maker needs.
_ANIMATED = {"GIF", "PNG", "WEBP", "TIFF", "AVIF"}


@functools.cache
def _formats() -> tuple[str, ...]:
    from PIL import Image

    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


_SIDEWAYS = 5
# EXIF's orientation -> PIL.Image.Transpose, as PIL.ImageOps.exif_transpose has them.
_TURNS = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}


def _orientation(image: Any) -> int:
    """Return EXIF's orientation, 1 to 8, of a picture of which the header is read."""
    from PIL import Image

    if image.format == "TIFF":
        return 1  # Pillow turns these itself, and says their size as they then are
    # Of a PNG the method of its own decodes everything, to see what comes behind.
    given = Image.Image.getexif(image).get(0x0112, 1)
    return given if given in _TURNS else 1
