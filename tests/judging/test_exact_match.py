"""The judge that compares with accepted answers."""

import asyncio
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxalign.judging import exact_match, numerals
from jaxalign.judging.judge import JudgeRequest, Subject, Task


@pytest.mark.parametrize(
    ("response", "references", "want"),
    [
        ("It is the Eiffel Tower.", ["eiffel-tower"], "correct"),
        ("ＥＩＦＦＥＬ　ＴＯＷＥＲ", ["Eiffel Tower"], "correct"),
        ("It is Big Ben.", ["Eiffel Tower", "La tour Eiffel"], "incorrect"),
        ("La tour Eiffel, bien sûr", ["Eiffel Tower", "La tour Eiffel"], "correct"),
        ("Catalonia", ["cat"], "incorrect"),
        ("", ["cat"], "not_attempted"),
        ("I don't know.", ["cat"], "not_attempted"),
        ("我不知道", ["猫"], "not_attempted"),
        ("这是一只大熊猫。", ["大熊猫"], "correct"),
        ("这是小熊猫。", ["大熊猫"], "incorrect"),
        ("pi is 3.14159", ["3.14"], "correct"),
        ("pi is 3.15", ["3.14"], "incorrect"),
        ("It has 1,200 steps", ["1200"], "correct"),
        ("一千二百级台阶", ["1200级"], "correct"),
        ("4,180,000 people", ["4.2 million"], "correct"),
        ("4.4 million", ["4.2 million"], "incorrect"),
        ("about 4 million", ["4.2 million"], "not_attempted"),
        ("about 4.2 million", ["4.2 million"], "correct"),
        ("大约3000", ["3500"], "not_attempted"),
        ("It is long", ["42"], "not_attempted"),
        ("in 1984", ["1985", "1984"], "correct"),
        ("２０２４年", ["2024"], "correct"),
        ("二〇二四年", ["2024年"], "correct"),
        ("It was 142", ["42"], "incorrect"),
        ("50%", ["50 %"], "correct"),
        ("-5 degrees", ["5"], "incorrect"),
    ],
)
def test_grades(response, references, want) -> None:
    assert exact_match.grade(response, references) == want


@given(st.decimals(-(10**6), 10**6, places=2), st.decimals(-1, 1, places=4))
def test_a_number_is_right_to_its_last_digit(gold: Decimal, off: Decimal) -> None:
    right = abs(off) <= Decimal("0.005")
    assert (exact_match.grade(f"= {gold + off:f}", [f"{gold:f}"]) == "correct") == right


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("十", [10]),
        ("十二", [12]),
        ("一百零五", [105]),
        ("三万五", [35000]),
        ("两千零二十四", [2024]),
        ("一亿二千万", [120_000_000]),
        ("三点一四", ["3.14"]),
        ("350万", [3_500_000]),
        ("1.5e3", [1500]),
        ("2 × 10^4", [20000]),
        ("3k", [3000]),
        ("3 km", [3]),
        ("v1.2.3", []),
        ("一些人一起", []),
        ("1,200, 13", [1200, 13]),
        ("1,20", [1, 20]),
    ],
)
def test_numbers_of_a_text(text, want) -> None:
    assert [n.value for n in numerals.numbers(text)] == [Decimal(w) for w in want]


@given(st.integers(0, 99_999_999))
def test_chinese_numerals_are_read_back(value: int) -> None:
    number = numerals.chinese(spelt(value))
    assert number is not None and number.value == value


def spelt(value: int) -> str:
    """Write a number below 10^8 in Chinese."""
    if value >= 10**4:
        rest = value % 10**4
        gap = "零" if 0 < rest < 1000 else ""
        return spelt(value // 10**4) + "万" + gap + (spelt(rest) if rest else "")
    if value < 10:
        return "零一二三四五六七八九"[value]
    text, zero = "", False
    for unit, name in ((1000, "千"), (100, "百"), (10, "十"), (1, "")):
        digit = value // unit % 10
        if digit:
            text += ("零" if zero and text else "") + spelt(digit) + name
        zero = not digit
    return text


def verdict(task: Task, **about: object) -> object:
    subject = Subject("p", **{"response": "", **about})  # type: ignore[arg-type]
    found = exact_match.verdict(JudgeRequest(task, (), {}, subject))
    return found.value if found.failure is None else found.failure


def test_what_it_answers_and_what_it_cannot() -> None:
    cat = {"references": ("cat",)}
    assert verdict("grade", response="A cat", **cat) == {"grade": "correct"}
    assert verdict("verify", statement="Is it a cat?", **cat) == {"answer": "yes"}
    assert verdict("verify", statement="Is it a dog?", **cat) == {"answer": "no"}
    both = {"response": "A cat", "other": "A dog", **cat}
    assert verdict("compare", **both) == {"better": "A"}
    assert verdict("compare", **{**both, "other": "cat"}) == {"better": "tie"}
    spans = {"response": "A cat. Or not.", "spans": ((0, 6), (6, 14))}
    scored = verdict("scores", aspects=("correctness",), **spans, **cat)
    assert scored == {"segments": [{"correctness": 4}, {"correctness": 0}]}
    failure = verdict("scores", aspects=("correctness", "clarity"), **spans, **cat)
    assert failure == "rules: know nothing of clarity, only correctness"
    assert verdict("claims", **cat) == "rules: cannot answer claims"
    assert verdict("grade", response="A cat") == (
        "rules: the request has no accepted answer"
    )
    assert verdict("grade", references=("!?",)) == (
        "rules: the request has no accepted answer"
    )


def test_it_is_a_judge() -> None:
    async def graded() -> list[object]:
        subjects = [Subject("p", r, references=("4",)) for r in ("4", "5")]
        asked = (JudgeRequest("grade", (), {}, subject) for subject in subjects)
        return [(n, v.value) async for n, v in exact_match.RulesJudge().grade(asked)]

    assert asyncio.run(graded()) == [
        (0, {"grade": "correct"}),
        (1, {"grade": "incorrect"}),
    ]


@pytest.mark.parametrize(
    ("text", "want"),
    [("2 × 10", 2), ("2e30 kg", 2 * 10**30), ("9" * 40, 10**40), ("1e999", 10**999)],
)
def test_numbers_of_many_digits(text, want) -> None:
    number = numerals.numbers(text)[0]
    assert abs(number.value - want) <= Decimal(want) / 10**27


def test_years_of_any_length() -> None:
    assert numerals.chinese("一" * 5000) is not None
