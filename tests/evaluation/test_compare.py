"""Comparing runs: rows that pair, tests that fit the grades, what is refused."""

import json
import math
import time

import numpy as np
import pytest

from jaxalign.errors import UserError
from jaxalign.evaluation import compare, measures, results, statistics
from jaxalign.evaluation.compare import CompareConfig
from tests.evaluation.runs import write_lines, write_task


CONFIG = CompareConfig(rounds=300, permutations=500)
LETTERS = {"A": "correct", "B": "incorrect", "C": "not_attempted", "J": None}


def simple_qa(letters: str) -> list[str | None]:
    return [LETTERS[letter] for letter in letters]


def by_measure(question: compare.QuestionComparison) -> dict[str, measures.Difference]:
    return {d.measure: d for d in question.differences}


def only(found: compare.Compared) -> compare.QuestionComparison:
    (task,) = found.tasks
    (question,) = task.questions
    return question


def test_the_worked_example(tmp_path) -> None:
    write_task(tmp_path / "a" / "qa", {"final": simple_qa("AABBBCAC")})
    write_task(tmp_path / "b" / "qa", {"final": simple_qa("AAABBCAA")})
    question = only(compare.compare([str(tmp_path / n) for n in "ab"], CONFIG))
    assert question.rows == 8 and question.clusters is None
    found = by_measure(question)
    assert list(found) == ["correct", "incorrect", "not_attempted", "CGA", "F"]
    correct = found["correct"]
    assert correct.difference.value == 0.25
    assert correct.difference.standard_error == pytest.approx(0.163663, abs=5e-7)
    assert correct.baseline == statistics.share(3, 8)
    assert correct.run == statistics.share(5, 8)
    assert (correct.gained, correct.lost) == (2, 0)
    assert (correct.test, correct.p_value, correct.mid_p) == ("mcnemar", 0.5, 0.25)
    # 5/7 - 3/6, and 10/(10 + 4 + 1) - 6/(6 + 6 + 2).
    assert found["CGA"].difference.value == pytest.approx(5 / 7 - 1 / 2)
    assert found["F"].difference.value == pytest.approx(10 / 15 - 6 / 14)
    assert found["F"].test == "swap" and 0 < found["F"].p_value <= 1
    assert found["F"].difference.interval is not None


def test_what_a_run_lacks_is_in_neither_side(tmp_path) -> None:
    # Row 0 failed in one, 1 in the other, 5 and 6 are not there in the other.
    write_task(tmp_path / "a" / "qa", {"final": simple_qa("JABBCAA")})
    write_task(tmp_path / "b" / "qa", {"final": simple_qa("AJABC")})
    question = only(compare.compare([str(tmp_path / n) for n in "ab"], CONFIG))
    assert question.rows == 3
    assert question.left_out == {
        "only_in_baseline": 2,
        "only_in_run": 0,
        "not_graded": 2,
    }
    correct = by_measure(question)["correct"]
    assert (correct.baseline.value, correct.run.value) == (0.0, 1 / 3)


def test_numbers_are_tested_by_flipping_signs(tmp_path) -> None:
    one, other = [7.0, 8.5, 3, 9, 5], [8.0, 8.5, 4.5, 9.5, 4]
    write_task(tmp_path / "a" / "mt", {"single": one})
    write_task(tmp_path / "b" / "mt", {"single": other})
    (found,) = only(
        compare.compare([str(tmp_path / n) for n in "ab"], CONFIG)
    ).differences
    apart = np.subtract(other, one)
    assert found.measure == "mean" and found.test == "sign_flip"
    assert found.difference == statistics.mean(apart)
    # Changes 1, 1.5, .5, -1, sum 2. With 1.5 positive the sums are 4 3 2 2 1 1 0 -1,
    # mirrored otherwise: 8 of 16 are as far.
    assert found.p_value == 0.5
    assert found.gained is None and found.mid_p is None


def test_several_samples_are_clusters_of_their_item(tmp_path) -> None:
    one, other = [0, 0, 1, 1, 0, 1], [1, 1, 1, 1, 0, 0]
    write_task(tmp_path / "a" / "mine", {"q": one}, samples=2)
    write_task(tmp_path / "b" / "mine", {"q": other}, samples=2)
    question = only(compare.compare([str(tmp_path / n) for n in "ab"], CONFIG))
    (found,) = question.differences
    assert question.rows == 6 and question.clusters == 3
    # Items' sums of differences 2, 0, -1 about a mean of 1/6 a row.
    want = math.sqrt((2 - 1 / 3) ** 2 + (1 / 3) ** 2 + (1 + 1 / 3) ** 2) / 6
    assert found.difference.standard_error == pytest.approx(want)
    # Of items that changed two have four sign patterns: 1, -1, 3, -3; all as far.
    assert (found.test, found.p_value) == ("sign_flip", 1.0)
    assert (found.gained, found.lost) == (2, 1)


def test_topics_are_corrected_together(tmp_path) -> None:
    # Sea: 6 gained; land: 3 gained, 3 lost; air: 5 gained.
    topics = ["sea"] * 6 + ["land"] * 6 + ["air"] * 5
    write_task(tmp_path / "a" / "mine", {"q": "nnnnnn" + "yyynnn" + "nnnnn"})
    write_task(
        tmp_path / "b" / "mine",
        {"q": "yyyyyy" + "nnnyyy" + "yyyyy"},
        topics=topics,
    )
    question = only(compare.compare([str(tmp_path / n) for n in "ab"], CONFIG))
    found = by_measure(question)["y"].topics
    assert {name: d.p_value for name, d in found.items()} == {
        "sea": 2 / 64,
        "land": 1.0,
        "air": 2 / 32,
    }
    assert {name: d.adjusted for name, d in found.items()} == {
        "sea": 6 / 64,
        "land": 1.0,
        "air": 4 / 32,
    }
    assert found["sea"].difference.value == 1.0


def test_grades_that_are_neither_classes_nor_numbers(tmp_path) -> None:
    texts = [f"answer {n}" for n in range(13)]
    lists = [[1, 2]] * 3
    for name in "ab":
        write_task(tmp_path / name / "mine", {"texts": texts, "lists": lists})
    (task,) = compare.compare([str(tmp_path / n) for n in "ab"], CONFIG).tasks
    assert [(q.name, q.rows, q.differences) for q in task.questions] == [
        ("texts", 13, ()),
        ("lists", 3, ()),
    ]


def test_three_runs_and_tasks_that_one_lacks(tmp_path) -> None:
    for name, tasks in {"a": "xyz", "b": "xy", "c": "xw"}.items():
        for task in tasks:
            write_task(tmp_path / name / task, {"q": [True, False]})
    paths = [str(tmp_path / n) for n in "abc"]
    found = compare.compare(paths, CONFIG)
    assert [(t.run, t.task) for t in found.tasks] == [
        (paths[1], "x"),
        (paths[1], "y"),
        (paths[2], "x"),
    ]
    assert found.unshared == {paths[1]: ["z"], paths[2]: ["w", "y", "z"]}
    assert all(t.baseline == paths[0] for t in found.tasks)


def test_two_conditions_of_one_run(tmp_path) -> None:
    write_task(tmp_path / "qa", {"final": simple_qa("AAB")})
    write_task(tmp_path / "qa@blank", {"final": simple_qa("ABB")})
    paths = [str(tmp_path / "qa"), str(tmp_path / "qa@blank")]
    assert by_measure(only(compare.compare(paths, CONFIG)))["correct"].lost == 1


def test_settings_that_differ_are_said_and_other_data_is_refused(tmp_path) -> None:
    shared = {"data": {"a.json": "12ab"}, "seed": 0}
    for name, judge, model in (("a", "x", "one"), ("b", "y", "two")):
        settings = {**shared, "judge": {"model": judge, "votes": 1}, "model": model}
        write_task(tmp_path / name / "t", {"q": [1]}, metrics={"settings": settings})
    paths = [str(tmp_path / n) for n in "ab"]
    (task,) = compare.compare(paths, CONFIG).tasks
    assert task.settings == {"judge.model": ("x", "y")}
    settings = {"data": {"a.json": "34cd"}}
    write_task(tmp_path / "b" / "t", {"q": [1]}, metrics={"settings": settings})
    with pytest.raises(UserError, match="on different data: .*12ab.*34cd"):
        compare.compare(paths, CONFIG)


def test_items_that_were_asked_in_other_words(tmp_path) -> None:
    for name, words in (("a", "xyz"), ("b", "xy!")):
        items = [{"index": i, "asked": {"q": word}} for i, word in enumerate(words)]
        write_task(tmp_path / name / "t", {"q": [1, 0, 1]}, items=items)
    found = compare.compare([str(tmp_path / n) for n in "ab"], CONFIG)
    assert found.tasks[0].asked_otherwise == 1
    assert "  1 items were asked in other words" in compare.lines_of(found)


def test_what_cannot_be_compared(tmp_path) -> None:
    one = write_task(tmp_path / "a" / "x", {"q": [1]})
    write_task(tmp_path / "b" / "y", {"q": [1]})
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    with pytest.raises(UserError, match="got 1. Give `jaxalign compare OUT_A OUT_B`"):
        compare.compare([a], CONFIG)
    with pytest.raises(UserError, match="share no task: the first has x, the other y"):
        compare.compare([a, b], CONFIG)
    with pytest.raises(UserError, match="nowhere is no directory"):
        compare.compare([a, str(tmp_path / "nowhere")], CONFIG)
    with pytest.raises(UserError, match="x is of x, y of y"):
        tasks = [results.read(tmp_path / name)[0] for name in "ab"]
        compare.compare_tasks(*tasks, CONFIG, ("x", "y"))
    write_lines(
        one / "grades.jsonl",
        [{"index": 3, "question": "q", "sample": 0, "grade": 1, "status": "ok"}] * 2,
    )
    with pytest.raises(UserError, match="index 3, sample 0 of 'q' twice"):
        compare.compare([a, a], CONFIG)
    write_lines(one / "grades.jsonl", [{"index": 3, "query": "q"}])
    with pytest.raises(UserError, match="row 1 lacks 'question'"):
        compare.compare([a, a], CONFIG)
    (one / "metrics.json").write_text("[]")
    with pytest.raises(UserError, match="must be a JSON object: got list"):
        compare.compare([a, a], CONFIG)
    with pytest.raises(UserError, match="ends in .html"):
        CompareConfig(out="page.json")
    with pytest.raises(UserError, match="at least 100: got 3"):
        CompareConfig(permutations=3)


def test_the_json_says_all_of_it(tmp_path) -> None:
    for name, letters in (("a", "AABBBCAC"), ("b", "AAABBCAA")):
        write_task(
            tmp_path / name / "qa",
            {"final": simple_qa(letters)},
            topics=["sea", "land"] * 4,
        )
    found = compare.compare([str(tmp_path / n) for n in "ab"], CONFIG)
    kept = json.loads(json.dumps(compare.as_json(found)))
    measured = kept["tasks"][0]["questions"]["final"]["differences"]["correct"]
    assert measured["difference"]["value"] == 0.25
    assert measured["baseline"]["interval"] == list(statistics.share(3, 8).interval)
    assert measured["p_value"] == 0.5 and measured["adjusted"] is None
    assert measured["topics"]["sea"]["difference"]["n"] == 4


def test_lines_for_the_terminal(tmp_path) -> None:
    for name, letters in (("a", "AABBBCACJ"), ("b", "AAABBCAAA")):
        write_task(tmp_path / name / "qa", {"final": simple_qa(letters)})
    write_task(tmp_path / "b" / "other", {"q": [1]})
    paths = [str(tmp_path / n) for n in "ab"]
    lines = compare.lines_of(compare.compare(paths, CONFIG))
    assert lines[0] == f"qa: {paths[1]} minus {paths[0]}"
    assert lines[1] == "  final: 8 rows; left out: 1 not graded"
    assert lines[2].split() == [
        *("measure", "baseline", "run", "difference", "95", "%", "interval"),
        *("p", "gained", "lost"),
    ]
    assert lines[3].split() == [
        *("correct", "0.375", "0.625", "+0.250", "-0.071", "to", "+0.571"),
        *("0.5000", "2", "0"),
    ]
    assert lines[-1] == f"not compared, in one run alone ({paths[1]}): other"


def test_eleven_hundred_rows_take_seconds(tmp_path) -> None:
    generator = np.random.default_rng(0)
    for name in "ab":
        grades = {
            question: generator.choice(
                ["correct", "incorrect", "not_attempted"], 1100
            ).tolist()
            for question in ("recognition", "final")
        }
        topics = [f"topic {n % 8}" for n in range(1100)]
        write_task(tmp_path / name / "qa", grades, topics=topics)
    started = time.perf_counter()
    (task,) = compare.compare([str(tmp_path / n) for n in "ab"], CompareConfig()).tasks
    assert time.perf_counter() - started < 30
    assert len(task.questions) == 2
