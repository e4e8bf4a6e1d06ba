"""Our pictures against the 50 that were published, cell by cell."""

import csv
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxalign.errors import UserError
from jaxalign.evaluation import figstep_pictures as pictures
from jaxalign.evaluation.figstep_pictures import Font


TEXT = "Steps to cook, bake and ice a cake."


def font() -> Font:
    try:
        return pictures.find_font()
    except UserError as error:
        pytest.skip(str(error))


def ink_of(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("L")) < 128


def cells(ink: np.ndarray) -> np.ndarray:
    """Return which cells hold ink above the baseline, ``[line, column]``.

    Below it are the descenders, which reach into the next line's cells.
    """
    found = np.zeros((10, pictures.COLUMNS), bool)
    for row, column in np.ndindex(found.shape):
        base = pictures.BASELINE + pictures.PITCH * row
        left = pictures.LEFT + pictures.CELL * column
        found[row, column] = ink[base - 46 : base, left + 4 : left + 44].any()
    return found


def wanted(lines: list[str]) -> np.ndarray:
    found = np.zeros((10, pictures.COLUMNS), bool)
    for row, line in enumerate(lines[:10]):
        for column, letter in enumerate(line):
            found[row, column] = letter != " "
    return found


def box(ink: np.ndarray) -> tuple[int, int, int, int]:
    rows, columns = np.flatnonzero(ink.any(1)), np.flatnonzero(ink.any(0))
    return columns[0], rows[0], columns[-1], rows[-1]


@pytest.fixture
def published(shared_data: Path) -> list[tuple[str, Image.Image]]:
    folder = shared_data / "dream" / "FigStep-Benign"
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent")
    text = (folder / "question/SafeBench-Tiny-Benign.csv").read_text("utf-8-sig")
    found = []
    for number, row in enumerate(csv.DictReader(io.StringIO(text))):
        with Image.open(folder / "images" / f"{number}.png") as image:
            found.append((row["benign_instruction"], image.convert("RGB")))
    return found


@pytest.mark.data
def test_size_and_line_breaks_are_the_published_ones(
    published: list[tuple[str, Image.Image]],
) -> None:
    assert len(published) == 50
    for number, (instruction, image) in enumerate(published):
        assert image.size == (pictures.SIDE, pictures.SIDE)
        want = wanted(pictures.lines_of(instruction))
        np.testing.assert_array_equal(cells(ink_of(image)), want, str(number))


@pytest.mark.data
def test_ours_fill_the_same_cells_and_box(
    published: list[tuple[str, Image.Image]],
) -> None:
    mine = font()
    # A replacement's shapes differ, by less than half a cell; its cells do not.
    slack = 1 if mine.official else pictures.CELL // 2
    for number, (instruction, image) in enumerate(published):
        with Image.open(io.BytesIO(pictures.rendered(instruction, mine))) as made:
            assert made.size == image.size and made.mode == "RGB"
            ours, theirs = ink_of(made), ink_of(image)
        np.testing.assert_array_equal(cells(ours), cells(theirs), str(number))
        distance = np.abs(np.subtract(box(ours), box(theirs))).max()
        assert distance <= slack, (number, mine.name)


def test_letters_lie_in_their_cells() -> None:
    with Image.open(io.BytesIO(pictures.rendered(TEXT, font()))) as made:
        ink = ink_of(made)
    lines = ["Steps to cook,", "bake and ice a", "cake.", "1. ", "2. ", "3. "]
    assert pictures.lines_of(TEXT) == lines
    np.testing.assert_array_equal(cells(ink), wanted(lines))


def test_a_picture_is_the_same_each_time() -> None:
    assert pictures.rendered(TEXT, font()) == pictures.rendered(TEXT, font())


def test_a_long_text_is_cut_at_the_edge() -> None:
    text = " ".join(["abcdefghijklmn"] * 12)
    assert len(pictures.lines_of(text)) == 15
    with Image.open(io.BytesIO(pictures.rendered(text, font()))) as made:
        assert made.size == (760, 760)


def test_without_a_font_the_package_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="fonts-freefont-ttf"):
        pictures.find_font((str(tmp_path),))


def test_freemono_comes_before_its_replacements(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for name in ("a/FreeMonoBold.otf", "DejaVuSansMono-Bold.ttf"):
        (tmp_path / name).write_bytes(b"no font")
    found = pictures.find_font((str(tmp_path),))
    assert found.official and found.name == "FreeMonoBold"
    with pytest.raises(UserError, match="FreeMonoBold.otf cannot be read"):
        pictures.rendered("a", found)
