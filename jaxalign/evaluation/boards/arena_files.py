"""Files of Arena-Hard: questions, answers to compare with, judgements."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml

from jaxalign.errors import UserError
from jaxalign.evaluation import published, run_files
from jaxalign.evaluation.boards.authors_wording import JudgePrompt
from jaxalign.evaluation.boards.verdicts import arena_verdict
from jaxalign.evaluation.task import Grade, Graded, Items


__all__ = ["BASELINES", "ORDERS", "ArenaPrompt", "load", "read_grades"]

Version = Literal["v0.1", "v2"]

ORDERS = ("baseline_first", "model_first")
"""The two games, in the authors' order; names of gradings."""

BASELINES = {
    "arena-hard-v0.1": "gpt-4-0314",
    "hard_prompt": "o3-mini-2025-01-31",
    "coding": "o3-mini-2025-01-31",
    "math": "o3-mini-2025-01-31",
    "creative_writing": "gemini-2.0-flash-001",
}
"""Whose answers those of a category are compared with."""

_QUESTIONS = ("v0.1_question.jsonl", "v2.0_question.jsonl", "question.jsonl")
_FOLDERS = ("arena_hard", "arena-hard-v2.0", "arena-hard-v0.1")
_ANSWERS = (*_FOLDERS, *(f"{folder}/model_answer" for folder in _FOLDERS))
_SOURCE = "lmarena/arena-hard-auto, or its data set on Hugging Face"
_CONFIG = "judge_config.yaml"


class ArenaPrompt(NamedTuple):
    """An item: a request, and the answer to compare with."""

    uid: str
    prompt: str
    category: str
    version: Version
    baseline: str | None = None
    """The baseline's answer; None where its file is not there."""
    wording: JudgePrompt | None = None
    """The authors' judge template, the same of all items; None for ours."""


def load(folder: Path, *, official: bool = False) -> Items:
    """Return the requests with the baselines' answers.

    Which version it is, the questions say by their category. Answers are joined by uid:
    published files have them in another order.

    Args:
      folder: the data directory.
      official: with the authors' judge template, ``judge_config.yaml`` of v0.1.
    Raises:
      UserError: a file is missing, or is not as published.
    Example::

      load(Path("data")).rows[0].version
    """
    path = _question_file(folder)
    rows = [_prompt(path, row) for row in published.read_jsonl(path)]
    wording = _wording(folder, rows) if official else None
    answers: dict[str, dict[str, str]] = {}
    found, lacking = [], 0
    for row in rows:
        name = BASELINES[row.category]
        if name not in answers:
            answers[name] = _answers(folder, name, row.version)
        baseline = answers[name].get(row.uid)
        lacking += baseline is None
        found.append(row._replace(baseline=baseline, wording=wording))
    return Items(found, {"without the baseline's answer": lacking} if lacking else {})


def _question_file(folder: Path) -> Path:
    for name in _QUESTIONS:
        if (path := published.find(folder, name, _FOLDERS)) is not None:
            return path
    return published.find_file(folder, "question.jsonl", _FOLDERS, source=_SOURCE)


def _prompt(path: Path, row: Mapping[str, Any]) -> ArenaPrompt:
    category = row.get("category")
    if category not in BASELINES:
        raise UserError(
            f"{path}: the category {category!r} is none of Arena-Hard's: "
            f"{', '.join(BASELINES)}"
        )
    version: Version = "v0.1" if category == "arena-hard-v0.1" else "v2"
    match row:
        case {"uid": str(uid), "prompt": str(text)}:
            return ArenaPrompt(uid, text, category, version)
        case {"question_id": str(uid), "turns": [{"content": str(text)}, *_]}:
            return ArenaPrompt(uid, text, category, version)
    raise UserError(
        f"{path}: a question must have uid, category and prompt: got {sorted(row)}"
    )


def _answers(folder: Path, model: str, version: Version) -> dict[str, str]:
    """Return a model's answers by uid; none where its file is not there."""
    for name in (f"{version}_{model}.jsonl", f"{model}.jsonl"):
        path = published.find(folder, name, _ANSWERS)
        if path is None:
            continue
        found = {}
        for row in published.read_jsonl(path):
            match row:
                case {"uid": str(uid), "messages": [*_, {"content": content}]}:
                    pass
                case {
                    "question_id": str(uid),
                    "choices": [{"turns": [{"content": content}, *_]}, *_],
                }:
                    pass
                case _:
                    raise UserError(
                        f"{path}: an answer must have uid and messages: got "
                        f"{sorted(row)}"
                    )
            text = content["answer"] if isinstance(content, dict) else content
            found[uid] = str(text)
        return found
    return {}


def _wording(folder: Path, rows: list[ArenaPrompt]) -> JudgePrompt:
    if rows and rows[0].version != "v0.1":
        raise UserError(
            "--wording official: the authors' words for Arena-Hard v2 are in no file "
            "that could be read. Leave it out, or replace our arena_hard.md"
        )
    path = published.find_file(folder, _CONFIG, _FOLDERS, source=f"{_SOURCE}, config/")
    try:
        read = yaml.safe_load(published.read_text(path))
    except yaml.YAMLError as error:
        raise UserError(f"{path} is no YAML: {error}") from None
    match read:
        case {"system_prompt": str(system), "prompt_template": [str(user)]}:
            return JudgePrompt(system, user)
    raise UserError(f"{path} must have system_prompt and one prompt_template")


# --- judgements --------------------------------------------------------------------


def read_grades(path: Path, items: Items) -> list[Graded]:
    """Return grades from a file of ``model_judgment``, or from a ``grades.jsonl``.

    Of a game its ``score`` counts, the label that the authors' tool read; where there
    is none, it is read from the judgement's text.

    Raises:
      UserError: the file holds several models, a question twice, or another's.
    Example::

      read_grades(Path("gpt-4.1/mine.jsonl"), load(Path("data")))
    """
    rows = published.read_jsonl(path)
    if any("index" in row for row in rows[:1]):
        return run_files.read_grades(path, items)
    places = {item.uid: index for index, item in enumerate(items.rows)}
    found: dict[int, Graded] = {}
    models = {str(row.get("model")) for row in rows}
    if len(models) > 1:
        raise UserError(
            f"{path} holds judgements of several models, keep the lines of one: "
            f"{', '.join(sorted(models))}"
        )
    for row in rows:
        match row:
            case {"games": [first, second]}:
                uid = row.get("uid", row.get("question_id"))
            case _:
                raise UserError(
                    f"{path}: a judgement must have uid (or question_id) and two "
                    f"games: got {sorted(row)}"
                )
        index = places.get(str(uid))
        if index is None or index in found:
            what = "is not among the questions" if index is None else "is there twice"
            raise UserError(f"{path}: {uid} {what}")
        item = items.rows[index]
        games = zip(ORDERS, (first, second), strict=True)
        grades = {(order, 0): _game(game, item.version) for order, game in games}
        found[index] = Graded(index, item, {}, grades)
    return [found[index] for index in sorted(found)]


def _game(game: Any, version: Version) -> Grade:
    if not isinstance(game, dict):  # what is written where the call failed
        return Grade(None, "judge_failed")
    texts = list(_texts(game.get("judgment")))
    raw = texts[0] if texts else None
    score = game.get("score")
    label = f"[[{score}]]" if "score" in game else raw or ""
    found = arena_verdict(label, version)
    return Grade(found, "unparsed" if found is None else "ok", raw)


def _texts(judgment: Any) -> Iterator[str]:
    if isinstance(judgment, dict):
        judgment = judgment.get("answer")
    if isinstance(judgment, str):
        yield judgment
