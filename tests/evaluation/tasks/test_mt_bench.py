"""MT-Bench: what is asked, what is graded, and the means of stored judgements."""

import gzip
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from jaxalign.errors import UserError
from jaxalign.evaluation import published
from jaxalign.evaluation.task import Answer, Grade, Graded, Items, TaskOptions
from jaxalign.evaluation.tasks.mt_bench import TASK, Dialogue
from jaxalign.judging.judge import JudgeRequest


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


QUESTIONS = [
    {"question_id": 1, "category": "writing", "turns": ["Write {a}.", "Shorter."]},
    {"question_id": 2, "category": "math", "turns": ["1 + 1?", "Doubled?"]},
]
SAID = ("It is {answer_1}.", "And {ref_answer_2}.")


def answers_of(number: int, *turns: str) -> dict[str, Any]:
    return {"question_id": number, "choices": [{"index": 0, "turns": list(turns)}]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "mt_bench" / "question.jsonl", QUESTIONS)
    write(tmp_path / "mt_bench" / "gpt-4.jsonl", [answers_of(2, "two", "four")])
    return tmp_path


@pytest.fixture
def authors(folder: Path) -> Path:
    fields = {
        "single-v1": "{question}|{answer}",
        "single-v1-multi-turn": "{question_1}|{answer_1}|{question_2}|{answer_2}",
        "single-math-v1": "{question}|{ref_answer_1}|{answer}",
        "single-math-v1-multi-turn": "{ref_answer_1}|{ref_answer_2}|{answer_2}",
        "pair-v2": "{question}|{answer_a}|{answer_b}",
        "pair-v2-multi-turn": "{answer_a_1}|{answer_a_2}|{answer_b_1}|{answer_b_2}",
        "pair-math-v1": "{ref_answer_1}|{answer_a}|{answer_b}",
        "pair-math-v1-multi-turn": "{ref_answer_2}|{answer_a_2}|{answer_b_2}",
    }
    write(
        folder / "mt_bench" / "judge_prompts.jsonl",
        [
            {"name": name, "system_prompt": f"of {name}", "prompt_template": text}
            for name, text in fields.items()
        ],
    )
    return folder


def with_baseline(folder: Path) -> Path:
    rows = [answers_of(1, "base one", "base two"), answers_of(2, "b1", "b2")]
    write(folder / "mt_bench" / "model_answer" / "gpt-3.5-turbo.jsonl", rows)
    return folder


def asked(item: Dialogue, task=TASK) -> dict[str, JudgeRequest]:
    answers = {(f"turn_{n}", 0): Answer(text) for n, text in enumerate(SAID, 1)}
    found = {}
    for grading in task.grade(item, answers):
        assert isinstance(grading.by, JudgeRequest)
        assert grading.question == grading.name[:6]
        found[grading.name] = grading.by
    return found


def shown(request: JudgeRequest) -> str:
    return str(request.messages[1]["content"])


def official(**options: Any):
    assert TASK.variants is not None
    [task] = TASK.variants(TASK, TaskOptions(wording="official", **options))
    return task


def graded(item: Dialogue, **grades: Any) -> Graded:
    return Graded(
        item.question_id,
        item,
        {},
        {
            (name, 0): g if isinstance(g, Grade) else Grade(g)
            for name, g in grades.items()
        },
    )


# --- files and questions -----------------------------------------------------------


def test_the_second_question_follows_the_first(folder: Path) -> None:
    items = TASK.load(folder)
    first, second = TASK.requests(items.rows[0])
    assert first.messages == ({"role": "user", "content": "Write {a}."},)
    assert (second.name, second.follows) == ("turn_2", "turn_1")
    assert first.sampling["temperature"] == 0.7
    assert TASK.requests(items.rows[1])[0].sampling["temperature"] == 0.0


def test_references_of_maths_alone(folder: Path) -> None:
    write(
        folder / "mt_bench" / "gpt-4.jsonl",
        [answers_of(1, "not", "used"), answers_of(2, "two", "four")],
    )
    rows = TASK.load(folder).rows
    assert [row.references for row in rows] == [None, ("two", "four")]
    (folder / "mt_bench" / "gpt-4.jsonl").unlink()
    assert TASK.load(folder).defects == {"without reference answer": 1}


def test_files_that_are_missing_or_other(folder: Path) -> None:
    with pytest.raises(UserError, match="judge_prompts.jsonl.*lm-sys/FastChat"):
        official().load(folder)
    (folder / "mt_bench" / "gpt-4.jsonl").unlink()
    write(folder / "mt_bench" / "judge_prompts.jsonl", [])
    with pytest.raises(UserError, match="reference answers of 1 questions"):
        official().load(folder)
    write(folder / "mt_bench" / "question.jsonl", [{"question_id": 1, "turns": ["a"]}])
    with pytest.raises(UserError, match="question 1 must have"):
        TASK.load(folder)


# --- the judge's requests ----------------------------------------------------------


def test_ours_shows_the_conversation_as_one_object(folder: Path) -> None:
    item = TASK.load(folder).rows[1]
    requests = asked(item)
    assert list(requests) == ["turn_1", "turn_2"]
    material = json.loads(shown(requests["turn_2"]))
    assert material == {
        "turns": [
            {"question": "1 + 1?", "answer": SAID[0]},
            {"question": "Doubled?", "answer": SAID[1]},
        ],
        "reference": ["two", "four"],
    }
    assert len(json.loads(shown(requests["turn_1"]))["turns"]) == 1
    [labels] = requests["turn_1"].schema["properties"].values()
    assert labels["enum"] == [str(n) for n in range(1, 11)]


def test_both_orders_with_a_baseline(folder: Path) -> None:
    item = TASK.load(with_baseline(folder)).rows[0]
    requests = asked(item)
    assert len(requests) == 6
    first, second = (
        json.loads(shown(requests[f"turn_2_{order}"])) for order in ("first", "second")
    )
    assert (first["A"], first["B"]) == (list(SAID), ["base one", "base two"])
    assert (second["A"], second["B"]) == (first["B"], first["A"])


def test_the_authors_templates_by_kind_and_turn(authors: Path) -> None:
    task = official()
    writing, maths = task.load(with_baseline(authors)).rows
    requests = asked(writing, task)
    assert requests["turn_1"].messages[0]["content"] == "of single-v1"
    assert shown(requests["turn_1"]) == f"Write {{a}}.|{SAID[0]}"
    assert shown(requests["turn_2"]) == f"Write {{a}}.|{SAID[0]}|Shorter.|{SAID[1]}"
    assert shown(requests["turn_2_second"]) == f"base one|base two|{'|'.join(SAID)}"
    requests = asked(maths, task)
    assert shown(requests["turn_1"]) == f"1 + 1?|two|{SAID[0]}"
    assert shown(requests["turn_2"]) == f"two|four|{SAID[1]}"
    assert shown(requests["turn_1_first"]) == f"two|{SAID[0]}|b1"
    assert shown(requests["turn_2_first"]) == f"four|{SAID[1]}|b2"
    assert requests["turn_1"].options == {"temperature": 0.0, "max_tokens": 2048}
    assert task.facts["wording"] == "official"


def test_replies_of_both_forms(authors: Path) -> None:
    item = official().load(with_baseline(authors)).rows[0]
    answers = {("turn_1", 0): Answer("a"), ("turn_2", 0): Answer("b")}
    by_name = {each.name: each for each in TASK.grade(item, answers)}
    read = by_name["turn_1"].read
    assert read is not None
    assert read({"grade": "7"}).value == 7.0
    assert read({"text": "[[8.5]]"}).value == 8.5
    assert read({"text": "[[0]]"}).status == "unparsed"
    read = by_name["turn_1_first"].read
    assert read is not None
    assert (read({"grade": "tie"}).value, read({"text": "[[B]]"}).value) == ("tie", "B")
    assert read({"text": "B"}).status == "unparsed"


def test_several_samples(folder: Path) -> None:
    assert TASK.variants is not None
    [task] = TASK.variants(TASK, TaskOptions(num_samples=2))
    assert task.num_samples == 2
    item = task.load(folder).rows[0]
    answers = {(f"turn_{n}", s): Answer(f"{n} {s}") for n in (1, 2) for s in (0, 1)}
    gradings = task.grade(item, answers)
    assert [(g.name, g.sample) for g in gradings] == [
        ("turn_1", 0),
        ("turn_2", 0),
        ("turn_1", 1),
        ("turn_2", 1),
    ]
    assert isinstance(gradings[3].by, JudgeRequest)
    turns = json.loads(shown(gradings[3].by))["turns"]
    assert [turn["answer"] for turn in turns] == ["1 1", "2 1"]


# --- figures -----------------------------------------------------------------------


def items(*categories: str) -> list[Dialogue]:
    return [Dialogue(n, category, ("?", "?")) for n, category in enumerate(categories)]


def test_the_mean_is_over_turns(folder: Path) -> None:
    writing, maths = items("writing", "math")
    lost = Grade(None, "unparsed", raw="[[11]]")
    found = TASK.metrics(
        [
            graded(writing, turn_1=8.0, turn_2=6.0),
            graded(maths, turn_1=1.0, turn_2=lost),
        ]
    )
    # Three ratings, 15 / 3; by questions (8 + 6 - 10), (1 - 5): sqrt(16 + 16) / 3.
    assert found["score"]["value"] == 5.0
    assert found["score"]["standard_error"] == pytest.approx(32**0.5 / 3)
    assert found["score"]["n"] == 3
    assert (found["turn_1"].value, found["turn_2"].value) == (4.5, 6.0)
    assert found["topics"]["writing"]["score"].value == 7.0
    assert (found["unparsed"], found["judge_failed"], found["answer_failed"]) == (
        1,
        0,
        0,
    )
    assert found["score"]["bounds"] == [16 / 4, 25 / 4]
    assert found["upstream"] == {"score": 26 / 4}
    assert "pairwise" not in found


def test_a_win_is_one_in_both_orders() -> None:
    one, two = items("writing", "math")
    failed = Grade(None, "judge_failed")
    found = TASK.metrics(
        [
            graded(
                one,
                turn_1_first="A",  # as A, and as B: a win
                turn_1_second="B",
                turn_2_first="A",  # the first place twice: a tie
                turn_2_second="A",
            ),
            graded(
                two,
                turn_1_first="B",
                turn_1_second="A",
                turn_2_first="tie",
                turn_2_second=failed,
            ),
        ]
    )["pairwise"]
    assert (found["wins"], found["losses"], found["ties"]) == (1, 1, 1)
    assert found["win_rate"].value == pytest.approx(1 / 3)
    assert found["adjusted_win_rate"].value == 0.5
    assert found["orders_agree"].value == pytest.approx(2 / 3)
    assert found["judge_failed"] == 1
    assert found["turn_1"]["win_rate"].value == 0.5


def test_nothing_at_all() -> None:
    found = TASK.metrics([])
    assert found["score"]["value"] is None and found["unparsed"] == 0
    assert "bounds" not in found["score"] and "upstream" not in found


# --- FastChat's files --------------------------------------------------------------


def judged(number: int, turn: int, text: str, **other: Any) -> dict[str, Any]:
    row = {"question_id": number, "model": "m", "turn": turn, "judgment": text}
    return row | {"score": -1} | other


def test_ratings_of_fastchat(folder: Path) -> None:
    path = folder / "gpt-4_single.jsonl"
    rows = [judged(1, 1, "[[7]]"), judged(1, 2, "$ERROR$"), judged(2, 1, "none")]
    del rows[2]["judgment"]
    write(path, [*rows, judged(2, 2, "?")])
    loaded = TASK.load(folder)
    assert isinstance(loaded, Items) and TASK.read_grades is not None
    found = TASK.metrics(TASK.read_grades(path, loaded))
    assert found["score"]["value"] == 7.0
    assert (found["unparsed"], found["judge_failed"]) == (2, 1)


def test_comparisons_of_fastchat(folder: Path) -> None:
    def row(number: int, turn: int, first: str, second: str) -> dict[str, Any]:
        winners = {"g1_winner": first, "g2_winner": second}
        models = {"model_1": "m", "model_2": "b"}
        return {"question_id": number, "turn": turn} | models | winners

    path = folder / "gpt-4_pair.jsonl"
    rows = [
        row(1, 1, "model_1", "model_1"),
        row(1, 2, "model_1", "model_2"),
        row(2, 1, "model_2", "model_2"),
        row(2, 2, "tie", "error"),
    ]
    write(path, rows)
    assert TASK.read_grades is not None
    loaded = TASK.load(folder)
    assert isinstance(loaded, Items)
    found = TASK.metrics(TASK.read_grades(path, loaded))["pairwise"]
    assert (found["wins"], found["losses"], found["ties"]) == (1, 1, 1)
    assert found["unparsed"] == 1


@pytest.mark.parametrize(
    "rows, message",
    [
        (
            [judged(1, 1, "a"), judged(1, 1, "a")],
            "two judgements of question 1, turn_1",
        ),
        ([judged(1, 1, "a"), judged(2, 1, "a", model="n")], "several models.* m, n"),
        ([judged(9, 1, "a")], "1 questions that are not in question.jsonl, such as 9"),
        ([judged(1, 3, "a")], "must have question_id, model and turn"),
        ([{"g1_winner": "model_1"}], "a comparison must have"),
    ],
)
def test_files_that_are_refused(folder: Path, rows, message) -> None:
    write(folder / "judged.jsonl", rows)
    loaded = TASK.load(folder)
    assert isinstance(loaded, Items) and TASK.read_grades is not None
    with pytest.raises(UserError, match=message):
        TASK.read_grades(folder / "judged.jsonl", loaded)


# --- the published data ------------------------------------------------------------


@pytest.fixture
def data(shared_data: Path) -> Path:
    if not (shared_data / "mt_bench").is_dir():
        pytest.skip(f"{shared_data / 'mt_bench'} is absent")
    return shared_data


@pytest.mark.data
def test_the_published_files_load(data: Path) -> None:
    task = official()
    loaded = task.load(data)
    assert isinstance(loaded, Items)
    assert len(loaded.rows) == 80 and not loaded.defects
    assert sum(row.references is not None for row in loaded.rows) == 30
    for row in loaded.rows:  # every template has its fields
        for request in asked(row, task).values():
            assert SAID[0] in shown(request) or SAID[1] in shown(request)


@pytest.mark.data
@pytest.mark.parametrize(
    "model, want",
    [
        ("claude-3-5-sonnet-20240620", (9.2375, 9.1750, 9.2063)),
        ("claude-3-opus-20240229", (9.0437, 8.3063, 8.6750)),
        ("mistral-orpo-trl", (7.7313, 6.6000, 7.1656)),
    ],
)
def test_means_of_stored_judgements(data: Path, tmp_path, model, want) -> None:
    rows = stored(data)
    write(tmp_path / "judged.jsonl", rows[model])
    loaded = TASK.load(data)
    assert isinstance(loaded, Items) and TASK.read_grades is not None
    found = TASK.metrics(TASK.read_grades(tmp_path / "judged.jsonl", loaded))
    got = [found["turn_1"].value, found["turn_2"].value, found["score"]["value"]]
    assert got == pytest.approx(want, abs=6e-5)
    assert found["upstream"]["score"] == pytest.approx(want[2], abs=6e-5)


@pytest.mark.data
def test_two_runs_in_one_file_are_refused(data: Path, tmp_path: Path) -> None:
    loaded = TASK.load(data)
    assert isinstance(loaded, Items) and TASK.read_grades is not None
    rows = stored(data)
    means = {}
    for model in ("mistral-orpo", "Meta-Llama-3-8B-Instruct-Normal"):
        write(tmp_path / "judged.jsonl", rows[model])
        with pytest.raises(UserError, match="two judgements of question"):
            TASK.read_grades(tmp_path / "judged.jsonl", loaded)
        judged = [row for row in rows[model] if row["score"] != -1]
        for which, order in (("first", reversed(judged)), ("last", judged)):
            kept = {(row["question_id"], row["turn"]): row for row in order}
            write(tmp_path / "judged.jsonl", list(kept.values()))
            found = TASK.metrics(TASK.read_grades(tmp_path / "judged.jsonl", loaded))
            means[model, which] = found["score"]["value"]
    assert means["mistral-orpo", "first"] == pytest.approx(5.4156, abs=6e-5)
    assert means["mistral-orpo", "last"] == pytest.approx(6.3281, abs=6e-5)
    normal = {means["Meta-Llama-3-8B-Instruct-Normal", w] for w in ("first", "last")}
    assert any(value == pytest.approx(7.76875, abs=6e-5) for value in normal)


def stored(data: Path) -> dict[str, list[dict[str, Any]]]:
    path = data / "mt_bench" / "judgments_single.jsonl.gz"
    if not path.exists():
        pytest.skip(f"{path} is absent")
    found = defaultdict(list)
    for line in gzip.decompress(path.read_bytes()).decode().strip().split("\n"):
        row = json.loads(line)
        found[row["model"]].append(row)
    assert published.read_jsonl(path)  # the package reads it too
    return found
