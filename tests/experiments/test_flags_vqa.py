"""Rows of flags, without the packages that they are made of."""

import json
import sys
from pathlib import Path

import pytest

from jaxalign.errors import UserError


sys.path.append(str(Path(__file__).parents[2] / "experiments"))

import flags_vqa  # noqa: E402
from tiny_vlm.symbols import Symbol, flag_key  # noqa: E402


FRANCE = Symbol(flag_key("FR"), "a.png", "flags", ("France",), "旗: 法国", ("Paris",))
NEPAL = Symbol(
    flag_key("NP"), "b.png", "flags", ("Nepal",), "旗: 尼泊尔", ("Kathmandu",)
)
QATAR = Symbol(flag_key("QA"), "c.png", "flags", ("Qatar",), "旗: 卡塔尔", ("Doha",))

CHINESE = {
    "Asia": {
        "Katmandu": {"exemplarCity": "加德满都"},
        "Qatar": {"exemplarCity": "卡塔尔"},
    },
    "Europe": {"Paris": {"exemplarCity": "巴黎"}},
    "America": {"Argentina": {"Rio_Gallegos": {"exemplarCity": "里奥加耶戈斯"}}},
    "Etc": {"UTC": {"long": {"standard": "协调世界时"}}},
}
ENGLISH = {"Asia": {"Katmandu": {"exemplarCity": "Kathmandu"}}}


def test_cities_have_the_names_of_their_zones_or_their_own() -> None:
    assert flags_vqa.capital_cities(CHINESE, ENGLISH) == {
        "kathmandu": "加德满都",
        "qatar": "卡塔尔",
        "paris": "巴黎",
        "riogallegos": "里奥加耶戈斯",
    }


def test_rows_are_in_chinese_where_the_capital_has_a_chinese_name() -> None:
    cities = flags_vqa.capital_cities(CHINESE, ENGLISH)
    found = list(flags_vqa.rows([FRANCE, NEPAL, QATAR], cities, {FRANCE.key}))
    assert [(row["ID"][-2:], row["Topic"]) for row in found] == [
        ("en", "English|capital taught"),
        ("zh", "中文|capital taught"),
        ("en", "English|capital not taught"),
        ("zh", "中文|capital not taught"),
        ("en", "English|capital not taught"),
    ]
    answers = [(row["recognition_answer"], row["final_answer"]) for row in found]
    assert answers[:2] == [("France", "Paris"), ("法国", "巴黎")]
    assert answers[-1] == ("Qatar", "Doha")
    for row in found:
        asked = row["recognition_question"] + row["final_question"]
        assert row["recognition_answer"] not in asked
        assert row["recognition_answer"] in row["desc"]
        assert row["final_answer"] in row["desc"]


def test_rows_have_the_published_fields() -> None:
    published = "chinese_simplevqa/chinese_simplevqa.jsonl"
    path = Path(__file__).parents[3] / "shared/data" / published
    if not path.is_file():
        pytest.skip("shared/data is not there")
    with path.open(encoding="utf-8") as file:
        wanted = json.loads(file.readline())
    (row,) = flags_vqa.rows([QATAR], {}, set())
    assert list(row) == list(wanted)
    assert {k: type(v) for k, v in row.items()} == {
        k: type(v) for k, v in wanted.items()
    }


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no held_out.jsonl"):
        flags_vqa.write(tmp_path / "out", tmp_path)
