"""What a page shows of items: texts, topics, and pictures made small."""

import base64
import io
from typing import NamedTuple

from PIL import Image

from jaxalign.data.picture import Picture
from jaxalign.evaluation import shown_items
from jaxalign.evaluation.task import Graded, Question


class Item(NamedTuple):
    topic: str
    references: tuple[str, ...]


def asked(name: str, *pictures: Picture) -> Question:
    content = [{"type": "image"}] * len(pictures) + [{"type": "text", "text": name}]
    return Question(name, ({"role": "user", "content": content},), pictures)


def test_pictures_are_thumbnails_and_each_is_there_once(tmp_path) -> None:
    Image.effect_noise((640, 400), 90).convert("RGB").save(tmp_path / "a.png")
    picture = Picture(tmp_path / "a.png", "row 0")
    gone = Picture(tmp_path / "gone.png", "row 0")
    questions = {7: [asked("first", picture), asked("then", picture, gone)]}
    (row,) = shown_items.rows([Graded(7, Item("sea", ("a", "b")), {}, {})], questions)
    (url,) = row.pop("images")
    assert row == {
        "index": 7,
        "asked": row["asked"],
        "topic": "sea",
        "references": ["a", "b"],
    }
    assert list(row["asked"]) == ["first", "then"]
    assert all(name in text for name, text in row["asked"].items())
    head, _, code = url.partition(",")
    assert head == "data:image/jpeg;base64"
    assert Image.open(io.BytesIO(base64.b64decode(code))).size == (128, 80)
    assert len(url) < 12_000


def test_items_with_nothing_to_show_are_left_out() -> None:
    graded = [
        Graded(0, {"topic": "", "references": 3}, {}, {}),
        Graded(1, {"topic": "sea"}, {}, {}),
        Graded(2, "a text", {}, {}),
    ]
    assert shown_items.rows(graded, {}) == [{"index": 1, "asked": {}, "topic": "sea"}]
