"""Other layouts as data sets of tensorflow-datasets: what is made, kept and refused."""

import gzip
import io
import json
import math
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jaxalign.data import records, rows, tfds_builders
from jaxalign.data.layouts import (
    Dropped,
    helpsteer2,
    helpsteer2d,
    qa_feedback,
    rlaif_v,
)
from jaxalign.data.tfds_builders import __main__
from jaxalign.errors import UserError
from tests import synthetic


def rating(prompt: str, response: str, helpfulness: Any, **more: Any) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "response": response,
        "helpfulness": helpfulness,
        "correctness": 4,
        "coherence": 3,
        "complexity": 1,
        "verbosity": 0,
        **more,
    }


HELPSTEER2 = [
    rating("Wie groß?", "好 klein.", 1),
    rating("Wie groß?", "Sehr groß 😀.", 3, verbosity=None),
    rating("Tie?", "one", 2),
    rating("Tie?", "two", 2),
    rating("Alone?", "yes", 2),
    rating("a\n\n<extra_id_1>Assistant\nb\n<extra_id_1>User\nc", "x", 4),
    rating("a\n\n<extra_id_1>Assistant\nb\n<extra_id_1>User\nc", "y", 0),
]

HELPSTEER2D = [
    {
        "instruction": "Name, please?",
        "chosen": "It is Bo. Ask again!\n1. First.",
        "rejected": "No.",
        "chosen segment scores": "[4.0, 2.5, 1, None]",
        "rejected segment scores": "[0.5]",
    },
    {
        "instruction": "Short of a score",
        "chosen": "Yes. It is.",
        "rejected": "No.",
        "chosen segment scores": "[4.0]",
        "rejected segment scores": "[0.5]",
    },
]

QA = {
    "question": "Wo?",
    "passages": [["Bö", "Bö\n\nBö is a town.", "It is old.", "z" * 2000]],
    "gold": "In Bö.",
    "prediction 1": "Dr. Au is in Bö. Nobody knows. Nobody knows.",
    "feedback": {
        "errors": [
            {"start": 0, "end": 6, "error type": "Wrong-Grounding", "explanation": ""},
            {"start": 31, "end": 44, "error type": "Redundant", "explanation": ""},
        ],
        "missing-info": [{"error type": "Missing-Major-Auxiliary"}],
        "corrected-prediction": " She is in Bö. Nobody knows. ",
    },
}


def png(color: tuple[int, int, int] = (1, 2, 3)) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (3, 2), color).save(file, "png")
    return file.getvalue()


def rlaif(**changes: Any) -> dict[str, Any]:
    return {
        "image": {"bytes": png(), "path": None},
        "question": "What color?",
        "chosen": "Schwarz.",
        "rejected": "White.",
        "origin_dataset": "made here",
        "idx": 7,
        **changes,
    }


def without_place(found: list[records.Record]) -> list[records.Record]:
    return [record._replace(where="") for record in found]


def write_json(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


# The conversions, by hand.


def test_helpsteer2_chooses_the_more_helpful() -> None:
    made = helpsteer2.pair(HELPSTEER2[0], HELPSTEER2[1])
    assert made == {
        "prompt": [{"role": "user", "content": "Wie groß?"}],
        "chosen": "Sehr groß 😀.",
        "rejected": "好 klein.",
        # Code points: the smiley is one. The row's null is no score.
        "chosen_segments": [
            {
                "start": 0,
                "end": 12,
                "scores": {
                    "helpfulness": 3,
                    "correctness": 4,
                    "coherence": 3,
                    "complexity": 1,
                },
            }
        ],
        "rejected_segments": [
            {
                "start": 0,
                "end": 8,
                "scores": {
                    "helpfulness": 1,
                    "correctness": 4,
                    "coherence": 3,
                    "complexity": 1,
                    "verbosity": 0,
                },
            }
        ],
    }
    swapped = helpsteer2.pair(HELPSTEER2[1], HELPSTEER2[0])
    assert swapped == made


def test_helpsteer2_pairs_rows_wherever_they_stand() -> None:
    order = [0, 5, 2, 4, 3, 6, 1]
    found = list(helpsteer2.convert((HELPSTEER2[i], f"f:{i + 1}") for i in order))
    assert [where for _, where in found] == [
        "f:1 and f:2",
        "f:6 and f:7",
        "f:3 and f:4",
        "f:5",
    ]
    pair, turns, tie, alone = (result for result, _ in found)
    assert pair == helpsteer2.pair(HELPSTEER2[0], HELPSTEER2[1])
    assert isinstance(turns, dict)
    assert [(t["role"], t["content"]) for t in turns["prompt"]] == [
        ("user", "a"),
        ("assistant", "b"),
        ("user", "c"),
    ]
    assert tie == Dropped("tie in helpfulness")
    assert alone == Dropped("one response to its prompt")


def test_helpsteer2d_scores_are_those_of_the_pieces() -> None:
    made = helpsteer2d.record(HELPSTEER2D[0])
    assert isinstance(made, dict)
    text = made["chosen"]
    # "It is Bo." + " Ask again!" + "\n" + "1. First.", whose score is null.
    assert [
        (text[s["start"] : s["end"]], s["scores"]) for s in made["chosen_segments"]
    ] == [
        ("It is Bo.", {"overall": 4.0}),
        (" Ask again!", {"overall": 2.5}),
        ("\n", {"overall": 1}),
    ]
    assert made["rejected_segments"] == [
        {"start": 0, "end": 3, "scores": {"overall": 0.5}}
    ]
    assert helpsteer2d.record(HELPSTEER2D[1]) == Dropped(
        "scores and segments of chosen differ in number"
    )


def test_helpsteer2d_scores_by_aspect() -> None:
    row = {
        "instruction": "?",
        "chosen": "A! B",
        "rejected": "C",
        "chosen_helpful": [1, 2],
        "rejected_helpful": "[3]",
        "chosen_segment_scores": [{"safety": 4}, {"safety": None, "clarity": 0}],
        "rejected_segment_scores": [{"safety": 2}],
        "chosen_model": "m1",
        "rejected_model": "m2",
    }
    made = helpsteer2d.record(row, split=lambda _: [(0, 1), (2, 4)])
    assert made == Dropped("scores and segments of rejected differ in number")
    made = helpsteer2d.record(row)
    assert isinstance(made, dict)
    assert [s["scores"] for s in made["chosen_segments"]] == [
        {"safety": 4, "helpful": 1},
        {"clarity": 0, "helpful": 2},
    ]
    assert [s["scores"] for s in made["rejected_segments"]] == [
        {"safety": 2, "helpful": 3}
    ]


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("", []),
        ("Pi is 3.14. Yes", ["Pi is 3.14.", " Yes"]),
        ("x:\n```a. b\n```", ["x:\n", "```a. b\n```", ""]),
        ("```a``````b```", ["```a```", "", "```b```", ""]),
        ('He said "No." Then', ['He said "No."', " Then"]),
        ("好。坏！", ["好。", "坏！"]),
        ("Wait?!\n2. b", ["Wait?", "!\n", "2. b"]),
        ("so…… on", ["so……", " on"]),
    ],
)
def test_helpsteer2d_pieces(text: str, pieces: list[str]) -> None:
    assert [text[a:b] for a, b in helpsteer2d.spans(text)] == pieces


def test_qa_feedback_scores() -> None:
    made = qa_feedback.record(QA)
    assert isinstance(made, dict)
    assert made["prompt"][0]["content"].endswith(
        "Passages:\n[Bö] Bö is a town. It is old.\n\nQuestion: Wo?"
    )
    assert made["chosen"] == "She is in Bö. Nobody knows."
    top = dict.fromkeys(
        ("helpfulness", "correctness", "safety", "completeness", "clarity"), 4
    )
    # Of the 12 letters of "Dr. Au is in Bö." 5 are marked: 4 - round(20 / 12) = 2.
    # The last sentence is marked whole, and major detail is missing: 4 - 2.
    assert made["rejected_segments"] == [
        {"start": 0, "end": 17, "scores": top | {"correctness": 2}},
        {"start": 17, "end": 31, "scores": top},
        {"start": 31, "end": 44, "scores": top | {"clarity": 0, "completeness": 2}},
    ]
    # The second sentence is one of the prediction's.
    kept = {"helpfulness": 3, "completeness": 3}
    assert [s["scores"] for s in made["chosen_segments"]] == [top, top | kept]


def test_qa_feedback_without_a_correction() -> None:
    feedback = QA["feedback"] | {"corrected-prediction": QA["prediction 1"]}
    made = qa_feedback.record(QA | {"feedback": feedback})
    assert isinstance(made, dict) and made["chosen"] == "In Bö."
    same = QA | {"feedback": feedback, "gold": QA["prediction 1"]}
    assert qa_feedback.record(same) == Dropped("equal responses")


@pytest.mark.data
def test_qa_feedback_gives_the_records_that_were_made_of_it(shared_data: Path) -> None:
    folder = shared_data / "qa_feedback"
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent")
    made = tfds_builders.convert("qa_feedback", folder / "feedback_400.json")
    found = [records.parse(r) for r, _ in made if isinstance(r, dict)]
    expected = records.read(folder / "records.jsonl")
    differ = [
        i
        for i, (a, b) in enumerate(
            zip(without_place(found), without_place(expected), strict=True)
        )
        if a != b
    ]
    assert len(found) == 399 and not differ


def test_rlaif_v_keeps_the_bytes_or_the_path() -> None:
    made = rlaif_v.record(rlaif())
    assert isinstance(made, dict)
    assert made["images"] == [png()]
    assert (made["idx"], made["origin_dataset"]) == ("7", "made here")
    for row in (
        rlaif(image={"bytes": None, "path": "a/ö.png"}),
        rlaif(image="a/ö.png"),
        rlaif(image=None, image_path="a/ö.png"),
    ):
        made = rlaif_v.record(row)
        assert isinstance(made, dict) and made["images"] == ["a/ö.png"]
    assert rlaif_v.record(rlaif(chosen="White.")) == Dropped("equal responses")


def drop(row: dict[str, Any], name: str) -> dict[str, Any]:
    return {k: v for k, v in row.items() if k != name}


WRONG: dict[str, tuple[str, Any, str]] = {
    "no response": (
        "helpsteer2",
        [drop(HELPSTEER2[0], "response"), HELPSTEER2[1]],
        r"f\.json:row 1 and .*row 2: field response: is missing. Expected a text; the "
        "row has prompt, helpfulness",
    ),
    "rating above the scale": (
        "helpsteer2",
        [HELPSTEER2[0], HELPSTEER2[1] | {"coherence": 5}],
        "row 2: field coherence: expected a number from 0 to 4: got 5",
    ),
    "rating a bool": (
        "helpsteer2",
        [HELPSTEER2[0], HELPSTEER2[1] | {"helpfulness": True}],
        "row 2: field helpfulness: expected a number from 0 to 4: got True",
    ),
    "prompt a list": (
        "helpsteer2",
        [HELPSTEER2[0] | {"prompt": []}],
        "row 1: field prompt: expected a text: got list",
    ),
    "row a list": ("helpsteer2", [[1]], "row 1: expected an object: got list"),
    "no list": (
        "qa_feedback",
        {"a": 1},
        ":1: field prediction 1: is missing. Expected a text; the row has a",
    ),
    "nothing kept": (
        "helpsteer2",
        HELPSTEER2[2:4],
        r"gives no record in the layout helpsteer2: 0 records, 1 dropped \(tie",
    ),
    "no scores": (
        "helpsteer2d",
        [drop(HELPSTEER2D[0], "rejected segment scores")],
        "row 1: field rejected segment scores is missing: expected a list of numbers",
    ),
    "scores a sum": (
        "helpsteer2d",
        [HELPSTEER2D[0] | {"chosen segment scores": "sum([1])"}],
        "row 1: field chosen segment scores: expected a list of numbers such as",
    ),
    "score a text": (
        "helpsteer2d",
        [HELPSTEER2D[0] | {"chosen segment scores": [1, "2", 3, 4]}],
        r"row 1: field chosen segment scores\[1\]: expected finite numbers: got '2'",
    ),
    "error out of the text": (
        "qa_feedback",
        [
            QA
            | {
                "feedback": QA["feedback"]
                | {"errors": [{"start": 3, "end": 45, "error type": "Redundant"}]}
            }
        ],
        r"row 1: field feedback.errors\[0\]: expected 0 <= start <= end <= 44",
    ),
    "error of an unknown type": (
        "qa_feedback",
        [
            QA
            | {
                "feedback": QA["feedback"]
                | {"missing-info": [{"error type": "Missing-All"}]}
            }
        ],
        r"missing-info\[0\]: error type: expected one of Missing-Answer, .*g-All'",
    ),
    "no feedback": (
        "qa_feedback",
        [drop(QA, "feedback")],
        "row 1: field feedback: expected an object with errors, missing-info",
    ),
    "passages a text": (
        "qa_feedback",
        [QA | {"passages": ["t"]}],
        r"row 1: field passages: expected a list of \[title, sentence",
    ),
    "no image": (
        "rlaif_v",
        [drop(rlaif(), "image")],
        r"row 1: field image: expected \{bytes, path\}, bytes or a path",
    ),
    "segment beyond the text": (
        "feedback",
        [
            {
                "prompt": "p",
                "chosen": "c",
                "rejected": "r",
                "chosen_segments": [{"start": 0, "end": 2, "scores": {"a": 1}}],
            }
        ],
        r"row 1: field chosen_segments\[0\].end: got 2, but the text has 1 char",
    ),
    "misspelt": (
        "feedback",
        [{"prompt": "p", "chosen": "c", "rejected": "r", "rejected_segment": []}],
        "row 1: unknown field 'rejected_segment'. Did you mean rejected_segments",
    ),
    "image a number": (
        "feedback",
        [{"prompt": "p", "chosen": "c", "rejected": "r", "images": [1]}],
        r"row 1: field images\[0\]: expected a path, encoded bytes",
    ),
    "two kinds of prompt": (
        "feedback",
        [
            {"prompt": "p", "chosen": "c", "rejected": "r"},
            {
                "prompt": [{"role": "user", "content": "p"}],
                "chosen": "c",
                "rejected": "r",
            },
        ],
        "field prompt: a conversation and a text in one set, at f.json:row 2 and f.j",
    ),
    "slash in an aspect": (
        "feedback",
        [
            {
                "prompt": "p",
                "chosen": "c",
                "rejected": "r",
                "chosen_segments": [{"start": 0, "end": 1, "scores": {"a/b": 1}}],
            }
        ],
        "aspect 'a/b': a column's name may hold no slash",
    ),
    "unknown layout": ("helpster2", [], "no such layout. Did you mean helpsteer2"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_malformed_is_refused_before_anything_is_written(
    name: str, tmp_path: Path
) -> None:
    layout, value, expected = WRONG[name]
    if name != "no image":
        value = json.loads(json.dumps(value))
    source = write_json(tmp_path / "f.json", value)
    with pytest.raises(UserError, match=expected):
        tfds_builders.build(layout, {"train": source}, tmp_path / "out")
    assert not list((tmp_path / "out").glob("**/*.array_record*"))


def test_bytes_that_are_no_image() -> None:
    with pytest.raises(UserError, match="row: field image: 3 bytes that Pillow does n"):
        rlaif_v.record(rlaif(image=b"abc"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("instruction,chosen\na,b,c\n", "row 1: the row has more or fewer cells"),
        ("instruction,chosen\nc\n", "row 1: the row has more or fewer cells"),
        ("instruction\na\ud800\n", "not readable CSV: .*decode"),
        ("instruction\na\n", "row 1: field chosen: is missing"),
    ],
)
def test_malformed_csv(text: str, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "f.csv"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(UserError, match=rf"f\.csv:{expected}|f\.csv:row.*{expected}"):
        list(tfds_builders.convert("helpsteer2d", path))


# What is built, read back.


def test_builds_every_layout_and_reads_it_back(tmp_path: Path) -> None:
    import csv

    import pyarrow
    import pyarrow.parquet

    with (tmp_path / "2d.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["", *HELPSTEER2D[0]])
        writer.writeheader()
        writer.writerows({"": i, **row} for i, row in enumerate(HELPSTEER2D))
    images = [rlaif(), rlaif(image={"bytes": png((9, 0, 0)), "path": None})]
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist(images), tmp_path / "v.parquet"
    )
    sources = {
        "helpsteer2": synthetic.write_jsonl(tmp_path / "h.jsonl.gz", HELPSTEER2),
        "helpsteer2d": tmp_path / "2d.csv",
        "qa_feedback": write_json(tmp_path / "qa.json", [QA, QA]),
        "rlaif_v": tmp_path / "v.parquet",
    }
    built = {
        layout: tfds_builders.build(layout, {"train": source}, tmp_path / "out")
        for layout, source in sources.items()
    }
    assert str(built["helpsteer2"].counts["train"]) == (
        "2 records, 1 dropped (tie in helpfulness), 1 dropped (one response to its "
        "prompt)"
    )
    for layout, source in sources.items():
        expected = [
            made
            for made, _ in tfds_builders.convert(layout, source)
            if isinstance(made, dict)
        ]
        found = list(rows.read_rows(built[layout].source("train")))
        assert [row["where"] for row, _ in found] == [r["where"] for r in expected]
        plain = [{k: v for k, v in r.items() if k != "images"} for r in expected]
        got = [{k: v for k, v in r.items() if k != "images"} for r, _ in found]
        assert without_place([records.parse(r) for r in got]) == without_place(
            [records.parse(r) for r in plain]
        )
        assert [r.get("images") for r, _ in found] == [
            r.get("images") for r in expected
        ]
    assert found[0][1] == f"{built['rlaif_v'].source('train')}:row 1 (v.parquet:row 1)"
    assert found[1][0]["idx"] == "7"
    first, second = records.read(built["rlaif_v"].source("train"))
    assert (first.images[0].source, first.images[0].size()) == (png(), (3, 2))
    assert "(v.parquet:row 2): field images[0]" in second.images[0].where


PAIR = {"prompt": "Größe?", "chosen": "好 ja.", "rejected": "no"}
MIXED = [
    PAIR
    | {
        "chosen_segments": [
            {"start": 0, "end": 1, "scores": {"clarity": 1.5, "safety": 4}},
            {"start": 2, "end": 5, "scores": {"safety": 0}},
        ],
        "rejected_segments": [],
        "weight": 0.5,
        "images": None,
    },
    PAIR | {"chosen_segments": None, "chosen_token_weights": [1.0, 0.25, 2.0]},
    PAIR | {"chosen_token_weights": []},
    {"prompt": "Größe?", "completion": "", "label": False},
    {"prompt": "Größe?", "completion": "x"},
]


def test_feedback_records_with_nulls_come_back_as_they_were(tmp_path: Path) -> None:
    source = synthetic.write_jsonl(tmp_path / "f.jsonl", MIXED)
    built = tfds_builders.build("feedback", {"train": source}, tmp_path / "out")
    expected = records.read(source)
    assert without_place(records.read(built.source("train"))) == without_place(expected)
    # The same of the data set's own layout, through a second build.
    again = tfds_builders.build(
        "feedback", {"train": built.source("train")}, tmp_path / "again"
    )
    assert without_place(records.read(again.source("train"))) == without_place(expected)


def test_a_single_image_is_a_list_of_one(tmp_path: Path) -> None:
    row = {"prompt": "<image>", "chosen": "a", "rejected": "b", "image": "/x.png"}
    source = synthetic.write_jsonl(tmp_path / "f.jsonl", [row])
    built = tfds_builders.build("feedback", {"train": source}, tmp_path / "out")
    (record,) = records.read(built.source("train"))
    assert [str(p.source) for p in record.images] == ["/x.png"]


def test_messages_of_completions_and_paths_of_images(tmp_path: Path) -> None:
    said = [{"role": "assistant", "content": "Ja."}]
    turns = [{"role": "user", "content": "Größe?"}]
    row = {"prompt": turns, "chosen": said, "rejected": "no", "images": ["b/ä.png"]}
    source = synthetic.write_jsonl(tmp_path / "f.jsonl", [row, row | {"images": []}])
    built = tfds_builders.build("feedback", {"train": source}, tmp_path / "out")
    found = [row for row, _ in rows.read_rows(built.source("train"))]
    assert [row["images"] for row in found] == [["b/ä.png"], []]
    assert found[0]["prompt"] == turns and found[0]["chosen"] == "Ja."


def test_sub_splits_are_stretches_of_the_source(tmp_path: Path) -> None:
    made = synthetic.feedback_records(10)
    train = synthetic.write_jsonl(tmp_path / "t.jsonl", made)
    held = synthetic.write_jsonl(tmp_path / "v.jsonl", made[:3])
    files = {"train": train, "validation": held}
    built = tfds_builders.build("feedback", files, tmp_path / "out")
    assert built.counts["validation"].kept == 3
    whole = without_place(records.read(train))
    for name in (built.directory, built.directory.parent, tmp_path / "out"):
        source = f"tfds:{name}:train"
        assert without_place(records.read(source)) == whole
        assert without_place(records.read(f"{source}[:50%]")) == whole[:5]
        assert without_place(records.read(f"{source}[7:]")) == whole[7:]
    tfds_builders.build("helpsteer2", {"train": _ratings(tmp_path)}, tmp_path / "out")
    with pytest.raises(UserError, match="several data sets are in .*: name one, such"):
        records.read(f"tfds:{tmp_path / 'out'}:train")


def _ratings(folder: Path) -> Path:
    return synthetic.write_jsonl(folder / "ratings.jsonl", HELPSTEER2)


def test_a_set_that_is_there_is_left_alone(tmp_path: Path) -> None:
    source = {"train": _ratings(tmp_path)}
    built = tfds_builders.build("helpsteer2", source, tmp_path / "out")
    before = rows.fingerprint(built.source("train"))
    with pytest.raises(UserError, match="help_steer2/1.0.0 is there already. Remove"):
        tfds_builders.build("helpsteer2", source, tmp_path / "out")
    assert rows.fingerprint(built.source("train")) == before
    other = tfds_builders.build("helpsteer2", source, tmp_path / "other")
    assert rows.fingerprint(other.source("train")) == before
    assert rows.fingerprint(other.source("train[:1]")) != before


def test_builders_by_hand(tmp_path: Path) -> None:
    from jaxalign.data.tfds_builders import builders

    with pytest.raises(UserError, match="HelpSteer2 is not built in .*: give the file"):
        builders.HelpSteer2(data_dir=tmp_path)
    files = {"train": _ratings(tmp_path)}
    made = builders.HelpSteer2(data_dir=tmp_path, files=files)
    made.download_and_prepare()
    assert made.counts["train"].kept == len(made.as_data_source("train")) == 2
    again = pickle.loads(pickle.dumps(made))
    assert len(again.as_data_source("train")) == 2
    reread = builders.HelpSteer2(data_dir=tmp_path)
    assert reread.as_data_source("train")[0]["chosen"] == "Sehr groß 😀.".encode()


# From the command line, by Grain, and in a run.


def run_main(*arguments: str) -> int:
    return __main__.main(arguments)


def test_command_builds_a_set_or_a_file(tmp_path: Path, capsys: Any) -> None:
    source, out = str(_ratings(tmp_path)), str(tmp_path / "out")
    common = ("--layout", "helpsteer2", "--data", source)
    assert run_main(*common, "--eval_data", source, "--out", out) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0].startswith(f"--data tfds:{out}/help_steer2/1.0.0:train  2 records")
    assert told[1].startswith(f"--data tfds:{out}/help_steer2/1.0.0:validation  2 rec")
    assert len(told) == 2
    file = str(tmp_path / "f.jsonl")
    assert run_main(*common, "--out", file) == 0
    assert without_place(records.read(file)) == without_place(
        records.read(f"tfds:{out}:train")
    )
    capsys.readouterr()
    for wrong in (
        ("--out", file),
        ("--out", str(tmp_path / "g.jsonl"), "--eval_data", source),
    ):
        assert run_main(*common, *wrong) == 2
        assert "jaxalign: error: " in capsys.readouterr().err


@pytest.mark.parametrize("name", ["f.jsonl", "f.v1.jsonl.gz"])
def test_jsonl_has_encoded_images_in_files_beside_it(tmp_path: Path, name: str) -> None:
    """The command of the README on RLAIF-V's Parquet; equal images are one file."""
    import pyarrow
    import pyarrow.parquet
    from PIL import Image

    grey = io.BytesIO()
    Image.new("L", (2, 3), 7).save(grey, "JPEG")
    rows = [
        rlaif(),
        rlaif(question="Grey?", image={"bytes": grey.getvalue(), "path": None}),
        rlaif(question="Again?"),
    ]
    source = tmp_path / "v.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), source)
    out = tmp_path / name
    arguments = ("--layout", "rlaif_v", "--data", str(source), "--out", str(out))
    assert run_main(*arguments) == 0
    opened: Any = gzip.open if out.suffix == ".gz" else open
    with opened(out, "rt", encoding="utf-8") as file:
        made = [json.loads(line) for line in file]
    assert [record["prompt"][0]["content"] for record in made] == [
        "What color?",
        "Grey?",
        "Again?",
    ]
    paths = [record["images"] for record in made]
    assert paths[0] == paths[2] != paths[1]
    folder = f"{name.split('.jsonl')[0]}_images"
    assert all(path[0].startswith(f"{folder}/") for path in paths)
    assert [Path(path[0]).suffix for path in paths] == [".png", ".jpeg", ".png"]
    got = [(tmp_path / path[0]).read_bytes() for path in paths]
    assert got == [png(), grey.getvalue(), png()]
    assert len(list((tmp_path / folder).iterdir())) == 2
    assert not list(tmp_path.glob("*.tmp"))
    # What is there is left alone.
    out.unlink()
    assert run_main(*arguments) == 2


def test_images_of_a_file_that_is_refused_leave_nothing(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [rlaif(), rlaif(chosen=None)]
    source = tmp_path / "v.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), source)
    with pytest.raises(UserError, match="row 2: field chosen"):
        tfds_builders.write_jsonl("rlaif_v", source, tmp_path / "f.jsonl")
    assert {path.name for path in tmp_path.iterdir()} == {"v.parquet"}


ALONE = """
import sys

def main(source, out):
    import jaxalign.data
    from jaxalign.data import tfds_builders

    assert "tensorflow_datasets" not in sys.modules
    import grain.python as grain
    import tensorflow_datasets as tfds
    from absl import flags
    from jaxalign.data import records
    from jaxalign.data.tfds_builders import builders

    flags.FLAGS.mark_as_parsed()  # Grain reads its own in the workers
    built = tfds_builders.build("feedback", {"train": source}, out)
    assert len(records.read(built.source("train"))) == 8
    for builder in (
        tfds.builder_from_directory(built.directory),
        builders.FeedbackRecords(data_dir=out),
    ):
        data = builder.as_data_source("train")
        sampler = grain.IndexSampler(
            len(data), shuffle=True, seed=0, num_epochs=1,
            shard_options=grain.NoSharding(),
        )
        loader = grain.DataLoader(data_source=data, sampler=sampler, worker_count=2)
        found = sorted(row["where"].decode() for row in loader)
        assert found == [f"f.jsonl:{n}" for n in range(1, 9)], found
    mapped = grain.MapDataset.source(data).shuffle(seed=0)
    assert len({row["where"] for row in mapped}) == 8
    assert "tensorflow" not in sys.modules
    print("read")

if __name__ == "__main__":
    main(*sys.argv[1:])
"""


def test_grain_workers_read_a_set_without_tensorflow(tmp_path: Path) -> None:
    source = synthetic.write_jsonl(tmp_path / "f.jsonl", synthetic.feedback_records(8))
    script = tmp_path / "alone.py"
    script.write_text(ALONE)
    done = subprocess.run(
        [sys.executable, str(script), str(source), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "read"


def test_a_run_on_a_set(tiny_llama: Path, tmp_path: Path) -> None:
    from jaxalign.training import metrics
    from jaxalign.training.config import from_dict
    from jaxalign.training.run import train

    source = synthetic.write_jsonl(tmp_path / "f.jsonl", synthetic.feedback_records(12))
    built = tfds_builders.build("feedback", {"train": source}, tmp_path / "out")
    run = tmp_path / "run"
    train(
        from_dict(
            {
                "model": str(tiny_llama),
                "data": built.source("train[:8]"),
                "out": str(run),
                "num_train_epochs": 1,
                "batch_rows": 2,
                "row_length": 192,
                "max_length": 96,
                "logging_steps": 1,
                "report_to": "none",
                "adapter": {"rank": 2, "alpha": 4.0},
            }
        )
    )
    steps = metrics.read(run / "metrics.jsonl")
    # Two-dimensional scores came with it: at the reference, a loss of ln 2 a pair.
    assert steps[1]["segments/loss_per_pair"] == pytest.approx(math.log(2), abs=1e-5)
    assert max(steps) == 2  # eight pairs packed into two batches
