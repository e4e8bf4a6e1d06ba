"""jaxalign segment: records in, the same records with unscored segments out."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from jaxalign.cli import segment as command
from jaxalign.data import records
from jaxalign.errors import UserError
from jaxalign.feedback.segmenters import SegmenterConfig, sentences
from jaxalign.feedback.segmenters.segment_file import SegmentConfig, segment_row
from tests import synthetic
from tests.data import feedback_builder


ROWS: list[dict[str, Any]] = [
    {
        "id": 7,
        "prompt": "Why?",
        "chosen": "Dr. Wu knows. Ask him!",
        "rejected": "No idea 😀.\n\n- one\n- two",
        "meta": {"source": "x", "tags": [None, "ü"]},
        "images": ["a.png"],
    },
    {
        "prompt": [{"role": "user", "content": "你好？"}],
        "chosen": [{"role": "assistant", "content": "你好！很高兴。"}],
        "rejected": [{"role": "assistant", "content": ""}],
        "chosen_segments": [{"start": 0, "end": 2}],
        "weight": 0.5,
    },
    {"prompt": "p", "completion": "One. Two.", "label": True},
]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return synthetic.write_jsonl(tmp_path / "in.jsonl", ROWS)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def spans(text: str) -> list[dict[str, int]]:
    return [{"start": start, "end": end} for start, end in sentences(text)]


def run(*arguments: Any) -> int:
    return command.run([str(argument) for argument in arguments])


def test_rows_stay_as_they_are_and_get_segments(source, tmp_path, capsys) -> None:
    out = tmp_path / "new" / "out.jsonl"
    assert run(source, out) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "5 responses, 9 segments"
    made = lines(out)
    assert [list(row) for row in made] == [
        [*ROWS[0], "chosen_segments", "rejected_segments"],
        [*ROWS[1], "rejected_segments"],
        [*ROWS[2], "completion_segments"],
    ]
    for row, given in zip(made, ROWS, strict=True):
        kept = {k: v for k, v in row.items() if not k.endswith("_segments")}
        assert kept == {k: v for k, v in given.items() if not k.endswith("_segments")}
    assert made[0]["chosen_segments"] == [
        {"start": 0, "end": 13},
        {"start": 14, "end": 22},
    ]
    assert made[0]["rejected_segments"] == spans(ROWS[0]["rejected"])
    # Offsets of a conversation are into the content of its message.
    assert made[1]["chosen_segments"] == [
        {"start": 0, "end": 3},
        {"start": 3, "end": 7},
    ]
    assert made[1]["rejected_segments"] == []
    assert made[2]["completion_segments"] == spans("One. Two.")
    assert not [*out.parent.glob("*.tmp"), *out.parent.glob(".*.part")]


def test_with_scores_added_the_segments_are_a_valid_record(source, tmp_path) -> None:
    out = tmp_path / "out.jsonl"
    run(source, out)
    row = lines(out)[1]
    for column in ("chosen_segments", "rejected_segments"):
        for entry in row[column]:
            entry["scores"] = {"clarity": 3}
    record = records.parse(row)
    assert record.chosen_segments is not None
    cut = [record.chosen[s.start : s.end] for s in record.chosen_segments]
    assert cut == ["你好！", "很高兴。"]


def test_options_choose_the_segmenter(source, tmp_path) -> None:
    out = tmp_path / "out.jsonl"
    run("--segmenter.name=fixed", source, "--segmenter.size", 6, out)
    assert lines(out)[2]["completion_segments"] == [
        {"start": 0, "end": 6},
        {"start": 6, "end": 9},
    ]
    config = tmp_path / "c.yaml"
    config.write_text("segmenter: {name: sentences, min_length: 4}\n")
    run(source, out, "--config", config)
    assert lines(out)[2]["completion_segments"] == [{"start": 0, "end": 9}]


@pytest.mark.parametrize("kind", ["gz", "parquet", "tfds"])
def test_other_sources(kind: str, tmp_path: Path) -> None:
    if kind == "gz":
        source: Any = tmp_path / "in.jsonl.gz"
        source.write_bytes(gzip.compress(json.dumps(ROWS[0]).encode()))
        texts = [(ROWS[0]["chosen"], ROWS[0]["rejected"])]
    elif kind == "parquet":
        import pyarrow
        import pyarrow.parquet

        source = tmp_path / "in.parquet"
        table = pyarrow.Table.from_pylist([ROWS[0], ROWS[0]])
        pyarrow.parquet.write_table(table, source)
        texts = [(ROWS[0]["chosen"], ROWS[0]["rejected"])] * 2
    else:
        source = feedback_builder.write(feedback_builder.TinyFeedback, tmp_path)
        texts = [("好 yes.", "no")] * 4
    out = tmp_path / "out.jsonl"
    run(source, out, "--replace", "true")
    made = lines(out)
    assert [row["chosen_segments"] for row in made] == [spans(c) for c, _ in texts]
    assert [row["rejected_segments"] for row in made] == [spans(r) for _, r in texts]


SCORED = {
    **ROWS[0],
    "rejected_segments": [{"start": 0, "end": 2, "scores": {"clarity": 1}}],
}


def test_scores_are_not_taken_away_unasked(tmp_path) -> None:
    source = synthetic.write_jsonl(tmp_path / "in.jsonl", [*ROWS, SCORED])
    out = tmp_path / "out.jsonl"
    cure = r"in.jsonl:4: field rejected_segments has scores .* or give replace true"
    with pytest.raises(UserError, match=cure):
        run(source, out)
    assert not out.exists()
    run(source, out, "--replace", "true")
    assert lines(out)[3] == lines(out)[0]


@pytest.mark.parametrize(
    "segments", ["[]", {"start": [0]}, [3], [{"scores": {"a": 1}}]]
)
def test_segments_that_are_something_else_are_not_taken_away(segments: Any) -> None:
    row = {**ROWS[0], "chosen_segments": segments}
    with pytest.raises(UserError, match="field chosen_segments has scores already"):
        segment_row(row, SegmentConfig())
    made = segment_row(row, SegmentConfig(replace=True))
    assert made["chosen_segments"] == spans(ROWS[0]["chosen"])
    assert row["chosen_segments"] is segments


@pytest.mark.parametrize("segments", [None, [], [{"start": 0, "end": 1, "scores": {}}]])
def test_segments_without_scores_are_made_anew(segments: Any) -> None:
    row = {**ROWS[0], "chosen_segments": segments}
    made = segment_row(row, SegmentConfig(segmenter=SegmenterConfig(name="lines")))
    assert made["chosen_segments"] == [{"start": 0, "end": 22}]


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["in.jsonl"], "required: out"),
        ([], "required: source, out"),
        (["in.jsonl", "a.jsonl", "b"], "unrecognized arguments: b"),
        (["nowhere.jsonl", "o.jsonl"], "nowhere.jsonl is not a file"),
        (["empty.jsonl", "o.jsonl"], "empty.jsonl holds no record"),
        (["bad.jsonl", "o.jsonl"], "bad.jsonl:2: field rejected is missing"),
        (["list.jsonl", "o.jsonl"], "list.jsonl:1: a record must be an object"),
        (["in.jsonl", "o.parquet"], "give a name that ends in .jsonl"),
        (["in.jsonl", "."], "is a directory"),
        (["in.jsonl", "in.jsonl/o.jsonl"], "in.jsonl/o.jsonl cannot be written"),
        (["in.jsonl", "o.jsonl", "--segmenter.nam", "x"], "Did you mean segmenter"),
        (["in.jsonl", "o.jsonl", "--segmenter.size", "9"], "has no effect with"),
        (["in.jsonl", "o.jsonl", "--segmenter.name", "words"], "words"),
    ],
)
def test_errors_come_before_any_writing(
    arguments: list[str], match: str, source: Path, monkeypatch
) -> None:
    monkeypatch.chdir(source.parent)
    Path("empty.jsonl").write_text("\n")
    Path("bad.jsonl").write_text(json.dumps(ROWS[0]) + '\n{"prompt":"p","chosen":""}')
    Path("list.jsonl").write_text("[1]\n")
    before = sorted(path.name for path in source.parent.iterdir())
    with pytest.raises(UserError, match=match):
        run(*arguments)
    assert sorted(path.name for path in source.parent.iterdir()) == before


def test_a_failed_write_leaves_the_earlier_file(source, tmp_path, monkeypatch) -> None:
    out = tmp_path / "out.jsonl"
    run(source, out)
    before = out.read_text()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match="out.jsonl cannot be written: .*No space left"):
        run(source, out, "--segmenter.name", "lines")
    assert out.read_text() == before


def test_a_column_that_json_cannot_hold_is_named(tmp_path) -> None:
    import datetime

    import pyarrow
    import pyarrow.parquet

    row = {**ROWS[0], "when": datetime.date(2024, 1, 2)}
    source = tmp_path / "in.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), source)
    with pytest.raises(UserError, match="row 1: a column cannot be written as JSON"):
        run(source, tmp_path / "out.jsonl")


def test_help_names_both_files(capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        run("--help")
    text = capsys.readouterr().out
    assert stopped.value.code == 0
    assert "IN OUT" in text and "--segmenter.min_length" in text
