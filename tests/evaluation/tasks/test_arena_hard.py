"""Arena-Hard as a task: files of both versions, both games, the authors' rules."""

import json
from pathlib import Path
from typing import Any

import pytest

from jaxalign.errors import UserError
from jaxalign.evaluation.boards.arena_files import ArenaPrompt
from jaxalign.evaluation.task import Answer, Grade, Graded, Items, TaskOptions
from jaxalign.evaluation.tasks.arena_hard import TASK
from jaxalign.judging.judge import JudgeRequest


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def said(uid: str, text: str) -> dict[str, Any]:
    content = {"answer": text}
    return {"uid": uid, "messages": [{"role": "user"}, {"content": content}]}


def question(uid: str, category: str) -> dict[str, Any]:
    return {"uid": uid, "category": category, "prompt": f"prompt \u2028 {uid}"}


@pytest.fixture
def old(tmp_path: Path) -> Path:
    place = tmp_path / "arena_hard"
    write(
        place / "v0.1_question.jsonl",
        [question(uid, "arena-hard-v0.1") for uid in ("q1", "q2", "q3")],
    )
    answers = [said(uid, f"base {uid}") for uid in ("q3", "q1", "q2")]
    write(place / "v0.1_gpt-4-0314.jsonl", answers)
    return tmp_path


@pytest.fixture
def new(tmp_path: Path) -> Path:
    place = tmp_path / "arena-hard-v2.0"
    write(
        place / "question.jsonl",
        [question("h", "hard_prompt"), question("c", "creative_writing")],
    )
    answers = place / "model_answer"
    write(answers / "o3-mini-2025-01-31.jsonl", [said("h", "hard base")])
    write(answers / "gemini-2.0-flash-001.jsonl", [said("c", "creative base")])
    return tmp_path


def items(folder: Path, **options: Any) -> Items:
    assert TASK.variants is not None
    [task] = TASK.variants(TASK, TaskOptions(**options))
    loaded = task.load(folder)
    assert isinstance(loaded, Items)
    return loaded


def graded(
    *labels: tuple[str | None, str | None], version: Any = "v0.1", **other: Any
) -> list[Graded]:
    category = other.pop("category", "arena-hard-v0.1")
    return [
        Graded(
            index,
            ArenaPrompt(str(index), "?", category, version, "base"),
            {("answer", 0): Answer(other.get("text", "mine"))},
            {
                (order, 0): Grade(label) if label else Grade(None, "unparsed")
                for order, label in zip(
                    ("baseline_first", "model_first"), both, strict=True
                )
            },
        )
        for index, both in enumerate(labels)
    ]


# --- files -------------------------------------------------------------------------


def test_answers_are_joined_by_uid(old: Path) -> None:
    rows = items(old).rows
    assert [row.baseline for row in rows] == ["base q1", "base q2", "base q3"]
    assert rows[0].version == "v0.1" and "\u2028" in rows[0].prompt
    [asked] = TASK.requests(rows[0])
    assert asked.messages[0]["content"] == rows[0].prompt


def test_v2_has_a_baseline_a_category(new: Path) -> None:
    rows = items(new).rows
    assert [(row.version, row.baseline) for row in rows] == [
        ("v2", "hard base"),
        ("v2", "creative base"),
    ]


def test_the_form_of_early_files(tmp_path: Path) -> None:
    turns = [{"content": "p"}]
    row = {"question_id": "q", "category": "arena-hard-v0.1", "turns": turns}
    write(tmp_path / "question.jsonl", [row])
    answer = {"question_id": "q", "choices": [{"turns": [{"content": "a"}]}]}
    write(tmp_path / "gpt-4-0314.jsonl", [answer])
    [found] = items(tmp_path).rows
    assert found[:5] == ("q", "p", "arena-hard-v0.1", "v0.1", "a")


def test_what_is_missing(old: Path, tmp_path: Path) -> None:
    write(old / "arena_hard" / "v0.1_gpt-4-0314.jsonl", [said("q1", "base")])
    loaded = items(old)
    assert loaded.defects == {"without the baseline's answer": 2}
    with pytest.raises(UserError, match="gpt-4-0314.jsonl is missing.*lacks q2"):
        TASK.requests(loaded.rows[1])
    with pytest.raises(UserError, match="question.jsonl.*lmarena/arena-hard-auto"):
        items(tmp_path / "nowhere")
    with pytest.raises(UserError, match="judge_config.yaml"):
        items(old, wording="official")


@pytest.mark.parametrize(
    "row, message",
    [
        ({"uid": "q", "prompt": "p", "category": "x"}, "category 'x' is none"),
        ({"uid": "q", "category": "math"}, "must have uid, category and prompt"),
    ],
)
def test_questions_that_are_refused(old: Path, row, message) -> None:
    write(old / "arena_hard" / "v0.1_question.jsonl", [row])
    with pytest.raises(UserError, match=message):
        items(old)


def test_one_answer_a_request(old: Path) -> None:
    with pytest.raises(UserError, match="one answer a request.*got 2"):
        items(old, num_samples=2)


# --- the judge ---------------------------------------------------------------------


def test_two_games(old: Path) -> None:
    item = items(old).rows[0]
    first, second = TASK.grade(item, {("answer", 0): Answer("mine")})
    assert (first.name, second.name) == ("baseline_first", "model_first")
    assert isinstance(first.by, JudgeRequest) and isinstance(second.by, JudgeRequest)
    one, two = (json.loads(g.by.messages[1]["content"]) for g in (first, second))
    assert (one["A"], one["B"]) == ("base q1", "mine") == (two["B"], two["A"])
    assert first.read is not None
    assert first.read({"grade": "B>>A"}).value == "B>>A"


def test_the_authors_template(old: Path) -> None:
    (old / "arena_hard" / "judge_config.yaml").write_text(
        "system_prompt: Judge.\n"
        'prompt_template: ["{question_1}|{answer_1}|{answer_2}"]\n'
    )
    item = items(old, wording="official").rows[0]
    first, second = TASK.grade(item, {("answer", 0): Answer("{answer_1}")})
    assert isinstance(first.by, JudgeRequest) and isinstance(second.by, JudgeRequest)
    shown = [g.by.messages[1]["content"].split("|")[1:] for g in (first, second)]
    assert shown == [["base q1", "{answer_1}"], ["{answer_1}", "base q1"]]
    assert first.read is not None
    assert first.read({"text": "[[A>B]]"}).value == "A>B"
    assert first.read({"text": "[[A>B]] [[B>A]]"}).status == "unparsed"


def test_no_official_words_of_v2(new: Path) -> None:
    with pytest.raises(UserError, match="Arena-Hard v2 are in no file"):
        items(new, wording="official")


# --- figures -----------------------------------------------------------------------

# benchmarks.md B2: three questions, the games baseline first and model first.
LITERAL = (("B>>A", "A>>B"), ("A>B", "A=B"), (None, "A>B"))


def test_the_literal_case_of_v01() -> None:
    found = TASK.metrics(graded(*LITERAL))
    # Both rules: with the third question's one game, 7.5 of 9; without it, 6.5 of 8.
    assert 100 * found["upstream"]["score"] == pytest.approx(83.3333, abs=1e-4)
    assert found["score"]["value"] == 0.8125 and found["score"]["n"] == 2
    assert found["battles"] == 8
    assert (found["unparsed"], found["undecided"]) == (1, 1)
    assert found["score"]["bounds"] == pytest.approx([6.5 / 14, 12.5 / 14])
    assert found["verdicts"] == {
        "clear_wins": 2,
        "wins": 1,
        "ties": 1,
        "losses": 1,
        "clear_losses": 0,
    }
    orders = found["by_order"]
    assert orders["baseline_first"].value == 0.5  # 1 and 0
    assert orders["model_first"].value == 0.75  # 1 and 1/2
    assert orders["difference"].value == 0.25


def test_the_literal_case_of_v2() -> None:
    rows = graded(*LITERAL, version="v2", category="hard_prompt")
    found = TASK.metrics(rows)
    assert found["score"]["value"] == found["upstream"]["score"] == 0.8125


def test_v2_is_scored_on_hard_prompts() -> None:
    hard = graded(("B>A", "A>B"), version="v2", category="hard_prompt")
    other = graded(("A>B", "B>A"), version="v2", category="creative_writing")
    found = TASK.metrics([*hard, *other])
    assert found["scored_on"] == "hard_prompt" and found["score"]["value"] == 1.0
    assert found["topics"]["creative_writing"]["score"]["value"] == 0.0


def test_style_control_needs_texts() -> None:
    rows = graded(*[("B>A", "A>B"), ("A>B", "B>A")] * 4)
    bare = [Graded(r.index, r.item, {}, r.grades) for r in rows]
    found = TASK.metrics(bare)["style_controlled"]
    assert (found["value"], found["reason"]) == (None, "no answers' texts")
    found = TASK.metrics(rows)
    assert found["style_controlled"].value == pytest.approx(0.5)
    assert list(found["style_coefficients"]) == ["length", "headers", "items", "bold"]


def test_nothing_at_all() -> None:
    assert TASK.metrics([])["score"]["value"] is None
    found = TASK.metrics(graded((None, None)))
    assert found["score"]["value"] is None and found["score"]["bounds"] == [0.0, 1.0]


# --- judgements --------------------------------------------------------------------


def judged(question_id: str, first: Any, second: Any, **other: Any) -> dict[str, Any]:
    games = [
        {"score": score, "judgment": f"text {score}"} if score != "none" else None
        for score in (first, second)
    ]
    return {
        "question_id": question_id,
        "model": "m",
        "judge": "j",
        "games": games,
    } | other


def read(folder: Path, rows: list[dict[str, Any]]) -> list[Graded]:
    assert TASK.read_grades is not None
    path = write(folder / "judged.jsonl", rows)
    return list(TASK.read_grades(path, items(folder)))


def test_judgements_of_v01(old: Path) -> None:
    rows = [judged("q2", "A>B", "A=B"), judged("q1", "B>>A", "A>>B")]
    found = read(old, [*rows, judged("q3", None, "A>B")])
    assert [row.index for row in found] == [0, 1, 2]
    figures = TASK.metrics(found)
    assert figures["score"]["value"] == 0.8125
    assert figures["upstream"]["score"] == pytest.approx(7.5 / 9)
    assert found[0].grades["model_first", 0].raw == "text A>>B"


def test_judgements_of_v2(new: Path) -> None:
    row = judged("h", "A<<B", "none", uid="h", category="hard_prompt")
    row["games"][0]["judgment"] = {"answer": "long text"}
    [found] = read(new, [row])
    assert found.grades["baseline_first", 0] == ("A<<B", "ok", "long text")
    assert found.grades["model_first", 0].status == "judge_failed"


def test_a_judgement_without_a_score_is_read(new: Path) -> None:
    row = judged("h", "A>B", "A>B", uid="h")
    for game in row["games"]:
        del game["score"]
        game["judgment"] = "[[a>b]]"
    [found] = read(new, [row])
    assert {grade.value for grade in found.grades.values()} == {"A>B"}


@pytest.mark.parametrize(
    "rows, message",
    [
        ([judged("q1", "A>B", "A>B")] * 2, "q1 is there twice"),
        ([judged("x", "A>B", "A>B")], "x is not among the questions"),
        (
            [judged("q1", "A>B", "A>B"), judged("q2", "A>B", "A>B", model="n")],
            "several models.*m, n",
        ),
        ([{"uid": "q1"}], "must have uid .* and two games"),
    ],
)
def test_judgements_that_are_refused(old: Path, rows, message) -> None:
    with pytest.raises(UserError, match=message):
        read(old, rows)


def test_grades_of_a_run(old: Path) -> None:
    rows = [
        {"index": 0, "question": "baseline_first", "grade": "B>A"},
        {"index": 0, "question": "model_first", "grade": "A=B"},
    ]
    assert TASK.metrics(read(old, rows))["score"]["value"] == 0.75
    with pytest.raises(UserError, match="got 'worse'"):
        TASK.metrics(read(old, [rows[0], rows[1] | {"grade": "worse"}]))


# --- the published data ------------------------------------------------------------


@pytest.mark.data
def test_the_published_files_load(shared_data: Path) -> None:
    if not (shared_data / "arena_hard").is_dir():
        pytest.skip(f"{shared_data / 'arena_hard'} is absent")
    loaded = items(shared_data)
    assert len(loaded.rows) == 500 and not loaded.defects
    assert {row.version for row in loaded.rows} == {"v0.1"}
    assert all(row.baseline for row in loaded.rows)
