"""The probability of each of a few answers to a prompt, without sampling.

Yes or no, A, B or C, 1 to 5: the primitive of judges that run in process. A prompt is
computed once for all its answers, many prompts share a row, and the log-probabilities
are those of training and scoring (``objectives.logps.token_logps``).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float

from jaxalign.adapters import adapter
from jaxalign.data import packing, picture_text
from jaxalign.data.records import Prompt
from jaxalign.data.rendering import Renderer, as_renderer
from jaxalign.data.tokenizer import Tokenizer
from jaxalign.errors import UserError
from jaxalign.generation.question_pictures import (
    QuestionPictures,
    laid_out,
    pictures_of,
)
from jaxalign.objectives import logps
from jaxalign.types import Completions, Model, ModelInputs, Variables


__all__ = [
    "AnswerProbs",
    "PromptWithAnswers",
    "answer_logps",
    "choose",
    "question",
    "weighed",
]


class PromptWithAnswers(NamedTuple):
    """A prompt and the answers that it may get."""

    prompt: Sequence[int]
    answers: Sequence[Sequence[int]]
    """Tokens of each, at least one."""
    pictures: QuestionPictures | None = None
    """Of the prompt, encoded with its row."""


class AnswerProbs(NamedTuple):
    """What a model thinks of the answers."""

    logps: Float[np.ndarray, " n"]
    """log p(answer | prompt), summed over its tokens."""
    probs: Float[np.ndarray, " n"]
    """The same as shares of all answers, ``softmax(logps)``: they add up to 1."""
    mean_logps: Float[np.ndarray, " n"]
    """The sums divided by the answers' tokens, for answers of unequal length."""


def question(
    prompt: Prompt, answers: Sequence[str], renderer: Renderer | Tokenizer
) -> PromptWithAnswers:
    """Tokenise a prompt and its answers as the model would write them.

    Raises:
      UserError: the tokenizer joins the end of the prompt with an answer in one token,
        so that the answer's probability cannot be told; or an answer is empty.
    Example::

      renderer = load_tokenizer("smollm2")
      question(Prompt(prompt="2 + 2 ="), [" 4", " 5"], renderer)
    """
    renderer = as_renderer(renderer)
    tokenizer = renderer.tokenizer
    rendered = renderer.prompt_text(prompt)
    plain = isinstance(prompt.text, str)
    begin, positions, places, layouts = renderer.prompt_encoding(prompt)
    patcher = renderer.patcher
    if layouts and patcher is not None:
        where = prompt.where
        rendered = picture_text.expand(rendered, layouts, patcher, where).text
    found = []
    for answer in answers:
        whole = tokenizer(rendered + answer, add_special_tokens=plain, verbose=False)
        tokens = list(whole["input_ids"])
        if tokens[: len(begin)] != begin or len(tokens) == len(begin):
            raise UserError(
                f"{prompt.where}: the answer {answer!r} has no token of its own behind "
                "the prompt. Give a text, and end the prompt where a word ends"
            )
        found.append(tokens[len(begin) :])
    shown = pictures_of(prompt.images, layouts, places, positions, patcher)
    return PromptWithAnswers(begin, found, shown)


def choose(
    model: Model,
    variables: Variables,
    questions: Sequence[PromptWithAnswers],
    *,
    row_length: int = 512,
    batch_rows: int = 1,
) -> list[AnswerProbs]:
    """Return what a model thinks of each question's answers.

    Args:
      model: a language model.
      variables: base and adapters.
      questions: prompts with their answers.
      row_length: places of a row, which holds as many questions as fit; grows to the
        longest.
      batch_rows: rows that are computed at once.
    Raises:
      UserError: see :func:`answer_logps`.
    Example::

      asked = question(Prompt(prompt="2 + 2 ="), [" 4", " 5"], renderer)
      (found,) = choose(base.model, base.variables, [asked])
      found.probs  # of each answer, adding up to 1
    """
    found = answer_logps(
        model, variables, questions, row_length=row_length, batch_rows=batch_rows
    )
    return [weighed(answers) for answers in found]


def answer_logps(
    model: Model,
    variables: Variables,
    questions: Sequence[PromptWithAnswers],
    *,
    row_length: int | None = 512,
    batch_rows: int = 1,
) -> list[list[Float[np.ndarray, " t"]]]:
    """Return log p of every token of every answer, given all before it.

    Args:
      model: a language model.
      variables: base and adapters.
      questions: prompts with their answers.
      row_length: places of a row, which holds as many questions as fit; grows to the
        longest. None gives every question a row of its own, of one of a few lengths,
        so that its numbers do not depend on the questions beside it.
      batch_rows: rows that are computed at once.
    Raises:
      UserError: a question without prompt or answers, or an adapter that reads later
        tokens (it would read the answers).
    Example::

      asked = question(Prompt(prompt="2 + 2 ="), [" 4", " 5"], renderer)
      ((four, five),) = answer_logps(base.model, base.variables, [asked])
      four.sum()  # log p of the whole answer
    """
    if adapter.reads_ahead(variables):
        raise UserError(
            "the adapter has a mean_gate, which averages over the whole sequence, "
            "answers included. Train with gate token or sequence instead"
        )
    for number, asked in enumerate(questions):
        if not len(asked.prompt) or not len(asked.answers) or not all(asked.answers):
            raise UserError(
                f"question {number} needs a prompt and answers of at least one token"
            )
    if not questions:
        return []
    found: list[list[np.ndarray]] = [[] for _ in questions]
    for rows, sizes in _plan(questions, row_length):
        rows = rows + [()] * (-len(rows) % batch_rows)
        for begin in range(0, len(rows), batch_rows):
            part = rows[begin : begin + batch_rows]
            built = [_row([questions[i] for i in row]) for row in part]
            values = jax.device_get(
                _score(variables, *_batch(built, sizes), model=model)
            )
            for row, mine in zip(part, values, strict=True):
                at = 0
                for index in row:
                    for answer in questions[index].answers:
                        found[index].append(mine[at : at + len(answer)])
                        at += len(answer)
    return found


_Rows = list[tuple[int, ...]]


class _Sizes(NamedTuple):
    """Of rows that are computed by one program."""

    length: int
    wanted: int
    """Log-probabilities."""
    units: int
    """Units of patches."""
    axes: tuple[int, ...]
    """Of positions, () or (3,)."""


def _plan(
    questions: Sequence[PromptWithAnswers], row_length: int | None
) -> list[tuple[_Rows, _Sizes]]:
    """Return rows of questions, with their sizes."""
    places = np.array([_places(asked) for asked in questions])
    wanted = np.array([sum(map(len, asked.answers)) for asked in questions])
    shown = [asked.pictures for asked in questions]
    units = np.array([0 if one is None else one.units for one in shown])
    axes = [() if one is None or one.positions is None else (3,) for one in shown]
    if row_length is None:
        alike: dict[_Sizes, _Rows] = {}
        for number, own in enumerate(zip(places, wanted, units, strict=True)):
            length, most, seen = (_rounded(int(size)) if size else 0 for size in own)
            sizes = _Sizes(length, most, seen, axes[number])
            alike.setdefault(sizes, []).append((number,))
        return [(rows, sizes) for sizes, rows in alike.items()]
    length = max(row_length, int(places.max()))
    rows = packing.plan_rows(
        places,
        row_length=length,
        pairs=len(questions),
        seed=0,
        epoch=0,
        shuffle=False,
    )
    most, seen = (
        max(int(sizes[list(row)].sum()) for row in rows) for sizes in (wanted, units)
    )
    return [(rows, _Sizes(length, most, seen, max(axes)))]


def _rounded(size: int) -> int:
    """Return the next of 64, 96, 128, 192, 256, ...: few programs, at most half idle.

    >>> [_rounded(size) for size in (1, 65, 97, 129, 300)]
    [64, 96, 128, 192, 384]
    """
    power = 64
    while power < size:
        if size <= power * 3 // 2:
            return power * 3 // 2
        power *= 2
    return power


def weighed(answers: Sequence[Float[np.ndarray, " _"]]) -> AnswerProbs:
    """Return what the log-probabilities of a question's answers, by token, come to.

    >>> found = weighed([np.log([0.5]), np.log([0.25])])
    >>> found.probs.round(4).tolist()
    [0.6667, 0.3333]
    """
    values = np.asarray([float(mine.sum()) for mine in answers])
    weights = np.exp(values - values.max())
    sizes = [len(mine) for mine in answers]
    return AnswerProbs(values, weights / weights.sum(), values / np.asarray(sizes))


def _places(asked: PromptWithAnswers) -> int:
    """An answer's last token is predicted, but predicts nothing: it takes no place."""
    return len(asked.prompt) + sum(len(answer) - 1 for answer in asked.answers)


def _row(asked: Sequence[PromptWithAnswers]) -> dict[str, list[Any]]:
    """Lay questions out one after the other, each answer a branch of its prompt."""
    names = ("tokens", "positions", "sequences", "branches", "source", "target")
    row: dict[str, list[Any]] = {name: [] for name in (*names, "pictures")}

    def put(
        tokens: Sequence[int], positions: Sequence[Any], sequence: int, branch: int
    ) -> None:
        row["tokens"] += tokens
        row["positions"] += positions
        row["sequences"] += [sequence] * len(tokens)
        row["branches"] += [branch] * len(tokens)

    for sequence, (prompt, answers, pictures) in enumerate(asked, start=1):
        if pictures is not None:
            row["pictures"].append((pictures, len(row["tokens"])))
        positions = _positions(prompt, pictures)
        after = max(map(np.max, positions)) + 1
        put(prompt, positions, sequence, 0)
        last = len(row["tokens"]) - 1
        for branch, answer in enumerate(answers, start=1):
            begin = len(row["tokens"])
            follow = range(after, after + len(answer) - 1)
            put(answer[:-1], follow, sequence, branch)
            row["source"] += [last, *range(begin, begin + len(answer) - 1)]
            row["target"] += answer
    return row


def _positions(prompt: Sequence[int], pictures: QuestionPictures | None) -> list[Any]:
    """Return the rotary position of each of a prompt's tokens."""
    known = None if pictures is None else pictures.positions
    if known is None:
        return list(range(len(prompt)))
    after = int(known.max()) + 1
    return [*known.tolist(), *range(after, after + len(prompt) - len(known))]


def _batch(
    rows: Sequence[dict[str, list[Any]]], sizes: _Sizes
) -> tuple[ModelInputs, Completions]:
    def filled(name: str, size: int, axes: tuple[int, ...] = ()) -> np.ndarray:
        out = np.zeros((len(rows), size, *axes), np.int32)
        for place, row in zip(out, rows, strict=True):
            for index, value in enumerate(row[name]):
                place[index] = value
        return out

    length, wanted, units, axes = sizes
    inputs: Any = [
        filled("tokens", length),
        filled("positions", length, axes),
        filled("sequences", length),
        filled("branches", length),
        laid_out([row["pictures"] for row in rows], units),
    ]
    there: Any = np.arange(wanted)[None] < [[len(row["target"])] for row in rows]
    source, target = (filled(name, wanted) for name in ("source", "target"))
    response = np.where(there, 0, -1).astype(np.int32)
    nothing = np.full_like(source, -1)
    fields: Any = (source, target, response, nothing)
    return ModelInputs(*inputs), Completions(*fields)


def _logps(
    variables: Variables, inputs: ModelInputs, completions: Completions, *, model: Model
) -> Float[Array, "b c"]:
    hidden = model.hidden_fn(variables, inputs)
    return logps.token_logps(model.logits_fn, variables, hidden, completions)


_score = jax.jit(_logps, static_argnames="model")
