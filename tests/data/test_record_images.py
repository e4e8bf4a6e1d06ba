import base64
import gzip
import io
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from jaxalign.data import records
from jaxalign.data.messages import ImagePart, Message, TextPart
from jaxalign.data.picture import Picture
from jaxalign.errors import UserError
from tests import synthetic


PAIR = {"chosen": "good", "rejected": "bad"}
ASK = [{"role": "user", "content": "What?"}]
IMAGE = {"type": "image"}


def encoded(size: tuple[int, int] = (3, 2), kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, "red").save(file, kind)
    return file.getvalue()


def text(said: str) -> dict[str, str]:
    return {"type": "text", "text": said}


def url(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def parts_of(record: records.Record | records.Prompt, turn: int = 0) -> list[str]:
    prompt = record.prompt if isinstance(record, records.Record) else record.text
    assert not isinstance(prompt, str)
    content = prompt[turn].content
    assert isinstance(content, list)
    return [p.text if isinstance(p, TextPart) else p.type for p in content]


def asked(*content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(content)}]


def test_without_parts_pictures_stand_before_the_first_users_text() -> None:
    prompt = [
        {"role": "system", "content": "Look."},
        {"role": "user", "content": "What?"},
        {"role": "assistant", "content": "That."},
        {"role": "user", "content": "Why?"},
    ]
    row = {"prompt": prompt, **PAIR, "images": [b"1", b"2"]}
    record = records.parse(row)
    assert parts_of(record, 1) == ["image", "image", "What?"]
    assert [p.source for p in record.images] == [b"1", b"2"]
    assert isinstance(record.prompt, tuple)
    assert record.prompt[1].text == "What?"
    assert record.prompt[1].turn() == {
        "role": "user",
        "content": [IMAGE, IMAGE, text("What?")],
    }
    assert record.prompt[3].content == "Why?"
    split = asked(text("What "), text("now?"))
    record = records.parse({"prompt": split, **PAIR, "images": [b"1"]})
    assert parts_of(record) == ["image", "What ", "now?"]


def test_parts_keep_their_order() -> None:
    prompt = asked(text("a"), IMAGE, text("b"), IMAGE)
    record = records.parse({"prompt": prompt, **PAIR, "images": [b"1", b"2"]})
    assert parts_of(record) == ["a", "image", "b", "image"]
    assert isinstance(record.prompt, tuple)
    assert record.prompt[0].text == "ab"
    again = Message(**record.prompt[0].turn())
    assert again == record.prompt[0]


def test_parts_carry_their_own_pictures() -> None:
    data = encoded()
    prompt = asked(
        {"type": "image_url", "image_url": {"url": url(data), "detail": "low"}},
        text("and"),
        {"type": "image", "image": "b.png", "text": None},
        {"type": "image_url", "image_url": "c.png"},
        {"type": "image", "image": {"bytes": None, "path": "d.png"}},
    )
    record = records.parse({"prompt": prompt, **PAIR}, "f:1", Path("/pictures"))
    assert [p.source for p in record.images] == [
        data,
        Path("/pictures/b.png"),
        Path("/pictures/c.png"),
        Path("/pictures/d.png"),
    ]
    assert record.images[1].where == "f:1: field prompt[0].content[2]"
    assert parts_of(record) == ["image", "and", "image", "image", "image"]
    # What was carried is no part of the turn any longer.
    assert isinstance(record.prompt, tuple)
    bare = ImagePart(type="image")
    assert [p for p in record.prompt[0].content or () if p == bare] == [bare] * 4


def test_a_plain_text_keeps_its_placeholder() -> None:
    row = {"prompt": "<image> What?", **PAIR, "image": b"1"}
    record = records.parse(row)
    assert record.prompt == "<image> What?"
    assert record.images == (Picture(b"1", "record: field image"),)


def test_prompts_have_pictures_too() -> None:
    prompt = records.parse_prompt({"prompt": ASK, "images": [b"1"]})
    assert parts_of(prompt) == ["image", "What?"]
    assert prompt.given == ASK
    assert len(prompt.images) == 1
    single = {"prompt": ASK, "completion": "It.", "image": b"1"}
    assert len(records.parse(single).images) == 1


def test_no_pictures_are_none() -> None:
    for columns in ({}, {"images": []}, {"images": None}, {"image": None}):
        record = records.parse({"prompt": ASK, **PAIR, **columns})
        assert record == records.parse({"prompt": ASK, **PAIR})
        assert record.images == ()


def test_what_stands_for_a_picture() -> None:
    data = encoded()
    array = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    given: list[Any] = [
        data,
        {"bytes": data, "path": "x.png"},
        {"path": "/a/x.png", "bytes": None},
        url(data),
        Path("/a/y.png"),
        Image.open(io.BytesIO(data)),
        array,
        array[..., 0],
        array[..., :1],
        Image.new("CMYK", (2, 2)),
    ]
    (record,) = records.from_rows([{"prompt": ASK, **PAIR, "images": given}])
    sources = [p.source for p in record.images]
    assert sources[:2] == [data, data]
    assert sources[2:5] == [Path("/a/x.png"), data, Path("/a/y.png")]
    assert [p.size() for p in record.images[5:]] == [(3, 2), *[(4, 2)] * 3, (2, 2)]
    np.testing.assert_array_equal(np.asarray(record.images[6].open()), array)
    grey = np.asarray(record.images[8].open())
    np.testing.assert_array_equal(grey, np.repeat(array[..., :1], 3, 2))


def test_an_opened_picture_keeps_its_orientation_and_depth() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    Image.new("RGB", (3, 2)).save(file, "JPEG", exif=exif)
    deep = Image.fromarray(np.full((1, 1), 25700, np.uint16))
    given = [Image.open(file), deep]
    record = records.parse({"prompt": ASK, **PAIR, "images": given})
    assert record.images[0].size() == (2, 3)
    assert record.images[1].open().getpixel((0, 0)) == (100, 100, 100)


def test_paths_start_beside_the_file_or_in_image_dir(tmp_path: Path) -> None:
    folder, other = tmp_path / "data", tmp_path / "pictures"
    folder.mkdir()
    other.mkdir()
    row = {"prompt": ASK, **PAIR, "images": ["p/x.png", "/abs.png"]}
    path = synthetic.write_jsonl(folder / "f.jsonl", [row])
    (record,) = records.read(path)
    assert [p.source for p in record.images] == [folder / "p/x.png", Path("/abs.png")]
    assert record.images[0].where == f"{path}:1: field images[0]"
    (record,) = records.read(path, image_dir=other)
    assert record.images[0].source == other / "p/x.png"
    (prompt,) = records.read_prompts(path, image_dir=str(other))
    assert prompt.images == record.images
    with pytest.raises(UserError, match=f"tried {other}/p/x.png"):
        prompt.images[0].open()
    with pytest.raises(UserError, match=r"image_dir .*f.jsonl is not a directory"):
        records.read(path, image_dir=path)
    # Several files beside each other are as one; in several directories they are not.
    synthetic.write_jsonl(folder / "g.jsonl", [row])
    assert records.read(f"{folder}/*.jsonl")[1].images[0].source == folder / "p/x.png"
    synthetic.write_jsonl(other / "h.jsonl", [row])
    with pytest.raises(UserError, match=r"'p/x.png' is a relative path.*image_dir DIR"):
        records.read(f"{tmp_path}/*/*.jsonl")


def test_rows_of_python_start_where_python_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    row = {"prompt": ASK, **PAIR, "images": ["x.png"]}
    assert records.from_rows([row])[0].images[0].source == tmp_path / "x.png"
    (record,) = records.from_rows([row], image_dir="/")
    assert record.images[0].source == Path("/x.png")


def test_a_file_without_a_place_needs_image_dir(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    path = tmp_path / "f.parquet"
    row = {"prompt": "<image>", **PAIR, "images": ["x.png"]}
    pq.write_table(pa.Table.from_pylist([row]), path)
    with pytest.raises(UserError, match=r"row 1: field images\[0\]: 'x.png' is a rela"):
        records.read(path)
    (record,) = records.read(path, image_dir=tmp_path)
    assert record.images[0].source == tmp_path / "x.png"


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "fewer": (
        {"prompt": asked(IMAGE, IMAGE), "images": [b"1"]},
        r"field images: expected one picture for each of the prompt's 2 image part\(s\)"
        ": got 1. Give as many",
    ),
    "more": ({"prompt": asked(IMAGE), "images": [b"1", b"2"]}, r"1 image part\(s\): g"),
    "both ways": (
        {"prompt": asked(IMAGE | {"image": "x"}), "images": [b"1"]},
        r"field prompt\[0\].content\[0\] has a picture of its own, and so has",
    ),
    "some": (
        {"prompt": asked(text("a"), IMAGE, IMAGE | {"image": "x"})},
        r"field prompt\[0\].content\[1\]: an image part without its picture, where",
    ),
    "no user": (
        {"prompt": [{"role": "system", "content": "S"}], "images": [b"1"]},
        r"1 picture\(s\), but the prompt has no user turn to show them",
    ),
    "in a completion": (
        {"prompt": ASK, "chosen": [{"role": "assistant", "content": [IMAGE]}]},
        r"field chosen\[0\].content\[0\]: a completion shows no pictures: .* prompt's",
    ),
    "an address": (
        {"prompt": ASK, "images": ["https://a.b/c.png"]},
        r"'https://a.b/c.png' is not read: pictures are not fetched .* Save the",
    ),
    "empty": ({"prompt": ASK, "images": [""]}, r"images\[0\]: not a path: ''"),
    "a list in it": ({"prompt": ASK, "images": [["x"]]}, "got a list of 1"),
    "nothing": ({"prompt": ASK, "images": [None]}, r"images\[0\]: expected a path, "),
    "no bytes": (
        {"prompt": ASK, "image": {"bytes": None, "path": None}},
        "field image: expected a path, .*got an object with bytes, path",
    ),
    "no base64": (
        {"prompt": ASK, "image": "data:image/png;base64,@@"},
        "a data URL that is no base64: .* Encode",
    ),
    "plain data": (
        {"prompt": ASK, "image": "data:,x"},
        "a data URL that begins with 'data:': expected data:image/png;base64",
    ),
    "floats": (
        {"prompt": ASK, "image": np.zeros((2, 2, 3))},
        r"expected an array of uint8 .*got float64 \(2, 2, 3\). Scale the",
    ),
    "channels first": (
        {"prompt": ASK, "image": np.zeros((3, 8, 8), np.uint8)},
        r"got uint8 \(3, 8, 8\)",
    ),
    "float picture": (
        {"prompt": ASK, "image": Image.new("F", (1, 1))},
        "an image of mode F, whose range is not known. Scale",
    ),
    "no url": (
        {"prompt": asked({"type": "image_url", "image_url": {"detail": "low"}})},
        r"field prompt\[0\].content: expected .*a data URL or a path",
    ),
    "more in a part": (
        {"prompt": asked(IMAGE | {"alt": "x"}), "images": [b"1"]},
        r"field prompt\[0\].content\[0\].alt: not a known field here",
    ),
    "no text in a part": (
        {"prompt": asked({"type": "text"})},
        r"field prompt\[0\].content\[0\].text is missing",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_says_where_what_and_how_to_mend(name: str) -> None:
    columns, match = REFUSED[name]
    with pytest.raises(UserError, match=f"^f:7: .*{match}"):
        records.parse(PAIR | columns, "f:7")


def test_a_prompts_pictures_are_refused_as_a_records() -> None:
    with pytest.raises(UserError, match=r"2 image part\(s\): got 0"):
        records.parse_prompt({"prompt": asked(IMAGE, IMAGE)})


def valid_row(rng: random.Random, pictures: list[bytes]) -> dict[str, Any]:
    data = rng.choice(pictures)
    value = rng.choice([data, url(data), {"bytes": data, "path": None}, "p/x.png"])
    return rng.choice(
        [
            {"prompt": ASK, **PAIR, "images": [value]},
            {"prompt": asked(text("a"), IMAGE), **PAIR, "images": [value]},
            {"prompt": asked(IMAGE | {"image": value}), **PAIR},
            {
                "prompt": asked(
                    {"type": "image_url", "image_url": {"url": url(data)}}, text("b")
                ),
                **PAIR,
            },
            {"prompt": "<image> a", **PAIR, "image": value},
        ]
    )


def mutated(value: Any, rng: random.Random) -> Any:
    """Change one place of a nested value."""
    if isinstance(value, dict) and value and rng.random() < 0.8:
        key = rng.choice(list(value))
        made = dict(value)
        match rng.randrange(6):
            case 0:
                del made[key]
            case 1:
                made[rng.choice(["images", "type", "image", "bytes", "x"])] = value[key]
            case _:
                made[key] = mutated(value[key], rng)
        return made
    if isinstance(value, list) and value and rng.random() < 0.8:
        made = list(value)
        i = rng.randrange(len(made))
        match rng.randrange(5):
            case 0:
                del made[i]
            case 1:
                made.append(made[i])
            case _:
                made[i] = mutated(made[i], rng)
        return made
    if isinstance(value, bytes | str) and value and rng.random() < 0.8:
        i = rng.randrange(len(value))
        return rng.choice([value[:i], value[i:], value[: i + 1] * 2])
    return rng.choice(
        [None, 1, -1.5, True, "", "x", "\0", "data:x", [], [1], {}, {"bytes": 1}, b""]
        + [[None], {"url": None}, "http://x/y", [[]], {"type": "image"}, IMAGE]
    )


def test_two_thousand_broken_records_give_clean_errors(tmp_path: Path) -> None:
    rng = random.Random(0)
    pictures = [encoded((4, 3), kind) for kind in ("PNG", "JPEG", "GIF", "WEBP")]
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "x.png").write_bytes(pictures[0])
    fine = refused = 0
    for i in range(2000):
        row = valid_row(rng, pictures)
        for _ in range(rng.randrange(1, 4)):
            row = mutated(row, rng)
        where = f"f:{i + 1}"
        try:
            record = records.parse(row, where, tmp_path)
            for picture in record.images:
                assert picture.open().size == picture.size()
            fine += 1
        except UserError as error:
            assert str(error).startswith(where)
            refused += 1
            continue
        if isinstance(record.prompt, tuple):
            shown = [
                part
                for turn in record.prompt
                for part in turn.content or ()
                if isinstance(part, ImagePart)
            ]
            assert len(shown) == len(record.images)
    assert min(fine, refused) > 200


def test_every_line_of_a_file_of_pictures_is_read(tmp_path: Path) -> None:
    path = tmp_path / "f.jsonl.gz"
    rows = [
        {"prompt": ASK, **PAIR, "images": [url(encoded((i % 9 + 1, 2)))]}
        for i in range(50)
    ]
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    found = records.read(path)
    assert [r.images[0].size()[0] for r in found] == [i % 9 + 1 for i in range(50)]
