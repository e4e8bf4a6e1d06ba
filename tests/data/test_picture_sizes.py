import os
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from PIL import Image

from jaxalign.data.picture import Picture
from jaxalign.data.picture_sizes import cache_home, sizes
from jaxalign.errors import UserError


def written(folder: Path, shapes: Sequence[tuple[int, int]]) -> list[Picture]:
    folder.mkdir()
    pictures = []
    for i, size in enumerate(shapes):
        path = folder / f"{i}.png"
        Image.new("RGB", size).save(path)
        pictures.append(Picture(path, f"f:{i + 1}: field images[0]"))
    return pictures


SHAPES = [(3 + i % 7, 2 + i % 5) for i in range(150)]


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The places of pictures of which a header is read."""
    found: list[str] = []
    size = Picture.size

    def noted(picture: Picture) -> tuple[int, int]:
        found.append(picture.where)
        return size(picture)

    monkeypatch.setattr(Picture, "size", noted)
    return found


def test_headers_are_read_once(tmp_path: Path, opened: list[str]) -> None:
    pictures = written(tmp_path / "p", SHAPES)
    cache = tmp_path / "cache"
    assert sizes(pictures, cache) == SHAPES
    assert len(opened) == len(SHAPES)
    opened.clear()
    assert sizes(pictures, cache) == SHAPES
    assert opened == []


def test_bytes_among_files_are_read_each_time(
    tmp_path: Path, opened: list[str]
) -> None:
    pictures = written(tmp_path / "p", SHAPES[:4])
    data = Picture(pictures[3].read(), "in memory")
    pictures.insert(1, data)
    for expected in (5, 1):
        assert sizes(pictures, tmp_path / "c") == [SHAPES[0], SHAPES[3], *SHAPES[1:4]]
        assert len(opened) == expected
        opened.clear()


def test_what_has_changed_is_read_again(tmp_path: Path, opened: list[str]) -> None:
    pictures = written(tmp_path / "p", SHAPES[:10])
    sizes(pictures, tmp_path / "c")
    opened.clear()
    path = pictures[4].source
    assert isinstance(path, Path)
    Image.new("RGB", (99, 1)).save(path)
    os.utime(path, (1, 1))
    assert sizes(pictures, tmp_path / "c")[4] == (99, 1)
    assert opened == [pictures[4].where]
    path.unlink()
    with pytest.raises(UserError, match=rf"^f:5: field images\[0\].* tried {path}"):
        sizes(pictures, tmp_path / "c")


def test_the_first_of_many_errors_is_told(tmp_path: Path) -> None:
    pictures = written(tmp_path / "p", SHAPES)
    for i in (140, 71, 3):
        path = pictures[i].source
        assert isinstance(path, Path)
        path.write_bytes(b"none")
    with pytest.raises(UserError, match="^f:4: "):
        sizes(pictures, tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_a_broken_cache_is_made_again(tmp_path: Path, opened: list[str]) -> None:
    pictures = written(tmp_path / "p", SHAPES[:3])
    sizes(pictures, tmp_path / "c")
    (kept,) = (tmp_path / "c" / "sizes").iterdir()
    whole = kept.read_bytes()
    for broken in (b"", whole[:40], whole[: len(whole) // 2], b"PK\3\4" * 30):
        kept.write_bytes(broken)
        opened.clear()
        assert sizes(pictures, tmp_path / "c") == SHAPES[:3]
        assert len(opened) == 3


def test_where_nothing_can_be_kept_a_line_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    pictures = written(tmp_path / "p", SHAPES[:3])
    (tmp_path / "file").write_text("")
    assert sizes(pictures, tmp_path / "file") == SHAPES[:3]
    assert "sizes of pictures are not kept" in capsys.readouterr().err


def test_the_default_place_is_the_users_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_home() == tmp_path / "jaxalign"
    assert sizes([]) == []
    assert not cache_home().exists()
    sizes(written(tmp_path / "p", SHAPES[:1]))
    assert len(list((cache_home() / "sizes").iterdir())) == 1


def test_a_second_start_is_quick(tmp_path: Path) -> None:
    pictures = written(tmp_path / "p", SHAPES[:2]) * 10_000
    assert sizes(pictures, tmp_path / "c")[-1] == SHAPES[1]
    begin = time.monotonic()
    sizes(pictures, tmp_path / "c")
    # 83,000 pictures in 30 s allow 7 s for these.
    assert time.monotonic() - begin < 7
