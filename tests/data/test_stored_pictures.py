import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from jaxalign.data import records, stored_pictures, tfds_builders
from jaxalign.data.picture import Stretch
from jaxalign.errors import UserError


pa = pytest.importorskip("pyarrow")


def png(width: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, 2), "red").save(file, "PNG")
    return file.getvalue()


def row(i: int) -> dict[str, Any]:
    image = {"bytes": png(i + 1), "path": None}
    if i == 3:
        image = {"bytes": None, "path": "/a.png"}
    return {"image": image, "question": f"{i}?", "chosen": "a", "rejected": "b"}


ROWS = [row(i) for i in range(200)]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(stored_pictures, "LARGE", 1)
    return tmp_path / "cache" / "jaxalign" / "pictures"


def parquet(path: Path, rows: list[dict[str, Any]]) -> str:
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=70)
    return str(path)


def saved(path: Path, rows: list[dict[str, Any]]) -> str:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(rows).save_to_disk(path)
    return str(path)


@pytest.mark.parametrize("write", [parquet, saved])
def test_rows_say_where_their_pictures_lie(
    write: Any, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "rows.parquet", ROWS)
    first = records.read(source)
    (folder,) = cache.iterdir()
    assert (folder / "pictures.bin").stat().st_size == sum(
        len(r["image"]["bytes"] or b"") for r in ROWS
    )
    for i, record in enumerate(first):
        (picture,) = record.images
        assert record.where.endswith(f":row {i + 1}")
        if i == 3:
            assert picture.source == Path("/a.png")
            continue
        assert isinstance(picture.source, Stretch)
        assert picture.read() == ROWS[i]["image"]["bytes"]
        assert picture.size() == (i + 1, 2)
    # The second reading copies nothing.
    monkeypatch.setattr(stored_pictures, "_copy", None)
    assert records.read(source) == first


def test_a_table_that_has_changed_is_copied_again(tmp_path: Path, cache: Path) -> None:
    records.read(parquet(tmp_path / "f.parquet", ROWS[:5]))
    (found,) = records.read(parquet(tmp_path / "f.parquet", ROWS[5:6]))
    assert found.images[0].size() == (6, 2)
    assert len(list(cache.iterdir())) == 2


def test_small_tables_stay_in_memory(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored_pictures, "LARGE", 10**9)
    record = records.read(parquet(tmp_path / "f.parquet", ROWS[:3]))[2]
    assert record.images[0].source == ROWS[2]["image"]["bytes"]
    assert not cache.exists()


def test_a_broken_cache_is_said(tmp_path: Path, cache: Path) -> None:
    source = parquet(tmp_path / "f.parquet", ROWS[:5])
    records.read(source)
    (folder,) = cache.iterdir()
    lines = folder / "rows.jsonl"
    lines.write_text(lines.read_text()[:-30])
    with pytest.raises(UserError, match=r"is broken: .*Remove it: it is made again"):
        records.read(source)
    lines.write_text("")
    with pytest.raises(UserError, match="is broken: "):
        records.read(source)


def test_stored_pictures_are_converted_as_others(tmp_path: Path, cache: Path) -> None:
    source = parquet(tmp_path / "f.parquet", ROWS[:3])
    out = tmp_path / "out.jsonl"
    assert tfds_builders.write_jsonl("rlaif_v", source, out).kept == 3
    found = records.read(out)
    assert [r.images[0].size() for r in found] == [(1, 2), (2, 2), (3, 2)]
