"""Sources other than one file: patterns, saved data sets, the hub."""

import sys
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from jaxalign.data import records, rows
from jaxalign.errors import UserError
from tests import synthetic


ROWS: list[dict[str, Any]] = [
    {
        "prompt": f"Größe {i}?",
        "chosen": "好 ja 😀.",
        "rejected": "no",
        "chosen_segments": [{"start": 0, "end": 6, "scores": scores}],
        "rejected_segments": segments,
    }
    for i, (scores, segments) in enumerate(
        [({"clarity": 1.5}, None), ({"safety": 2.0}, []), ({"clarity": 0.0}, None)]
    )
]


def plain(source: str | Path) -> list[records.Record]:
    return [record._replace(where="") for record in records.read(source)]


def expected(tmp_path: Path) -> list[records.Record]:
    return plain(synthetic.write_jsonl(tmp_path / "expected.jsonl", ROWS))


def write_parquet(path: Path, found: list[dict[str, Any]]) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(found), path)
    return path


def saved(directory: Path, found: list[dict[str, Any]], **options: Any) -> Path:
    import datasets

    datasets.Dataset.from_list(found).save_to_disk(directory, **options)
    return directory


def test_pattern_reads_files_in_the_order_of_their_names(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train-00001.parquet", ROWS[1:])
    write_parquet(tmp_path / "train-00000.parquet", ROWS[:1])
    write_parquet(tmp_path / "test-00000.parquet", ROWS)
    source = f"{tmp_path}/train-*.parquet"
    assert plain(source) == expected(tmp_path)
    assert records.read(source)[2].where == f"{tmp_path}/train-00001.parquet:row 2"
    synthetic.write_jsonl(tmp_path / "train-00002.jsonl", ROWS[:1])
    assert len(plain(f"{tmp_path}/train-*")) == 4


def test_a_name_with_the_signs_of_a_pattern_is_a_file(tmp_path: Path) -> None:
    path = synthetic.write_jsonl(tmp_path / "a[1]*.jsonl", ROWS)
    assert plain(path) == expected(tmp_path)


def test_pattern_without_a_file(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"x-\*\.jsonl is not a file: expected a \.json"
    ):
        records.read(f"{tmp_path}/x-*.jsonl")


def test_saved_data_set(tmp_path: Path) -> None:
    directory = saved(tmp_path / "saved", ROWS, num_shards=2)
    assert plain(directory) == expected(tmp_path)
    found = records.read(directory)
    assert found[0].where == f"{directory}/data-00000-of-00002.arrow:row 1"


def test_saved_data_set_that_was_shuffled(tmp_path: Path) -> None:
    import datasets

    picked = datasets.Dataset.from_list(ROWS).select([2, 0])
    picked.save_to_disk(tmp_path / "picked")
    found = expected(tmp_path)
    assert plain(tmp_path / "picked") == [found[2], found[0]]


def test_saved_data_set_is_read_without_the_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = saved(tmp_path / "saved", ROWS)
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert plain(directory) == expected(tmp_path)


def test_directories_of_other_kinds(tmp_path: Path) -> None:
    import datasets

    splits = {"train": datasets.Dataset.from_list(ROWS)}
    splits["test"] = splits["train"]
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "splits")
    with pytest.raises(
        UserError, match=r"several splits: add one of \['test', 'train'"
    ):
        records.read(tmp_path / "splits")
    assert plain(tmp_path / "splits" / "train") == expected(tmp_path)
    (tmp_path / "parquet").mkdir()
    write_parquet(tmp_path / "parquet" / "train-0.parquet", ROWS)
    with pytest.raises(
        UserError, match=r"of one split, such as '.*/train-\*\.parquet'"
    ):
        records.read(tmp_path / "parquet")
    (tmp_path / "tfds").mkdir()
    (tmp_path / "tfds" / "features.json").write_text("{}")
    with pytest.raises(UserError, match="tensorflow-datasets set: give tfds:.*:SPLIT"):
        records.read(tmp_path / "tfds")


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ("{", "state.json: not as datasets writes it: JSONDecodeError"),
        ("[]", "state.json: not as datasets writes it: TypeError"),
        ('{"_data_files": [{}]}', "state.json: not as datasets writes it: KeyError"),
        (
            '{"_data_files": [], "_indices_data_files": [{"filename": "i"}]}',
            "rows are picked through an index",
        ),
        ('{"_data_files": [{"filename": "no"}]}', "no: not a readable Arrow file"),
        ('{"_data_files": [{"filename": "state.json"}]}', "not a readable Arrow file"),
        ('{"_data_files": []}', "holds no record"),
    ],
)
def test_broken_saved_data_set(state: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text(state)
    with pytest.raises(UserError, match=message):
        records.read(tmp_path)


def test_hub_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def load(name: str, *, split: str, revision: str | None) -> datasets.Dataset:
        asked.append((name, split, revision))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert plain("hf:owner/name:train[:50%]") == expected(tmp_path)
    assert records.read("hf:owner/name@v2:test")[1].where == (
        "hf:owner/name@v2:test:row 2"
    )
    assert asked == [("owner/name", "train[:50%]", None), ("owner/name", "test", "v2")]


def test_hub_source_that_cannot_be_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    for source in ("hf:", "hf:owner/name", "hf:owner/name:"):
        with pytest.raises(
            UserError, match="names no split: expected hf:OWNER/NAME:SP"
        ):
            records.read(source)

    def load(*args: Any, **kwargs: Any) -> Any:
        raise ConnectionError("Couldn't reach the hub\nand more")

    with monkeypatch.context() as patched:
        patched.setattr(datasets, "load_dataset", load)
        with pytest.raises(
            UserError,
            match="says: ConnectionError: Couldn't reach the hub. Where the h",
        ):
            records.read("hf:owner/name:train")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="need the library datasets: pip install"):
        records.read("hf:owner/name:train")


def test_fingerprints_see_the_contents(tmp_path: Path) -> None:
    import hashlib

    file = synthetic.write_jsonl(tmp_path / "f.jsonl", ROWS)
    assert rows.fingerprint(str(file)) == hashlib.sha256(file.read_bytes()).hexdigest()
    first = saved(tmp_path / "a", ROWS)
    same, other = saved(tmp_path / "b", ROWS), saved(tmp_path / "c", ROWS[::-1])
    assert rows.fingerprint(str(first)) == rows.fingerprint(str(same))
    assert rows.fingerprint(str(first)) != rows.fingerprint(str(other))
    pattern = f"{tmp_path}/t-*"
    synthetic.write_jsonl(tmp_path / "t-0.jsonl", ROWS)
    one = rows.fingerprint(pattern)
    synthetic.write_jsonl(tmp_path / "t-1.jsonl", ROWS)
    assert rows.fingerprint(pattern) != one
    for by_name in ("hf:owner/name:train", "tfds:some_set:train"):
        assert rows.fingerprint(by_name) == by_name
    for absent in (tmp_path / "no.jsonl", tmp_path):
        with pytest.raises(UserError, match="is not a file"):
            rows.fingerprint(str(absent))
