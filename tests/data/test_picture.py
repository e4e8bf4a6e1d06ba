import functools
import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from jaxalign import progress
from jaxalign.data.picture import MOST_PIXELS, Picture, Stretch
from jaxalign.errors import UserError


WHERE = "f.jsonl:3: field images[0]"


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def opened(data: bytes | Path) -> np.ndarray:
    picture = Picture(data, WHERE)
    image = picture.open()
    assert image.mode == "RGB"
    assert image.size == picture.size()
    return np.asarray(image)


def one_color(mode: str, color: object, size: tuple[int, int] = (2, 3)) -> Image.Image:
    return Image.new(mode, size, color)  # pyright: ignore[reportArgumentType]


@pytest.fixture
def photo() -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (5, 7, 3), np.uint8))


def test_a_picture_is_opened_as_its_pixels(photo: Image.Image, tmp_path: Path) -> None:
    path = tmp_path / "p.png"
    path.write_bytes(encoded(photo))
    np.testing.assert_array_equal(opened(path), np.asarray(photo))
    assert Picture(path, WHERE).size() == (7, 5)
    assert Picture(path, WHERE).read() == path.read_bytes()


def test_a_stretch_of_a_file_is_a_picture_too(
    photo: Image.Image, tmp_path: Path
) -> None:
    data, path = encoded(photo), tmp_path / "many.bin"
    path.write_bytes(b"before" + data + b"behind")
    stretch = Picture(Stretch(str(path), 6, len(data)), WHERE)
    assert stretch.read() == data
    assert stretch.size() == (7, 5)
    assert stretch.digest() == Picture(data, WHERE).digest()


def test_the_digest_is_that_of_the_file() -> None:
    known = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert Picture(b"", WHERE).digest() == known


def test_what_is_transparent_is_white() -> None:
    # 0.25 of black on white, rounded as Pillow does: 255 - 64.
    np.testing.assert_array_equal(
        opened(encoded(one_color("RGBA", (0, 0, 0, 64)))), np.full((3, 2, 3), 191)
    )
    np.testing.assert_array_equal(
        opened(encoded(one_color("LA", (40, 0)))), np.full((3, 2, 3), 255)
    )


def test_a_palette_has_a_transparent_entry() -> None:
    image = one_color("P", 0, (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    data = encoded(image, transparency=1)
    assert opened(data).tolist() == [[[10, 20, 30], [255, 255, 255]]]
    assert opened(encoded(image)).tolist() == [[[10, 20, 30], [40, 50, 60]]]


def test_grey_of_sixteen_bits_is_scaled_not_clipped() -> None:
    values = np.array([[0, 128, 129, 257, 32768, 65535]], np.uint16)
    got = opened(encoded(Image.fromarray(values)))
    assert got[0, :, 0].tolist() == [0, 0, 1, 1, 128, 255]
    assert (got == got[..., :1]).all()
    as_tiff = opened(encoded(Image.fromarray(values), "TIFF"))
    np.testing.assert_array_equal(as_tiff, got)


def test_a_transparent_grey_of_sixteen_bits_is_white() -> None:
    values = Image.fromarray(np.array([[0, 1000]], np.uint16))
    got = opened(encoded(values, transparency=1000))
    assert got[0, :, 0].tolist() == [0, 255]


@pytest.mark.parametrize(
    ("mode", "color", "kind", "expected"),
    [
        ("1", 1, "PNG", (255, 255, 255)),
        ("L", 90, "PNG", (90, 90, 90)),
        ("CMYK", (0, 255, 255, 0), "TIFF", (255, 0, 0)),
        ("RGB", (1, 2, 3), "BMP", (1, 2, 3)),
        ("RGB", (1, 2, 3), "PPM", (1, 2, 3)),
    ],
)
def test_modes_become_rgb(
    mode: str, color: object, kind: str, expected: tuple[int, int, int]
) -> None:
    got = opened(encoded(one_color(mode, color), kind))
    np.testing.assert_array_equal(got, np.broadcast_to(expected, (3, 2, 3)))


def test_a_jpeg_of_inks_is_red_where_it_was() -> None:
    data = encoded(one_color("CMYK", (0, 255, 255, 0), (16, 16)), "JPEG")
    np.testing.assert_allclose(opened(data)[8, 8], (255, 0, 0), atol=3)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_the_picture(
    photo: Image.Image, kind: str, orientation: int
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(photo, kind, exif=exif)
    with Image.open(io.BytesIO(data)) as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    np.testing.assert_array_equal(opened(data), expected)
    assert Picture(data, WHERE).size() == ((5, 7) if orientation > 4 else (7, 5))


def test_the_size_is_read_from_the_header_alone(photo: Image.Image) -> None:
    data = encoded(photo.resize((300, 200)))
    assert Picture(data[:60], WHERE).size() == (300, 200)
    with pytest.raises(UserError, match="broken, cut off"):
        Picture(data[:-300], WHERE).open()


def test_of_an_animation_the_first_frame_is_taken_and_said_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said: list[str] = []
    monkeypatch.setattr(progress, "say_once", functools.cache(said.append))
    frames = [one_color("RGB", color) for color in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    for _ in range(2):
        np.testing.assert_array_equal(opened(data)[0, 0], (255, 0, 0))
    assert len(said) == 1
    assert WHERE in said[0]
    opened(encoded(frames[0], "GIF"))
    assert len(said) == 1


def png(width: int, height: int) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data))
            + name
            + data
            + struct.pack(">I", zlib.crc32(name + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(b"\0" * 1000)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", pixels)
        + chunk(b"IEND", b"")
    )


# The last two are more than Pillow itself warns of, and more than it opens.
@pytest.mark.parametrize("width", [MOST_PIXELS // 1000 + 1, 150_000, 2_000_000])
def test_a_bomb_is_refused_by_its_header(width: int) -> None:
    for act in (Picture.size, Picture.open):
        with pytest.raises(UserError, match=r"too many pixels: .*at most 89,478,485"):
            act(Picture(png(width, 1000), WHERE))


def test_what_is_no_picture_is_refused(tmp_path: Path, photo: Image.Image) -> None:
    def refused(source: Path | bytes, match: str) -> None:
        for act in (Picture.size, Picture.open):
            with pytest.raises(UserError, match=match) as caught:
                act(Picture(source, WHERE))
            assert str(caught.value).startswith(WHERE)

    refused(tmp_path / "no.png", rf"tried {tmp_path}/no.png\. .*image_dir DIR")
    refused(tmp_path, "cannot be read: it is no file")
    refused(b"", "no picture: 0 bytes begins with b''. Expected one of PNG, JPEG")
    refused(b"<svg></svg>", "no picture: 11 bytes begins with b'<svg></s'")
    refused(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no picture")
    refused(png(0, 5), "a picture of 0 x 5 pixels|no picture|broken")
    with pytest.raises(UserError, match=r"floats.* Scale it to 0\.\.255"):
        Picture(encoded(one_color("F", 0.5), "TIFF"), WHERE).open()
    with pytest.raises(UserError, match="integers of 32 bits, 70000 to 70000"):
        Picture(encoded(one_color("I", 70000), "TIFF"), WHERE).open()
    for kind in ("PNG", "JPEG", "WEBP", "TIFF", "BMP"):
        whole = encoded(photo.resize((64, 64)), kind)
        with pytest.raises(UserError, match=r"broken, cut off|no picture"):
            Picture(whole[: len(whole) // 2], WHERE).open()


def test_a_picture_in_memory_is_named_by_its_digest() -> None:
    shown = repr(Picture(b"x" * 10**6, WHERE))
    assert len(shown) < 150
    assert shown != repr(Picture(b"y" * 10**6, WHERE))


def samples() -> list[bytes]:
    rng = np.random.default_rng(1)
    noise = Image.fromarray(rng.integers(0, 256, (17, 23, 4), np.uint8), "RGBA")
    plain, exif = noise.convert("RGB"), Image.Exif()
    exif[0x0112] = 6
    grey = Image.fromarray(rng.integers(0, 65536, (9, 11)).astype(np.uint16))
    return [
        encoded(noise),
        encoded(plain, "JPEG", exif=exif),
        encoded(plain, "JPEG", progressive=True),
        encoded(noise, "WEBP", exif=exif),
        encoded(plain.convert("P"), "GIF", save_all=True, append_images=[plain]),
        encoded(grey),
        encoded(grey, "TIFF"),
        encoded(plain.convert("CMYK"), "TIFF", compression="tiff_lzw"),
        encoded(plain, "BMP"),
        encoded(plain, "PPM"),
        encoded(plain, "AVIF"),
        encoded(plain, "JPEG2000"),
    ]


def test_two_thousand_broken_pictures_give_clean_errors() -> None:
    found, rng = samples(), np.random.default_rng(2)
    fine = refused = 0
    for i in range(2000):
        data = bytearray(found[i % len(found)])
        for _ in range(rng.integers(1, 6)):
            # Headers are where it matters.
            last = len(data) if rng.random() < 0.5 else min(len(data), 64)
            place = int(rng.integers(last))
            match rng.integers(4):
                case 0:
                    data[place] ^= 1 << int(rng.integers(8))
                case 1:
                    data[place] = 255
                case 2:
                    del data[place : place + int(rng.integers(1, 9))]
                    data += b"\0"
                case _:
                    data = data[: max(1, int(rng.integers(len(data))))]
        picture = Picture(bytes(data), WHERE)
        try:
            image = picture.open()
        except UserError as error:
            assert str(error).startswith(WHERE)
            refused += 1
            continue
        fine += 1
        assert (image.mode, image.size) == ("RGB", picture.size())
    assert min(fine, refused) > 200
