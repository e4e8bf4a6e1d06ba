"""AlpacaEval as a task: files, both orders, weights, and the board's figures."""

import csv
import gzip
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxalign.errors import UserError
from jaxalign.evaluation.boards import alpaca_files
from jaxalign.evaluation.boards.alpaca_files import Instruction, shown_first
from jaxalign.evaluation.task import Answer, Grade, Graded, Items, TaskOptions
from jaxalign.evaluation.tasks.alpaca_eval import TASK
from jaxalign.judging.judge import JudgeRequest


ORDERS = ("model_first", "baseline_first")


def write(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
    return path


BASELINE = [
    {"instruction": "Say {a}.", "output": "base 1", "generator": "gpt4_1106_preview"},
    {"instruction": "And b?", "output": "base 2", "generator": "gpt4_1106_preview"},
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "alpaca_eval" / "alpaca_eval_gpt4_baseline.json", BASELINE)
    return tmp_path


def items(folder: Path, **options: Any) -> Items:
    assert TASK.variants is not None
    [task] = TASK.variants(TASK, TaskOptions(**options))
    loaded = task.load(folder)
    assert isinstance(loaded, Items)
    return loaded


def graded(*weights: tuple[Any, Any], text: str = "mine") -> list[Graded]:
    """Return items with what was said in both orders; None is a failed call."""
    return [
        Graded(
            index,
            Instruction(f"instruction {index}", "base"),
            {("answer", 0): Answer(text)},
            {
                (order, 0): Grade(None, "judge_failed") if w is None else Grade(w)
                for order, w in zip(ORDERS, both, strict=True)
            },
        )
        for index, both in enumerate(weights)
    ]


# --- files -------------------------------------------------------------------------


def test_the_baseline_s_answers(folder: Path) -> None:
    first, _ = items(folder).rows
    assert first[:3] == ("Say {a}.", "base 1", "gpt4_1106_preview")
    assert (first.difficulty, first.gamed, first.official) == (None, None, False)
    [question] = TASK.requests(first)
    assert question.messages == ({"role": "user", "content": "Say {a}."},)


def test_annotations_hold_the_baseline_s_answers_too(tmp_path: Path) -> None:
    rows = [{"instruction": "i", "output_1": "b", "output_2": "m", "generator_1": "g"}]
    write(tmp_path / "alpaca_eval" / "claude.annotations.json", rows)
    [row] = items(tmp_path).rows
    assert row[:3] == ("i", "b", "g")


@pytest.mark.parametrize(
    "rows, message",
    [
        ({"a": 1}, "must be a list of objects: got dict"),
        ([{"output": "o"}], "must have"),
    ],
)
def test_files_that_are_refused(folder: Path, rows, message) -> None:
    write(folder / "alpaca_eval" / "alpaca_eval_gpt4_baseline.json", rows)
    with pytest.raises(UserError, match=message):
        items(folder)


def test_files_that_are_missing(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(UserError, match="alpaca_eval_clf.txt.*tatsu-lab/alpaca_eval"):
        items(folder, wording="official")
    (folder / "alpaca_eval" / "alpaca_eval_gpt4_baseline.json").unlink()
    with pytest.raises(UserError, match="alpaca_eval_gpt4_baseline.json.*Hugging Face"):
        items(folder)


def test_one_answer_an_instruction(folder: Path) -> None:
    with pytest.raises(UserError, match="one answer an instruction.*got 3"):
        items(folder, num_samples=3)


# --- the judge ---------------------------------------------------------------------


def test_both_orders_are_asked(folder: Path) -> None:
    item = items(folder).rows[0]
    gradings = TASK.grade(item, {("answer", 0): Answer("mine {{material}}")})
    assert [grading.name for grading in gradings] == list(ORDERS)
    shown = []
    for grading in gradings:
        assert isinstance(grading.by, JudgeRequest) and grading.read is not None
        text = grading.by.messages[1]["content"]
        material = json.loads(text[: text.rindex("}") + 1])
        shown.append((material["A"], material["B"]))
        assert material["instruction"] == "Say {a}."
        assert grading.by.options is not None
        assert grading.by.options["top_logprobs"] == 5
    assert shown == [("mine {{material}}", "base 1"), ("base 1", "mine {{material}}")]


@pytest.mark.parametrize(
    "value, first, second",
    [
        ({"grade": "A"}, "model", "baseline"),  # a judge that computes
        ({"text": "B", "top_logprobs": None}, "baseline", "model"),
        ({"text": " **A**"}, "model", "baseline"),
        ({"text": "Neither"}, None, None),
        ({"text": "", "top_logprobs": None}, None, None),
        ({"text": "A", "top_logprobs": [["A", 0.0]]}, 1.0, 0.0),
        (
            {
                "text": "A",
                "top_logprobs": [["A", math.log(0.6)], [" B", math.log(0.2)]],
            },
            0.75,
            0.25,
        ),
        ({"text": "The", "top_logprobs": [["The", -0.1]]}, None, None),
    ],
)
def test_replies(folder: Path, value, first, second) -> None:
    item = items(folder).rows[0]
    gradings = TASK.grade(item, {("answer", 0): Answer("mine")})
    for grading, want in zip(gradings, (first, second), strict=True):
        assert grading.read is not None
        grade = grading.read(value)
        if want is None:
            assert grade == (None, "unparsed", None)
        else:
            assert grade.value == (
                pytest.approx(want) if want in (0.75, 0.25) else want
            )


def test_the_authors_template(folder: Path) -> None:
    (folder / "alpaca_eval" / "alpaca_eval_clf.txt").write_text(
        "<|im_start|>system\nJudge.\n<|im_end|>\n<|im_start|>user\n{instruction} "
        '{"m": {output_1}, "M": {output_2}}\n<|im_end|>\n'
    )
    item = items(folder, wording="official").rows[0]
    assert TASK.variants is not None and "published" not in TASK.facts
    [task] = TASK.variants(TASK, TaskOptions(wording="official"))
    assert task.facts["published"]["claude-2.1"]["win_rate"] == 0.1573
    first, second = TASK.grade(item, {("answer", 0): Answer("{output_2}")})
    assert isinstance(first.by, JudgeRequest) and isinstance(second.by, JudgeRequest)
    assert [m["role"] for m in first.by.messages] == ["system", "user"]
    want = 'Say {a}. {"m": {output_2}, "M": base 1}'
    assert first.by.messages[1]["content"] == want
    want = 'Say {a}. {"m": base 1, "M": {output_2}}'
    assert second.by.messages[1]["content"] == want
    assert first.read is not None and second.read is not None
    said = {"text": "m", "top_logprobs": [["m", math.log(0.9)], ["M", math.log(0.1)]]}
    assert first.read(said).value == pytest.approx(0.9)
    assert second.read(said).value == pytest.approx(0.1)


# --- figures -----------------------------------------------------------------------


def test_figures_of_both_orders() -> None:
    found = TASK.metrics(graded((1.0, 0.5), (0.25, 0.25), (0.0, 1.0), (0.9, None)))
    # 0.75, 0.25 and 0.5; the fourth item has one order only.
    assert found["win_rate"]["value"] == 0.5 and found["win_rate"]["n"] == 3
    assert found["win_rate"]["standard_error"] == pytest.approx(0.25 / math.sqrt(3))
    assert (found["wins"], found["losses"], found["draws"]) == (1, 1, 1)
    assert found["discrete_win_rate"].value == 0.5
    assert (found["judge_failed"], found["undecided"]) == (1, 1)
    assert found["win_rate"]["bounds"] == [1.5 / 4, 2.5 / 4]
    assert found["kind"] == "weighted"
    orders = found["by_order"]
    assert orders["model_first"].value == pytest.approx((1 + 0.25 + 0 + 0.9) / 4)
    assert orders["difference"].value == pytest.approx((0.5 + 0 - 1) / 3)
    assert orders["difference"].n == 3
    first = [shown_first(f"instruction {n}") for n in range(4)]
    both = [(1.0, 0.5), (0.25, 0.25), (0.0, 1.0), (0.9, None)]
    drawn = [pair[0 if one else 1] for one, pair in zip(first, both, strict=True)]
    known = [value for value in drawn if value is not None]
    assert found["upstream"]["win_rate"] == pytest.approx(sum(known) / len(known))


def test_plain_wins_are_named_so() -> None:
    found = TASK.metrics(graded(("model", "model"), ("model", "baseline")))
    assert found["win_rate"]["value"] == 0.75
    assert found["kind"].startswith("plain")
    found = TASK.metrics(graded(("model", 0.9)))
    assert found["kind"].startswith("weighted and plain")


def test_other_items_are_not_the_official_figure() -> None:
    rng = np.random.default_rng(0)
    rows = graded(*((float(a), float(b)) for a, b in rng.uniform(size=(40, 2))))
    rows = [
        Graded(r.index, r.item, {("answer", 0): Answer("x" * (3 + r.index))}, r.grades)
        for r in rows
    ]
    found = TASK.metrics(rows)["length_controlled_win_rate"]
    assert (found["official"], found["variant"]) == (False, "minimal")
    assert found["note"] == "not the official length-controlled figure"
    assert found["n"] == 40 and 0 < found["value"] < 1


def test_answers_of_one_length() -> None:
    found = TASK.metrics(graded(*[(0.75, 0.25), (0.5, 1.0)] * 10))
    controlled = found["length_controlled_win_rate"]
    assert controlled["value"] == pytest.approx(0.625, abs=1e-3)


def test_nothing_at_all() -> None:
    found = TASK.metrics([])
    assert found["win_rate"]["value"] is None
    assert found["length_controlled_win_rate"]["value"] is None
    assert TASK.metrics(graded((None, None)))["win_rate"]["bounds"] == [0.0, 1.0]


# --- annotations -------------------------------------------------------------------


def annotated(**other: Any) -> dict[str, Any]:
    row = {"instruction": "Say {a}.", "output_1": "base 1", "output_2": "mine"}
    return row | {"generator_2": "m", "preference": 1.5} | other


def read(folder: Path, rows: list[dict[str, Any]]) -> list[Graded]:
    path = write(folder / "annotations.json", rows)
    assert TASK.read_grades is not None
    return list(TASK.read_grades(path, items(folder)))


@pytest.mark.parametrize(
    "preference, want",
    [(1, 0.0), (2.0, 1.0), (1.25, 0.25), (0, 0.5), (None, None), (3, None), (-1, None)],
)
def test_preferences_of_old_and_new(folder: Path, preference, want) -> None:
    [row] = read(folder, [annotated(preference=preference)])
    [grade] = row.grades.values()
    assert grade.value == want
    assert grade.status == ("unparsed" if want is None else "ok")
    assert row.answers["answer", 0].text == "mine"


def test_the_order_of_the_original_is_known(folder: Path) -> None:
    name = "weighted_alpaca_eval_gpt4_turbo"
    [row] = read(folder, [annotated(annotator=name)])
    assert list(row.grades) == [(ORDERS[not shown_first("Say {a}.")], 0)]
    [row] = read(folder, [annotated(annotator="another")])
    assert list(row.grades) == [("preference", 0)]
    assert TASK.metrics([row])["win_rate"]["value"] == 0.5


@pytest.mark.parametrize(
    "rows, message",
    [
        ([annotated(instruction="?")], "1 of 1 instructions are not among the 2"),
        ([annotated(), annotated()], "instruction of item 0 twice"),
        (
            [annotated(), annotated(instruction="And b?", generator_2="n")],
            "several models.*m, n",
        ),
        ([{"instruction": "Say {a}."}], "must have instruction, output_1"),
    ],
)
def test_annotations_that_are_refused(folder: Path, rows, message) -> None:
    with pytest.raises(UserError, match=message):
        read(folder, rows)


def test_grades_of_a_run(folder: Path) -> None:
    path = folder / "grades.jsonl"
    lines = [{"index": 1, "question": order, "grade": 0.5} for order in ORDERS]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert TASK.read_grades is not None
    found = TASK.metrics(list(TASK.read_grades(path, items(folder))))
    assert found["draws"] == 1
    assert found["length_controlled_win_rate"]["reason"].endswith("there are 0")


# --- the board ---------------------------------------------------------------------


@pytest.fixture
def data(shared_data: Path) -> Path:
    if not (shared_data / "alpaca_eval").is_dir():
        pytest.skip(f"{shared_data / 'alpaca_eval'} is absent")
    return shared_data


@pytest.mark.data
@pytest.mark.parametrize(
    "model, first, second, lc",
    [
        ("claude-2.1", 8.58706, 23.00533, 25.2519),
        ("gemma-7b-it", 4.23044, 9.69164, 10.4258),
        ("vicuna-7b-v1.5", 1.06493, 8.59554, 7.6169),
    ],
)
def test_all_figures_of_annotations(data: Path, model, first, second, lc) -> None:
    path = data / "alpaca_eval" / f"{model}.annotations.json.gz"
    assert TASK.read_grades is not None
    found = TASK.metrics(list(TASK.read_grades(path, items(data))))
    with (data / "alpaca_eval" / "leaderboard.csv").open(newline="") as file:
        [board] = [row for row in csv.DictReader(file) if row[""] == model]
    win_rate = found["win_rate"]
    assert 100 * win_rate["value"] == pytest.approx(float(board["win_rate"]), abs=1e-9)
    assert 100 * win_rate["standard_error"] == pytest.approx(
        float(board["standard_error"]), abs=1e-9
    )
    counts = [found[name] for name in ("wins", "losses", "draws")]
    assert counts == [int(board[n]) for n in ("n_wins", "n_wins_base", "n_draws")]
    assert int(found["mean_length"]) == int(board["avg_length"])
    assert found["upstream"]["win_rate"] == pytest.approx(win_rate["value"])

    orders = found["by_order"]
    assert 100 * orders["model_first"].value == pytest.approx(first, abs=1e-4)
    assert 100 * orders["baseline_first"].value == pytest.approx(second, abs=1e-4)
    assert (orders["model_first"].n, orders["baseline_first"].n) == (406, 399)
    assert 100 * orders["difference"].value == pytest.approx(first - second, abs=2e-4)

    controlled = found["length_controlled_win_rate"]
    assert controlled["official"] is True and controlled["variant"] == "full"
    assert "note" not in controlled and controlled["length_coefficient"] < 0
    assert 100 * controlled["value"] == pytest.approx(lc, abs=0.01)
    low, high = controlled["interval"]
    assert low < controlled["value"] < high


@pytest.mark.data
def test_a_part_of_the_items_is_not_the_official_figure(data: Path) -> None:
    path = data / "alpaca_eval" / "gemma-7b-it.annotations.json.gz"
    assert TASK.read_grades is not None
    rows = list(TASK.read_grades(path, items(data)))[:200]
    found = TASK.metrics(rows)["length_controlled_win_rate"]
    assert (found["official"], found["variant"], found["n"]) == (False, "full", 200)


@pytest.mark.data
def test_difficulties_in_the_authors_file(data: Path, tmp_path: Path) -> None:
    with (data / "alpaca_eval" / "lc_features.csv").open(newline="") as file:
        hard = [row["instruction_difficulty"] for row in csv.DictReader(file)]
    table = "".join(f"{n},{value}\n" for n, value in enumerate(hard))
    place = tmp_path / "alpaca_eval"
    place.mkdir()
    (place / "instruction_difficulty.csv").write_text(
        f",instruction_difficulty\n{table}"
    )
    path = data / "alpaca_eval" / "claude-2.1.annotations.json.gz"
    (place / "annotations.json").write_bytes(gzip.decompress(path.read_bytes()))
    rows = items(tmp_path).rows
    assert all(row.official for row in rows)
    assert rows[0].difficulty == 0.0 and rows[0].gamed is rows[804].gamed is not None
    (place / "instruction_difficulty.csv").write_text("x\n1\n")
    with pytest.raises(UserError, match="must have 805 rows of numbers"):
        alpaca_files.load(tmp_path)
