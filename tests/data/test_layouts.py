"""Other people's rows as feedback records, and how they are recognised."""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from jaxalign.data import layouts, records, tfds_builders
from jaxalign.data.layouts import Dropped
from jaxalign.errors import UserError


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def completion(response: str, *ratings: Any) -> dict[str, Any]:
    names = ("instruction_following", "honesty", "truthfulness", "helpfulness")
    given = zip(names, ratings, strict=False)
    return {
        "model": "m",
        "response": response,
        "annotations": {name: {"Rating": r, "Rationale": ""} for name, r in given},
        "overall_score": 10,
    }


def whole(text: str, **scores: float) -> list[dict[str, Any]]:
    return [{"start": 0, "end": len(text), "scores": scores}]


ANSWERS = {"chosen": "It is.", "rejected": "No."}

# By layout: rows and the records that they are, or why there is none.
ROWS: dict[str, list[tuple[dict[str, Any], dict[str, Any] | str]]] = {
    "feedback": [
        ({"prompt": "Q", **ANSWERS}, {"prompt": "Q", **ANSWERS}),
        (
            {"prompt": [user("Q")], "completion": "a", "label": 1},
            {"prompt": [user("Q")], "completion": "a", "label": 1},
        ),
    ],
    "implicit": [
        (
            {
                "chosen": [user("Q"), answer("It is.")],
                "rejected": [user("Q"), answer("No.")],
                "id": 7,
            },
            {
                "prompt": [user("Q")],
                "chosen": [answer("It is.")],
                "rejected": [answer("No.")],
                "id": 7,
            },
        ),
        # They part in an earlier answer.
        (
            {
                "chosen": [user("Q"), answer("1"), user("?"), answer("2")],
                "rejected": [user("Q"), answer("3")],
            },
            {
                "prompt": [user("Q")],
                "chosen": [answer("1"), user("?"), answer("2")],
                "rejected": [answer("3")],
            },
        ),
        # One goes on where the other ends.
        (
            {
                "chosen": [user("Q"), answer("1")],
                "rejected": [user("Q"), answer("1"), user("?"), answer("2")],
            },
            {
                "prompt": [user("Q")],
                "chosen": [answer("1")],
                "rejected": [answer("1"), user("?"), answer("2")],
            },
        ),
        (
            {"chosen": "The sky is blue.", "rejected": "The sky is green."},
            {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."},
        ),
        ({"chosen": "a", "rejected": "a"}, "equal responses"),
        # Among others that have none.
        ({"prompt": "Q", "chosen": "ab", "rejected": "ac"}, {"explicit": True}),
        (
            {"chosen": [user("P"), answer("1")], "rejected": [user("Q"), answer("2")]},
            "no common prompt",
        ),
    ],
    "hh": [
        (
            {
                "chosen": "\n\nHuman: Hi?\n\nAssistant: Ho. So?\n\nHuman: Is it?"
                "\n\nAssistant: It is.",
                "rejected": "\n\nHuman: Hi?\n\nAssistant: Ho. So?\n\nHuman: Is it?"
                "\n\nAssistant: It is not.",
            },
            {
                "prompt": [user("Hi?"), answer("Ho. So?"), user("Is it?")],
                "chosen": [answer("It is.")],
                "rejected": [answer("It is not.")],
            },
        ),
        # They part before the last answer: several turns are learnt.
        (
            {
                "chosen": "\n\nHuman: Hi?\n\nAssistant: A\n\nHuman: B\n\nAssistant: C",
                "rejected": "\n\nHuman: Hi?\n\nAssistant: D\n\nHuman: E"
                "\n\nAssistant: F",
            },
            {
                "prompt": [user("Hi?")],
                "chosen": [answer("A"), user("B"), answer("C")],
                "rejected": [answer("D"), user("E"), answer("F")],
            },
        ),
        (
            {
                "chosen": "\n\nHuman: Hi?\n\nAssistant:",
                "rejected": "\n\nHuman: Hi?\n\nAssistant: Ho.",
            },
            "an empty answer",
        ),
    ],
    "ultrafeedback": [
        (
            {
                "source": "s",
                "instruction": "Q",
                "completions": [
                    completion("Good.", "5", "4", "N/A", "5"),
                    completion("Worst.", "1", "1", "2", "1"),
                    completion("Bad.", "2", "2", "2", "2"),
                ],
            },
            {
                "prompt": [user("Q")],
                "chosen": "Good.",
                "rejected": "Worst.",
                "chosen_segments": whole(
                    "Good.", instruction_following=5.0, honesty=4.0, helpfulness=5.0
                ),
                "rejected_segments": whole(
                    "Worst.",
                    instruction_following=1.0,
                    honesty=1.0,
                    truthfulness=2.0,
                    helpfulness=1.0,
                ),
            },
        ),
        (
            {
                "instruction": "Q",
                "completions": [completion("a", "3"), completion("b", "N/A")],
            },
            "less than two rated completions",
        ),
        (
            {
                "instruction": "Q",
                "completions": [completion("a", "3", "4"), completion("b", "4", "3")],
            },
            "equal ratings",
        ),
    ],
    "ultrafeedback_binarized": [
        (
            {
                "prompt": "Q",
                "prompt_id": "1",
                "chosen": [user("Q"), answer("It is.")],
                "rejected": [user("Q"), answer("No.")],
                "messages": [user("Q"), answer("It is.")],
                "score_chosen": 8.5,
            },
            {
                "prompt": [user("Q")],
                "prompt_id": "1",
                "chosen": [answer("It is.")],
                "rejected": [answer("No.")],
                "messages": [user("Q"), answer("It is.")],
                "score_chosen": 8.5,
            },
        ),
        (
            {"prompt": "Q", "chosen": [answer("a")], "rejected": [answer("b")]},
            {
                "prompt": [user("Q")],
                "chosen": [answer("a")],
                "rejected": [answer("b")],
            },
        ),
    ],
    "helpsteer3": [
        (
            {
                "context": [user("Hi"), answer("Ho"), user("Q")],
                "response1": "one",
                "response2": "two",
                "overall_preference": -2,
            },
            {
                "prompt": [user("Hi"), answer("Ho"), user("Q")],
                "chosen": "one",
                "rejected": "two",
            },
        ),
        (
            {
                "context": [user("Q")],
                "response1": "one",
                "response2": "two",
                "overall_preference": 1,
            },
            {"prompt": [user("Q")], "chosen": "two", "rejected": "one"},
        ),
        (
            {
                "context": [user("Q")],
                "response1": "one",
                "response2": "two",
                "overall_preference": 0,
            },
            "no preference",
        ),
    ],
    "llamafactory": [
        (
            {
                "instruction": "Sum up.",
                "input": "A text.",
                "system": "Be brief.",
                "history": [["Hi", "Ho"]],
                **ANSWERS,
            },
            {
                "prompt": [
                    {"role": "system", "content": "Be brief."},
                    user("Hi"),
                    answer("Ho"),
                    user("Sum up.\nA text."),
                ],
                "chosen": [answer("It is.")],
                "rejected": [answer("No.")],
            },
        ),
        (
            {"instruction": "Q", "input": "", "output": "a", "kto_tag": False},
            {"prompt": [user("Q")], "completion": "a", "label": False},
        ),
        (
            {"instruction": "Q", "chosen": "a", "rejected": "a"},
            "equal responses",
        ),
    ],
    "sharegpt": [
        (
            {
                "conversations": [{"from": "human", "value": "Q"}],
                "chosen": {"from": "gpt", "value": "It is."},
                "rejected": {"from": "gpt", "value": "No."},
            },
            {
                "prompt": [user("Q")],
                "chosen": [answer("It is.")],
                "rejected": [answer("No.")],
            },
        ),
        (
            {
                "conversations": [
                    {"from": "human", "value": "Q"},
                    {
                        "from": "function_call",
                        "value": '{"name": "f", "arguments": {}}',
                    },
                    {"from": "observation", "value": "7"},
                    {"from": "gpt", "value": "a"},
                ],
                "tools": '[{"name": "f", "parameters": {}}]',
                "kto_tag": True,
            },
            {
                "prompt": [
                    user("Q"),
                    {
                        "role": "assistant",
                        "content": None,
                        "tool_calls": [
                            {
                                "type": "function",
                                "function": {"name": "f", "arguments": {}},
                            }
                        ],
                    },
                    {"role": "tool", "content": "7"},
                ],
                "tools": [
                    {"type": "function", "function": {"name": "f", "parameters": {}}}
                ],
                "completion": [answer("a")],
                "label": True,
            },
        ),
        (
            {"messages": [user("Q"), answer("a")]},
            {"prompt": [user("Q")], "completion": [answer("a")]},
        ),
        ({"messages": [user("Q")]}, "the last turn is no answer"),
    ],
}
CASES = [
    pytest.param(layout, row, expected, id=f"{layout}-{i}")
    for layout, rows in ROWS.items()
    for i, (row, expected) in enumerate(rows)
]


def convert(layout: str, rows: Sequence[Any]) -> list[dict[str, Any] | Dropped]:
    numbered = [(row, f"f:{i}") for i, row in enumerate(rows, 1)]
    return [made for made, _ in layouts.LAYOUTS[layout].convert(numbered)]


@pytest.mark.parametrize(("layout", "row", "expected"), CASES)
def test_rows_become_records(
    layout: str, row: dict[str, Any], expected: dict[str, Any] | str
) -> None:
    (made,) = convert(layout, [row])
    if expected == {"explicit": True}:
        assert made == row
        return
    if isinstance(expected, str):
        assert made == Dropped(expected)
        return
    assert made == expected
    records.parse(made)
    # Arrow fills what other rows have with nulls.
    assert layouts.recognise(row | {"weight": None, "completion_segments": None}) == (
        layout
    )


@pytest.mark.parametrize(
    ("row", "layout"),
    [
        ({"prompt": "Q", "response": "a", "helpfulness": 4}, "helpsteer2"),
        (
            {"instruction": "Q", **ANSWERS, "chosen segment scores": "[1]"},
            "helpsteer2d",
        ),
        ({"question": "Q", "prediction 1": "a", "feedback": {}}, "qa_feedback"),
        ({"image": {"bytes": b""}, "question": "Q", **ANSWERS}, "rlaif_v"),
        ({"prompt": "Q"}, "feedback"),
        ({"promt": "Q", **ANSWERS}, "feedback"),  # a slip, not an implicit prompt
        ({"text": "Q"}, "feedback"),
        (["Q"], "feedback"),
    ],
)
def test_a_layout_is_known_by_its_columns(row: Any, layout: str) -> None:
    assert layouts.recognise(row) == layout


def test_every_layout_has_a_builder_and_a_test() -> None:
    from jaxalign.data.tfds_builders.builders import BUILDERS

    assert set(BUILDERS) == set(layouts.LAYOUTS)
    elsewhere = {"helpsteer2", "helpsteer2d", "qa_feedback", "rlaif_v"}
    assert set(ROWS) | elsewhere == set(layouts.LAYOUTS)


def write(path: Path, rows: Sequence[Any]) -> Path:
    if path.suffix == ".json":
        path.write_text(json.dumps(list(rows)), encoding="utf-8")
    elif path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet"])
@pytest.mark.parametrize(
    "layout", ["ultrafeedback_binarized", "implicit", "sharegpt", "llamafactory"]
)
def test_files_are_read_and_what_was_understood_is_said(
    layout: str, suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = [row for row, made in ROWS[layout] if "chosen" in row]
    pairs = [row for row in pairs if type(row["chosen"]) is type(pairs[0]["chosen"])]
    path = write(tmp_path / f"f{suffix}", pairs)
    found = records.read(path)
    made = [m for m in convert(layout, pairs) if not isinstance(m, Dropped)]
    expected = [records.parse(row) for row in made]
    assert [r._replace(where="") for r in found] == [
        r._replace(where="") for r in expected
    ]
    assert f"read as layout {layout}: {len(found)} records" in capsys.readouterr().err
    assert records.read(path, layout) == found


def test_a_layout_can_be_forced(tmp_path: Path) -> None:
    # Dialogues of HH-RLHF read as the two plain texts that they are, as TRL does.
    row = ROWS["hh"][0][0]
    path = write(tmp_path / "f.jsonl", [row])
    (found,) = records.read(path, "implicit")
    assert isinstance(found.prompt, str)
    assert found.prompt + str(found.chosen) == row["chosen"]
    with pytest.raises(UserError, match="^layout hhh: no such layout. Did you mean hh"):
        records.read(path, "hhh")


MALFORMED = {
    "hh": (
        {"chosen": "Hi", "rejected": "\n\nHuman: Ho"},
        "field chosen: expected a dia",
    ),
    "implicit": (
        {"chosen": [3], "rejected": []},
        r"field chosen\[0\]: expected \{role",
    ),
    "ultrafeedback": (
        {"instruction": "Q", "completions": "a"},
        "field completions: expected a list of {response, annotations}: got str",
    ),
    "helpsteer3": (
        {"context": [], "response1": "a", "response2": "b"},
        "field overall_preference: is missing. Expected a number from -3 to 3",
    ),
    "llamafactory": (
        {"instruction": "Q", "history": [["a"]], **ANSWERS},
        r"field history\[0\]: expected \[question, answer\]: got list",
    ),
    "sharegpt": (
        {"conversations": [{"from": "function_call", "value": "{"}], **ANSWERS},
        "field conversations: a function_call that is no JSON",
    ),
    "ultrafeedback_binarized": (
        {"prompt": "Q", "chosen": "a", "rejected": "b"},
        "field chosen: expected messages: got str",
    ),
}


@pytest.mark.parametrize("layout", MALFORMED)
def test_what_is_malformed_is_named(layout: str) -> None:
    row, match = MALFORMED[layout]
    with pytest.raises(UserError, match=f"f:1: {match}"):
        convert(layout, [row])


@pytest.mark.parametrize(
    "name",
    [
        "chosen_len",
        "rejected_len",
        "prompt_len",
        "chosen_score",
        "margin",
        "labels",
        "weights",
        "image_path",
        "source",
        "completions",
        "prompts",
        "chosen_model",
        "messages",
        "chosen_rating",
        "rejected_ids",
        "height",
    ],
)
def test_common_columns_of_others_are_no_slips(name: str) -> None:
    assert records.parse({"prompt": "Q", **ANSWERS, name: 1})


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("chosen_segmnets", "chosen_segments"),
        ("weigth", "weight"),
        ("chosen_token_weight", "chosen_token_weights"),
        ("tool", "tools"),
        ("chat_template_kwarg", "chat_template_kwargs"),
    ],
)
def test_slips_are_named(name: str, meant: str) -> None:
    with pytest.raises(UserError, match=f"'{name}'. Did you mean {meant}"):
        records.parse({"prompt": "Q", **ANSWERS, name: 1})


def test_turns_that_a_tfds_set_cannot_hold_are_refused(tmp_path: Path) -> None:
    source = write(tmp_path / "f.jsonl", [ROWS["hh"][1][0]])
    with pytest.raises(UserError, match=r"field chosen: .*Give an out that ends in"):
        tfds_builders.build("hh", {"train": source}, tmp_path / "out")
    counts = tfds_builders.write_jsonl("hh", source, tmp_path / "out.jsonl")
    assert counts.kept == len(records.read(tmp_path / "out.jsonl")) == 1


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_a_layouts_pictures_are_the_records(suffix: str, tmp_path: Path) -> None:
    image: Any = "pictures/1.png"
    buffer = io.BytesIO()
    Image.new("RGB", (2, 2)).save(buffer, "PNG")
    if suffix == ".parquet":
        image = {"bytes": buffer.getvalue(), "path": "1.png"}
    rows = [{"ds_name": "s", "image": image, "question": "What?", **ANSWERS}] * 2
    path = write(tmp_path / f"v{suffix}", rows)
    found = records.read(path)
    turn = {"role": "user", "content": [{"type": "image"}, WHAT]}
    for record in found:
        assert isinstance(record.prompt, tuple)
        assert [turn_.turn() for turn_ in record.prompt] == [turn]
        assert (record.chosen, record.rejected) == ("It is.", "No.")
    (picture,) = found[1].images
    expected = tmp_path / image if suffix == ".jsonl" else buffer.getvalue()
    assert picture.source == expected


WHAT = {"type": "text", "text": "What?"}


LLAMAFACTORY: dict[str, dict[str, Any]] = {
    "alpaca": {"instruction": "<image>What <image>is it?", **ANSWERS},
    "sharegpt": {
        "conversations": [{"from": "human", "value": "<image>What <image>is it?"}],
        "chosen": {"from": "gpt", "value": "It is."},
        "rejected": {"from": "gpt", "value": "No."},
    },
}


@pytest.mark.parametrize("name", LLAMAFACTORY)
def test_llamafactorys_placeholders_become_parts(name: str) -> None:
    row = LLAMAFACTORY[name]
    (record,) = records.from_rows([{**row, "images": ["/a.png", "/b.png"]}])
    assert isinstance(record.prompt, tuple)
    assert record.prompt[-1].turn()["content"] == [
        {"type": "image"},
        {"type": "text", "text": "What "},
        {"type": "image"},
        {"type": "text", "text": "is it?"},
    ]
    assert [str(p.source) for p in record.images] == ["/a.png", "/b.png"]
    (plain,) = records.from_rows([row])
    assert isinstance(plain.prompt, tuple)
    assert plain.prompt[-1].content == "<image>What <image>is it?"
    with pytest.raises(UserError, match=r"2 image part\(s\): got 1"):
        records.from_rows([{**row, "images": ["/a.png"]}])
