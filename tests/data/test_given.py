"""Rows from anywhere: all give the records that a file of them gives."""

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from jaxalign.data import chat, pairs, records
from jaxalign.errors import UserError


ROWS: list[dict[str, Any]] = [
    {
        "prompt": "Is it red?",
        "chosen": "It is. Very much.",
        "rejected": "No.",
        "chosen_segments": [
            {"start": 0, "end": 6, "scores": {"helpfulness": 3.0, "clarity": 4.0}},
            {"start": 7, "end": 17, "scores": {"helpfulness": 1.0}},
        ],
        "rejected_segments": [{"start": 0, "end": 3, "scores": {"clarity": 0.0}}],
        "weight": 2.0,
    },
    {
        "prompt": [{"role": "user", "content": "And blue?"}],
        "chosen": "Yes ü.",
        "rejected": "Blue is not red.",
        "chosen_segments": [{"start": 0, "end": 6, "scores": {"helpfulness": 2.0}}],
        "rejected_segments": [{"start": 0, "end": 4, "scores": {"helpfulness": 1.0}}],
    },
]
TEXTS = [{**row, "prompt": "A question"} for row in ROWS]


def plain(found: list[records.Record]) -> list[Any]:
    return [record._replace(where="") for record in found]


WANT = [records.parse(row, "") for row in ROWS]
WANT_TEXTS = [records.parse(row, "") for row in TEXTS]


def raw(value: Any) -> Any:
    """Return a value as tensorflow-datasets gives it: bytes, arrays, lists in dicts."""
    if isinstance(value, str):
        return value.encode()
    if isinstance(value, float):
        return np.float32(value)
    if isinstance(value, list):
        names = dict.fromkeys(name for item in value for name in item)
        columns = {name: [item.get(name) for item in value] for name in names}
        scores = columns.pop("scores", [])
        made = {k: raw_column(v) for k, v in columns.items()}
        if scores:
            aspects = ("helpfulness", "clarity")
            made["scores"] = {
                a: np.float32([s.get(a, np.nan) for s in scores]) for a in aspects
            }
        return made
    return value


def raw_column(values: list[Any]) -> np.ndarray:
    if isinstance(values[0], str):
        return np.array([v.encode() for v in values], object)
    return np.asarray(values, np.int32)


class Indexed:
    """What torch calls a data set: a length and places, nothing to iterate over."""

    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.rows[index]


def with_nulls(rows: list[Any]) -> list[Any]:
    empty = dict.fromkeys(("completion", "label", "images", "tools"))
    return [{**empty, **row} for row in rows]


FORMS: dict[str, Callable[[list[Any]], Any]] = {
    "list": lambda rows: rows,
    "tuple": tuple,
    "nulls": with_nulls,
    "generator": iter,
    "indexed": Indexed,
    "tfds": lambda rows: [{k: raw(v) for k, v in row.items()} for row in rows],
    "numpy": lambda rows: [
        {**row, "weight": np.float64(row.get("weight", 1))} for row in rows
    ],
}


@pytest.mark.parametrize("form", FORMS)
def test_rows_of_dicts(form) -> None:
    assert plain(records.from_rows(FORMS[form](ROWS))) == WANT


def make_dataset(rows: list[Any]) -> Any:
    return pytest.importorskip("datasets").Dataset.from_list(rows)


TABLES: dict[str, Callable[[list[Any]], Any]] = {
    "datasets": make_dataset,
    "streamed": lambda rows: make_dataset(rows).to_iterable_dataset(),
    "datasets as numpy": lambda rows: make_dataset(rows).with_format("numpy"),
    "arrow": lambda rows: pytest.importorskip("pyarrow").Table.from_pylist(rows),
    "pandas": lambda rows: pytest.importorskip("pandas").DataFrame(rows),
    "pandas of arrow": lambda rows: make_dataset(rows).to_pandas(),
}


@pytest.mark.parametrize("table", TABLES)
def test_tables(table) -> None:
    """Their columns have one kind each, so that prompts are texts here."""
    assert plain(records.from_rows(TABLES[table](TEXTS))) == WANT_TEXTS


def test_a_stream_is_read_as_it_is_asked_for() -> None:
    datasets = pytest.importorskip("datasets")
    asked: list[int] = []

    def stream() -> Iterator[dict[str, Any]]:
        number = 0
        while True:
            asked.append(number)
            yield {**TEXTS[0], "prompt": f"Question {number}"}
            number += 1

    endless = datasets.IterableDataset.from_generator(stream)
    found = records.from_rows(endless.take(3))
    assert [r.prompt for r in found] == [f"Question {i}" for i in range(3)]
    assert len(asked) <= 4


def test_a_layout_is_recognised_or_named() -> None:
    rows = [
        {"chosen": "Human: Q\n\nAssistant: a", "rejected": "Human: Q\n\nAssistant: b"}
    ]
    rows = [{k: f"\n\n{v}" for k, v in rows[0].items()}]
    found = records.from_rows(rows)
    assert found[0].chosen == "a" and found == records.from_rows(rows, "hh")
    with pytest.raises(UserError, match="no such layout"):
        records.from_rows(rows, "hhh")


def test_what_takes_records_takes_rows(make_tokenizer, tmp_path) -> None:
    tokenizer = make_tokenizer()
    want = pairs.prepare(WANT, tokenizer, max_length=None)
    for rows in (ROWS, iter(ROWS), Indexed(ROWS), tuple(WANT), iter(WANT)):
        got = pairs.prepare(rows, tokenizer, max_length=None)
        assert got.report == want.report and got.aspects == want.aspects
        np.testing.assert_array_equal(got.lengths, want.lengths)
    (first, _) = chat.tokenize(ROWS, tokenizer)
    np.testing.assert_array_equal(first.chosen.tokens, want.pairs[0].chosen.tokens)
    assert records.aspects_of(ROWS) == ("clarity", "helpfulness")
    assert records.read(ROWS) == records.from_rows(ROWS)
    assert [p.text for p in records.read_prompts(TEXTS)] == ["A question"] * 2
    file = Path(tmp_path) / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert plain(records.read(file)) == plain(records.from_rows(str(file))) == WANT


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        (
            ROWS[0],
            r"got one dict alone: expected a list of dicts.*Give a list, \[row\]",
        ),
        (
            {"prompt": ["Q"], "chosen": ["a"]},
            "got one dict with a list for each column",
        ),
        (
            {"train": ROWS, "test": []},
            r"with train, test.*give one, such as data\['trai",
        ),
        (7, "got int: expected a list of dicts"),
        (None, "got NoneType: expected a list of dicts"),
        ([], "list holds no record"),
        (["a text"], "list row 1: a record must be an object"),
        ([ROWS[0], {**ROWS[1], "chosen": None}], "list row 2: field chosen is missing"),
        (
            json.dumps(ROWS[0]),
            "got a text of [0-9]+ characters: .*rows themselves as ob",
        ),
        ("x" * 5000, "got a text of 5000 characters"),
        ([{**ROWS[0], "chosen": b"\xff"}], "list row 1: not UTF-8"),
    ],
)
def test_what_is_no_rows_is_said(rows, match) -> None:
    with pytest.raises(UserError, match=match):
        records.from_rows(rows)


def picture(size: tuple[int, int] = (3, 2)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, "red").save(file, "PNG")
    return file.getvalue()


SEEN = {"prompt": "<image>", "chosen": "a", "rejected": "b"}


def seen(data: bytes, many: bool) -> Any:
    """A set of ``datasets`` with an Image column."""
    datasets = pytest.importorskip("datasets")
    stored = {"bytes": data, "path": None}
    feature = datasets.List(datasets.Image()) if many else datasets.Image()
    name, value = ("images", [stored]) if many else ("image", stored)
    texts = dict.fromkeys(SEEN, datasets.Value("string"))
    features = datasets.Features({**texts, name: feature})
    return datasets.Dataset.from_list([{**SEEN, name: value}] * 3, features=features)


SEEN_FORMS: dict[str, Callable[[Any], Any]] = {
    "dataset": lambda data: data,
    "stream": lambda data: data.to_iterable_dataset(),
    "numpy": lambda data: data.with_format("numpy"),
    "pandas": lambda data: data.to_pandas(),
    "arrow": lambda data: data.with_format("arrow")[:],
}


@pytest.mark.parametrize("form", SEEN_FORMS)
@pytest.mark.parametrize("many", [True, False])
def test_pictures_of_datasets_are_not_decoded(
    form: str, many: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = picture()
    given = SEEN_FORMS[form](seen(data, many))
    monkeypatch.setattr("datasets.Image.decode_example", None)
    found = records.from_rows(given)
    assert [r.images[0].source for r in found] == [data] * 3


def test_pictures_that_are_decoded_already(tmp_path: Path) -> None:
    data = seen(picture(), many=True)
    array = np.arange(18, dtype=np.uint8).reshape(2, 3, 3)
    of_tfds = {"prompt": b"<image>", "chosen": b"a", "rejected": b"b"}
    for rows in (
        list(data),
        list(data.with_format("numpy")),
        data.with_transform(lambda batch: batch),
        [{**of_tfds, "images": np.stack([array])}],
        [{**of_tfds, "image": array}],
    ):
        record = records.from_rows(rows)[0]
        assert record.images[0].open().size == (3, 2)
    assert (np.asarray(record.images[0].open()) == array).all()


def test_bytes_of_pictures_stay_bytes_beside_bytes_of_texts() -> None:
    data = picture()
    row = {"chosen": b"a", "rejected": b"b"}
    part = {"type": b"image", "image": data}
    turn = {"role": b"user", "content": [part, {"type": b"text", "text": b"Q"}]}
    given = [
        {**row, "prompt": b"<image>", "images": np.array([data], object)},
        {**row, "prompt": b"<image>", "image": {"bytes": data, "path": b"x"}},
        {**row, "prompt": [turn]},
    ]
    for record in records.from_rows(given):
        assert record.images[0].source == data
