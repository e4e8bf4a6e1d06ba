"""The page of an evaluation and that of a comparison: what is in the files is on it."""

import base64
import io
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from jaxalign.errors import UserError
from jaxalign.evaluation import calibration, compare, statistics
from jaxalign.evaluation.statistics import Figure
from jaxalign.judging.graders import GRADES
from jaxalign.reports import charts, comparison, evaluation, figure_tables
from tests.evaluation.runs import write_lines, write_task
from tests.pages import Page


def leaf(figure: Figure) -> dict[str, Any]:
    return json.loads(json.dumps(figure._asdict()))


def thumbnail(shade: int = 90) -> str:
    file = io.BytesIO()
    Image.new("RGB", (24, 16), (shade, 120, 40)).save(file, "JPEG")
    code = base64.b64encode(file.getvalue()).decode("ascii")
    return f"data:image/jpeg;base64,{code}"


def metrics(grades: list[str]) -> dict[str, Any]:
    """As a task of two questions has them, all that the page knows."""
    n = len(grades)
    right = leaf(statistics.share(grades.count("CO"), n))
    wrong = leaf(statistics.share(grades.count("IN"), n))
    generator = np.random.default_rng(0)
    stated = generator.integers(0, 11, 60) / 10
    shown = calibration.figures(stated, generator.random(60) < stated, rounds=20)
    return {
        "settings": {
            "model": {"model": "smollm2", "adapter": "run"},
            "limit": n,
            "seed": 3,
            "tokens": {"answers": {"calls": n, "cost": 0.25}},
        },
        "final": {"CO": {**right, "bounds": [0.25, 0.75]}, "IN": wrong, "failed": 1},
        "topics": {
            "sea": {"final": {"CO": right, "IN": wrong}},
            "land <b>": {"final": {"CO": right, "IN": wrong}},
        },
        "subtopics": {"sea|deep": {"final": {"CO": leaf(Figure(None, None, None, 0))}}},
        "joint": {"CO": {"CO": 412, "IN": 80}, "IN": {"CO": 9, "IN": 99}},
        "calibration": {
            "final": {
                **shown,
                **{
                    name: leaf(figure)
                    for name, figure in shown.items()
                    if isinstance(figure, Figure)
                },
            }
        },
        "upstream": {"final": {"CO": 0.5}},
        "facts": {
            "source": "a paper & its table",
            "published": {"o1": {"CO": 0.688, "n": 1100}, "other": {"CO": 0.5}},
        },
        "seen": {"pictures": 8, "by_name": 2},
        "defects": {"duplicate ids": 1},
        "warnings": ["judge and model are the same"],
    }


@pytest.fixture
def run(tmp_path: Path) -> Path:
    grades = ["CO", "IN", "CO", None, "NA"]
    items = [
        {
            "index": i,
            "asked": {"final": f"user: What is {i}? <script>"},
            "topic": ["sea", "land <b>"][i % 2],
            "images": [thumbnail()],
            "references": ["Paris", "巴黎"],
        }
        for i in range(5)
    ]
    task = write_task(
        tmp_path / "out" / "qa",
        {"final": grades},
        metrics=metrics([g for g in grades if g]),
        items=items,
    )
    answers = [
        {
            "index": i,
            "question": "final",
            "sample": 0,
            "answer": ""
            if i == 3
            else f"It is </section> {i}. " * (300 if i == 2 else 1),
            "status": "failed" if i == 3 else "ok",
            **({"reason": "HTTP 500 <b>"} if i == 3 else {}),
        }
        for i in range(5)
    ]
    write_lines(task / "answers.jsonl", answers)
    write_task(tmp_path / "out" / "mt", {"single": [7.5, 8.0, 9.0]}, samples=3)
    return tmp_path / "out"


def shown(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


def test_all_that_the_files_say_is_on_the_page(run) -> None:
    page = shown(evaluation.write(run))
    assert page.text.startswith("Evaluation: smollm2 + run")
    # Figures: value, interval, standard error, n, and the bounds.
    assert page.row("final · CO")[:1] == ["0.500"]
    assert page.row("final · CO")[2:] == [
        *("0.150 to 0.850", "0.250", "4"),
        "0.250 to 0.750 if all undecided fell one way or the other",
    ]
    # Topics, the joint table, what upstream says, facts, overlaps, defects, cost.
    assert page.row("land <b>") == ["4", "0.500", "0.250"]
    assert page.row("CO") == ["41268.7%", "8013.3%"]
    assert page.row("final · failed") == ["1"]
    assert page.row("o1") == ["0.688", "1,100"]
    assert page.row("pictures") == ["8"] and page.row("by name") == ["2"]
    assert page.row("duplicate ids") == ["1"]
    assert page.row("answers") == ["4", "0.250"]
    for text in ("a paper & its table", "a sample of 4 items, drawn by seed 3"):
        assert text in page.text
    # Warnings: of the task, and of what failed.
    assert "judge and model are the same" in page.text
    assert "20.0% of the answers failed (1 failed of 5)" in page.text
    assert "20.0% of the grades failed (1 judge failed of 5)" in page.text
    assert page.row("answer, final") == ["failed", "1", "HTTP 500 <b>"]
    assert page.row("grade, final") == ["judge failed", "1", ""]
    assert page.row("mt") == ["1", "0", ""]
    assert page.row("qa")[:2] == ["5", "2"]


def test_items_with_pictures_answers_and_verdicts(run) -> None:
    page = shown(evaluation.write(run))
    assert page.tags["script"] == 0
    images = [a for tag, a in page.attributes if tag == "img"]
    assert len(images) == 5 and all(a["loading"] == "lazy" for a in images)
    assert images[0]["src"] == thumbnail()
    assert "user: What is 4? <script>" in page.text
    assert "It is </section> 4." in page.text
    assert "accepted: Paris · 巴黎" in page.text
    assert '{"grade": "CO"}' in page.text
    # A long answer is folded; three samples of one item stand together.
    assert "characters)" in page.text
    assert "sample 2" in page.text
    items = [a["class"] for t, a in page.attributes if t == "section"]
    assert len(items) == 6


def test_the_filter_hides_what_has_another_grade(run) -> None:
    text = evaluation.write(run).read_text(encoding="utf-8")
    page = Page(text)
    labels = dict(re.findall(r"id='(\w+-\d+)'>([^<]+) <span class='mute'>", text))
    # Tasks in the order of their names: qa is the second.
    assert {k: v for k, v in labels.items() if k.startswith(("s1", "t1"))} == {
        "s1-0": "answer to final · failed",
        "s1-1": "final · CO",
        "s1-2": "final · IN",
        "s1-3": "final · NA",
        "s1-4": "final · judge failed",
        "t1-0": "land &lt;b&gt;",
        "t1-1": "sea",
    }
    rule = "#items-1:has(#s1-1:checked) .item:not(.s1-1){display:none}"
    assert rule in text
    classes = [str(a["class"]) for t, a in page.attributes if t == "section"][1:]
    assert [c.split()[1:] for c in classes] == [
        ["s1-1", "t1-1"],
        ["s1-2", "t1-0"],
        ["s1-1", "t1-1"],
        classes[3].split()[1:],
        ["s1-3", "t1-1"],
    ]
    assert set(classes[3].split()) == {"item", "s1-0", "s1-4", "t1-0"}


def test_the_page_is_the_same_in_every_process(run) -> None:
    write = "import sys; from jaxalign.reports import evaluation; evaluation.write"
    pages = []
    for seed in ("1", "2"):  # of the order of sets
        subprocess.run(
            [sys.executable, "-c", f"{write}(sys.argv[1])", str(run)],
            env={**os.environ, "PYTHONHASHSEED": seed},
            check=True,
        )
        pages.append((run / "report.html").read_bytes())
    assert pages[0] == pages[1]


def test_a_page_of_grades_alone(tmp_path) -> None:
    task = write_task(tmp_path / "mine", {"q": ["yes", "no"]})
    (task / "answers.jsonl").unlink()
    page = shown(evaluation.write(tmp_path))
    assert page.text.startswith(f"Evaluation: {tmp_path.name}")
    assert "q: yes" in page.text
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="has no task with metrics.json"):
        evaluation.write(tmp_path / "empty")


def test_pictures_of_files_and_what_is_no_thumbnail(tmp_path) -> None:
    Image.new("RGB", (300, 200)).save(tmp_path / "a.png")
    items = [
        {"index": 0, "asked": {}, "images": [str(tmp_path / "a.png"), "gone.png"]},
        {"index": 1, "asked": {}, "images": ["data:image/jpeg;base64,'onload='x"]},
    ]
    write_task(tmp_path / "out" / "t", {"q": ["a", "b"]}, items=items)
    page = shown(evaluation.write(tmp_path / "out"))
    images = [a for tag, a in page.attributes if tag == "img"]
    assert [a["width"] for a in images] == ["128"]
    assert page.text.count("a picture is not shown") == 2
    assert not any("onload" in attributes for _, attributes in page.attributes)


def test_eleven_hundred_items_are_a_page_that_loads(tmp_path) -> None:
    generator = np.random.default_rng(0)
    grades = {
        name: generator.choice(["CO", "IN", "NA"], 1100).tolist()
        for name in ("recognition", "final")
    }
    picture = thumbnail()
    items = [
        {
            "index": i,
            "asked": {name: f"user: question {i}" for name in grades},
            "topic": f"topic {i % 8}",
            "images": [picture],
        }
        for i in range(1100)
    ]
    write_task(tmp_path / "qa", grades, metrics=metrics(grades["final"]), items=items)
    started = time.perf_counter()
    path = evaluation.write(tmp_path)
    assert time.perf_counter() - started < 10
    page = shown(path)
    assert page.tags["section"] == 1100
    # Beside the pictures some 2 KB an item; no more elements than a browser takes.
    assert path.stat().st_size < 1100 * (2000 + len(picture))
    assert page.tags.total() < 1100 * 30
    assert "content-visibility: auto" in path.read_text(encoding="utf-8")


def test_figures_of_any_scale_and_shape() -> None:
    page = Page(
        figure_tables.figures(
            {
                "score": leaf(statistics.mean([7.0, 9.0])),
                "turns": {
                    "first": {**leaf(Figure(None, None, None, 0)), "official": True}
                },
            }
        )
    )
    assert page.row("score")[0] == "8.000"
    assert page.row("turns · first") == ["–", "", "–", "–", "0", "official: yes"]
    # A bar of 8 on a scale that ends where the interval does, at 9.96.
    (bar,) = [a for t, a in page.attributes if a.get("class") == "bar"]
    assert float(str(bar["width"])) == pytest.approx(200 * 8 / 9.96, abs=0.1)
    assert figure_tables.said("x", [{"a": 1}, {"a": 2, "b": "t"}]).count("<tr>") == 3
    assert charts.heat_map("x", {"a": {"b": 0}}, "c").count("<td") == 1


def test_the_page_of_a_comparison(tmp_path) -> None:
    letters = {"a": "AABBBCAC", "b": "AAABBCAA", "c": "AAAAAAAA"}
    for name, given in letters.items():
        grades = [dict(zip("ABC", GRADES, strict=True))[letter] for letter in given]
        write_task(
            tmp_path / name / "qa",
            {"final": grades},
            metrics={
                "settings": {"judge": name},
                "final": {"CO": leaf(statistics.share(given.count("A"), 8))},
            },
            topics=["sea", "land <b>"] * 4,
        )
    write_task(tmp_path / "b" / "other", {"q": [1]})
    paths = [str(tmp_path / name) for name in letters]
    config = compare.CompareConfig(rounds=200, permutations=200)
    found = compare.compare(paths, config)
    path = comparison.write(tmp_path / "page.html", found)
    page = shown(path)
    assert page.row("final · CO")[0].startswith("0.375 ")
    assert page.row("correct")[:3] == ["0.375", "0.625", "+0.250"]
    assert page.row("correct")[4:] == [
        *("−0.071 to +0.571", "0.164", "0.5000", "McNemar, exact", "2", "0"),
    ]
    assert page.row("F")[7] == "exchanged rows"
    assert 'Not the same settings: judge: "a" and "b".' in page.text
    assert f"In one run alone ({paths[1]}): other." in page.text
    assert len([row for row in page.rows if row and row[0] == "land <b>"]) == 10
    kept = json.loads((tmp_path / "page.json").read_text())
    assert kept == json.loads(json.dumps(compare.as_json(found)))
