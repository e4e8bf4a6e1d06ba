"""What was trained on: hashes, their file, what an evaluation has in common with it."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from jaxalign.data import records, seen
from jaxalign.data.picture import Picture
from jaxalign.data.seen import Seen
from jaxalign.errors import UserError


def load(path: Path) -> Any:
    if not path.exists():
        pytest.skip(f"{path} is absent")
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.data
def test_dream_s_training_file_and_vlguard_s_test(shared_data: Path) -> None:
    trained = load(shared_data / "dream" / "vlguard_sft_llava_format.json")
    tested = load(shared_data / "vlguard" / "test.json")
    made = Seen(
        frozenset(
            seen.text_hash(turn["value"])
            for row in trained
            for turn in row["conversations"]
            if turn["from"] == "human"
        ),
        frozenset(),
        frozenset(seen.name_hash(row["image"]) for row in trained),
    )
    instructions = [
        text
        for row in tested
        for entry in row["instr-resp"]
        for key, text in entry.items()
        if key != "response"
    ]
    items = [
        (
            [
                t
                for entry in row["instr-resp"]
                for k, t in entry.items()
                if k != "response"
            ],
            [Picture(Path(row["image"]), row["id"])],
        )
        for row in tested
    ]
    found = seen.overlap(made, items)
    # Eight names, 123 instructions: known defects of the files.
    assert len(found.names) == 8 and not found.pictures and found.compared == 1000
    ids = {tested[index]["id"] for index in found.names}
    assert {"Ads_295003", "harm-p_3785", "HOD_img_hod_008677"} <= ids
    shared = {text for text in instructions if seen.text_hash(text) in made.texts}
    assert len(shared) == 123
    assert len(found.texts) == sum(
        any(seen.text_hash(text) in made.texts for text in texts) for texts, _ in items
    )
    assert found.items == len(found.texts)


def picture(path: Path, colour: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), colour).save(path)
    return path


def rows(folder: Path) -> list[dict[str, Any]]:
    picture(folder / "a" / "one.png", "red")
    picture(folder / "a" / "two.png", "blue")
    turns = [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "content": [{"type": "image"}, {"type": "text", "text": "What is it? "}],
        },
        {"role": "assistant", "content": "A square."},
        {"role": "user", "content": "Which colour?"},
    ]
    said = {
        "chosen": [{"role": "assistant", "content": "Red."}],
        "rejected": [{"role": "assistant", "content": "Green."}],
    }
    plain = {"chosen": "4", "rejected": "5"}
    return [
        {"prompt": turns, "images": [str(folder / "a" / "one.png")], **said},
        {"prompt": turns[3:], **said},
        {"prompt": " 2 + 2?\n", **plain},
    ]


def test_user_turns_pictures_and_names_are_hashed(tmp_path: Path) -> None:
    found = seen.seen_of(records.from_rows(rows(tmp_path)))
    texts = ("What is it?", "Which colour?", "2 + 2?")
    assert found.texts == {seen.text_hash(text) for text in texts}
    one = Picture(tmp_path / "a" / "one.png", "here")
    assert found.pictures == {one.digest()}
    assert found.names == {seen.name_hash("one.png")}


def test_the_file_comes_back_and_does_not_depend_on_the_order(tmp_path: Path) -> None:
    made = records.from_rows(rows(tmp_path))
    seen.write(tmp_path / "one.txt", seen.seen_of(made))
    seen.write(tmp_path / "two.txt", seen.seen_of(made[::-1]))
    assert (tmp_path / "one.txt").read_bytes() == (tmp_path / "two.txt").read_bytes()
    assert seen.read(tmp_path / "one.txt") == seen.seen_of(made)
    kinds = [
        line.split()[0] for line in (tmp_path / "one.txt").read_text().splitlines()
    ]
    assert kinds == ["text", "text", "text", "picture", "name"]
    text = (tmp_path / "one.txt").read_text()
    assert "colour" not in text and "one.png" not in text


def test_matches_by_name_alone_are_apart(tmp_path: Path) -> None:
    made = seen.seen_of(records.from_rows(rows(tmp_path)))
    moved = picture(tmp_path / "b" / "other.png", "red")  # the same bytes
    other = picture(tmp_path / "b" / "one.png", "green")  # the same name
    items = [
        (["Something else"], [Picture(moved, "1")]),
        (["Something else"], [Picture(other, "2")]),
        (["<image> Which colour? "], [Picture(other, "3")]),
        (["2 + 3?"], []),
        ([""], [Picture(moved.read_bytes(), "5")]),
    ]
    found = seen.overlap(made, items)
    assert found.pictures == (0, 4)
    assert found.names == (1, 2)
    assert found.texts == (2,)
    assert found.items == 3 and found.compared == 5


@pytest.mark.parametrize(
    "text",
    [
        "<image>\nWhat?",
        "<|vision_start|><|image_pad|><|vision_end|>What?",
        "<start_of_image>What? ",
        "[IMG] What?",
        "What?",
    ],
)
def test_what_stands_for_a_picture_changes_no_hash(text: str) -> None:
    assert seen.text_hash(text) == seen.text_hash("What?")


def test_texts_differ_where_they_do() -> None:
    texts = ("What?", "what?", "What", "<b>What?", "", "images")
    assert len({seen.text_hash(text) for text in texts}) == len(texts)


@pytest.mark.parametrize("line", ["text abc", "word " + "0" * 64, "", "text"])
def test_a_line_that_is_none_is_refused(tmp_path: Path, line: str) -> None:
    path = tmp_path / "seen.txt"
    path.write_text(f"name {'0' * 64}\n{line}\n")
    with pytest.raises(UserError, match=r"seen.txt:2: got .*expected text, picture"):
        seen.read(path)
    with pytest.raises(UserError, match="cannot be read"):
        seen.read(tmp_path / "none.txt")
