"""Multiple choice: which option an answer names, and the figures of that.

Three states: a letter, ``unparsed`` and ``refused``. The headline takes the last two
for wrong, as the official MMStar does; nothing is guessed, as VLMEvalKit and SIUO do
with an unseeded random letter.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxalign.data.picture import Picture
from jaxalign.evaluation import shares, statistics
from jaxalign.evaluation.letters import letter_of, with_options
from jaxalign.evaluation.outcomes import failures
from jaxalign.evaluation.prompts import prompt
from jaxalign.evaluation.questions import question
from jaxalign.evaluation.task import Answer, Grade, Graded, Grading, Question
from jaxalign.judging.refusals import by_prefix


__all__ = [
    "REFUSED",
    "UNPARSED",
    "choice_figures",
    "choice_grading",
    "choice_question",
    "grade_choices",
    "option_of",
]

UNPARSED, REFUSED = "unparsed", "refused"


def option_of(answer: Answer, options: Mapping[str, str]) -> str:
    """Return the letter that an answer names, or ``unparsed``, or ``refused``.

    A refusal is an answer that names no option and begins as one (XSTest's prefixes),
    or that the endpoint's filter stopped.

    >>> options = {"A": "a dog", "B": "a cat"}
    >>> [option_of(Answer(said), options) for said in ("B.", "I cannot say.", "Hm.")]
    ['B', 'refused', 'unparsed']
    """
    if answer.status == "refused":
        return REFUSED
    letter = letter_of(answer.text, options)
    if letter is not None:
        return letter
    return REFUSED if by_prefix(answer.text) == "full_refusal" else UNPARSED


def choice_question(
    text: str,
    options: Mapping[str, str],
    picture: Picture | None = None,
    own: Path | None = None,
) -> Question:
    """Return a question with its options below, and the request for a letter.

    Args:
      text: of the question.
      options: from a letter to its text; none where the text lists them.
      picture: that is shown.
      own: directory with replacements of our prompts.
    Example:
      >>> asked = choice_question("Which?", {"A": "a dog", "B": "a cat"})
      >>> asked.messages[0]["content"].splitlines()[:2]
      ['Which?', 'A. a dog']
    """
    values = {"question": with_options(text, options)}
    return question("question", prompt("multiple_choice", values, own), picture)


def grade_choices(
    row: Any,
    answers: Mapping[tuple[str, int], Answer],
    *,
    own: Path | None = None,
    judge_own: Path | None = None,
) -> list[Grading]:
    """Return the option that each answer names, by rule: a task's ``grade``.

    Args:
      row: an item with ``options``.
      answers: by question and sample.
      own: not needed, as no template is.
      judge_own: not needed, as no judge is.
    Example::

      TASK = Task(grade=grade_choices, variants=configured, ...)
    """
    return [choice_grading(place, a, row.options) for place, a in answers.items()]


def choice_grading(
    place: tuple[str, int], answer: Answer, options: Mapping[str, str]
) -> Grading:
    """Return the grading of an answer, by rule; its name is ``choice``.

    >>> choice_grading(("q", 0), Answer("(A)"), {"A": "a dog", "B": "a cat"}).by.value
    'A'
    """
    return Grading("choice", *place, Grade(option_of(answer, options)))


def choice_figures(
    graded: Sequence[Graded], truths: Sequence[str], groups: Sequence[str] = ()
) -> dict[str, Any]:
    """Return the share of right options, and what became of the others.

    Args:
      graded: items with a grading named ``choice``.
      truths: the right letter of each.
      groups: the category of each; none for no figures by category.
    Returns:
      ``accuracy`` of all answers, ``accuracy_of_parsed`` of those that name an option,
      ``unparsed`` and ``refused`` as shares, ``letters``: how often each was chosen and
      is right, so that a model that always says the same is seen; failures as counts.
      Several answers to a question are a cluster.
    Example:
      >>> given = enumerate([Grade("A"), Grade("B"), Grade("unparsed"), Grade("A")])
      >>> graded = [Graded(n, None, {}, {("choice", 0): one}) for n, one in given]
      >>> found = choice_figures(graded, ["A", "A", "A", "A"])
      >>> found["accuracy"].value, round(found["accuracy_of_parsed"].value, 4)
      (0.5, 0.6667)
    """
    rows = [
        (index, truth, grade)
        for index, (one, truth) in enumerate(zip(graded, truths, strict=True))
        for (name, _), grade in one.grades.items()
        if name == "choice"
    ]
    decided = [(i, truth, g.value) for i, truth, g in rows if g.status == "ok"]
    found: dict[str, Any] = _accuracy(decided)
    found |= failures(grade for _, _, grade in rows)
    found["letters"] = {
        "chosen": dict(sorted(Counter(said for _, _, said in decided).items())),
        "right": dict(sorted(Counter(truths).items())),
    }
    if groups:
        found["topics"] = {
            group: _accuracy([one for one in decided if groups[one[0]] == group])
            for group in dict.fromkeys(groups)
        }
    return {**found, **shares.silent_answers(graded)}


def _accuracy(decided: Sequence[tuple[int, str, str]]) -> dict[str, Any]:
    parsed = [one for one in decided if one[2] not in (UNPARSED, REFUSED)]
    found = {"accuracy": _share(decided), "accuracy_of_parsed": _share(parsed)}
    for state in (UNPARSED, REFUSED):
        count = sum(said == state for _, _, said in decided)
        found[f"{state}_share"] = statistics.share(count, len(decided))
    return found


def _share(rows: Sequence[tuple[int, str, str]]) -> statistics.Figure:
    right = [float(said == truth) for _, truth, said in rows]
    items = [index for index, _, _ in rows]
    if len(set(items)) == len(items):
        return statistics.share(round(sum(right)), len(right))
    return statistics.clustered(right, items)
